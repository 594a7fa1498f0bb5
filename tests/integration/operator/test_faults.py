"""Effectively once: whatever dies at whatever moment, no restart is lost and none is done twice."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.integration.operator.client import Object, eventually
from tests.integration.operator.conftest import open_world
from tests.integration.operator.faults import FaultProxy, Faults
from tests.integration.operator.world import World, manual_restart, workload
from tests.support.agents import GIB

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(900)]

RESIDUAL = {"threshold": "8Gi", "forSeconds": 0, "minSamples": 1}
EFFECTS = ("recycle", "restart", "eviction")
# Each has a namespace and an operator of its own, and mostly waits.
AT_A_TIME = 4


async def begin_manual(world: World) -> None:
    (pod,) = await world.pods()
    await world.create(manual_restart("by-hand", pod["metadata"]["name"]))


async def begin_eviction(world: World) -> None:
    (pod,) = await world.pods()
    await world.create(manual_restart("by-hand", pod["metadata"]["name"], method="Evict"))


async def begin_residual(world: World) -> None:
    (agent,) = world.kubelet.agents
    agent.script.after_recycle_bytes = 9 * GIB
    agent.script.residual_bytes = 9 * GIB


@dataclass(frozen=True)
class Case:
    """How a restart begins, and what it must have done in the end, once each."""

    begin: Callable[[World], Awaitable[None]]
    executed: tuple[str, ...]
    pods: int
    restart: Object


CASES = {
    "manual, in place": Case(begin_manual, ("InPlace",), 1, {}),
    "residual, recycle and then in place": Case(
        begin_residual, ("Recycle", "InPlace"), 1, {"residual": RESIDUAL}
    ),
    "manual, eviction": Case(begin_eviction, (), 2, {}),
}


def _notice_call(faults: Faults, when: str, path: str) -> None:
    if faults.notice(when, f"agent {path}") and when == "before":
        raise ConnectionResetError("the call never arrived")


async def play(world: World, case: Case, faults: Faults, kubeconfig: Path) -> None:
    """Begin the restart, let the operator be killed, start another, and look at the outcome."""
    doomed = await world.start(kubeconfig=kubeconfig)
    faults.kill = doomed.kill
    await world.create(workload(**case.restart))
    await world.until_ready()
    for agent in world.kubelet.agents:
        agent.on_call = partial(_notice_call, faults)
    faults.armed = True
    await case.begin(world)

    async def is_over() -> bool:
        restarts = await world.restarts()
        return faults.killed or any(one.get("status", {}).get("outcome") for one in restarts)

    await eventually(is_over, "the kill or the end of the restart", 120)
    if faults.killed:
        assert await doomed.wait() != 0
        # Another Lease, so as not to wait for the dead one's to run out.
        await world.start(f"--lease-name=next-{secrets.token_hex(3)}")
    (restart,) = await world.until_finished(timeout_seconds=120)
    where = f"killed {faults.when} step {faults.kill_at} of {faults.steps}"
    assert restart["status"]["outcome"] == "Recovered", (where, restart["status"])
    assert [step for _, step in world.kubelet.executed] == list(case.executed), where
    assert len({restart_id for restart_id, _ in world.kubelet.executed}) == len(case.executed)
    assert len(world.kubelet.history) == case.pods, where


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_killed_after_any_step_a_restart_is_done_exactly_once(
    case: Case, server: str, control_plane_kubeconfig: Path, tmp_path: Path
) -> None:
    async def attempt(kill_at: int, when: str) -> Faults:
        faults = Faults(kill_at=kill_at, when=when)
        proxy = FaultProxy(server, faults)
        folder = tmp_path / f"{when}-{kill_at}"
        folder.mkdir()
        await proxy.start()
        try:
            async with open_world(server, control_plane_kubeconfig, folder) as world:
                kubeconfig = proxy.write_kubeconfig(folder / "kubeconfig")
                await play(world, case, faults, kubeconfig)
        finally:
            await proxy.stop()
        return faults

    undisturbed = await attempt(0, "after")
    print(f"{len(undisturbed.steps)} steps: {undisturbed.steps}")
    assert len(undisturbed.steps) >= 4
    plans = [(number, "after") for number, _ in enumerate(undisturbed.steps, 1)]
    # Before a step is after the one before it, but for what the operator remembers; where it
    # reaches outside, that is tried as well.
    plans += [
        (number, "before")
        for number, step in enumerate(undisturbed.steps, 1)
        if step.rsplit("/", 1)[-1] in EFFECTS
    ]
    for start in range(0, len(plans), AT_A_TIME):
        outcomes = await asyncio.gather(
            *(attempt(*one) for one in plans[start : start + AT_A_TIME])
        )
        # A write that an event of the cluster made unnecessary may leave the last step out.
        assert all(one.killed or one.kill_at >= len(undisturbed.steps) - 1 for one in outcomes)


async def test_a_dead_apiserver_is_waited_for(
    server: str, control_plane_kubeconfig: Path, tmp_path: Path
) -> None:
    proxy = FaultProxy(server, Faults())
    await proxy.start()
    try:
        async with open_world(server, control_plane_kubeconfig, tmp_path) as world:
            kubeconfig = proxy.write_kubeconfig(tmp_path / "proxied")
            operator = await world.start(kubeconfig=kubeconfig)
            await world.create(workload())
            await world.until_ready()
            proxy.is_dead = True

            async def is_unready() -> bool:
                return (await operator.probe("/readyz"))[0] == 503

            async def has_stopped_acting() -> bool:
                return "not leading any more" in operator.log

            await eventually(is_unready, "not ready while the apiserver is dead")
            await eventually(has_stopped_acting, "nobody acts without the Lease")
            assert (await operator.probe("/healthz"))[0] == 200
            proxy.is_dead = False
            await eventually(operator.is_leading, "it leads again by itself", 60)
            await eventually(operator.is_ready, "ready again by itself", 60)
            assert operator.log.count("the apiserver does not answer") == 1
            assert world.kubelet.executed == []
            await begin_manual(world)
            await world.until_finished(timeout_seconds=60)
    finally:
        await proxy.stop()
