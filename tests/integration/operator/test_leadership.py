"""Two replicas: who acts, when the other one begins, and what is left when nobody is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from tests.integration.operator.client import APPS, CORE, VRAM, Object, eventually
from tests.integration.operator.faults import FaultProxy, Faults
from tests.integration.operator.processes import Operator
from tests.integration.operator.weather import NoLease, NoWatch
from tests.integration.operator.world import NAME, World, manual_restart, workload

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(300)]

LEASES = "/apis/coordination.k8s.io/v1"


@pytest.fixture
async def proxy(server: str) -> AsyncIterator[FaultProxy]:
    opened = FaultProxy(server, Faults())
    await opened.start()
    yield opened
    await opened.stop()


async def lease(world: World) -> Object:
    (found,) = await world.client.items(LEASES, "leases")
    spec: Object = found["spec"]
    return spec


async def two_replicas(world: World, kubeconfig: Path) -> tuple[Operator, Operator]:
    """Start a leader that goes through the proxy, and a standby that does not."""
    first = await world.start(kubeconfig=kubeconfig)
    await eventually(first.is_leading, "the first leads")
    second = await world.start()
    await world.create(workload())
    await world.until_ready()
    return first, second


async def restart_by_hand(world: World, name: str) -> None:
    (pod,) = await world.pods()
    await world.create(manual_restart(name, pod["metadata"]["name"]))


async def test_a_leader_killed_in_the_middle_of_a_restart_is_followed_and_it_is_done_once(
    world: World, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = await two_replicas(world, proxy.write_kubeconfig(tmp_path / "proxied"))
    (agent,) = world.kubelet.agents
    agent.on_call = partial(_kill_after, first)
    await restart_by_hand(world, "by-hand")
    (restart,) = await world.until_finished(timeout_seconds=90)
    assert not first.is_alive
    assert await second.is_leading()
    assert restart["status"]["outcome"] == "Recovered"
    assert [step for _, step in world.kubelet.executed] == ["InPlace"]


def _kill_after(operator: Operator, when: str, _path: str) -> None:
    if when == "after":
        operator.kill()


async def test_a_leader_that_cannot_renew_has_stopped_before_the_other_begins(
    world: World, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = await two_replicas(world, proxy.write_kubeconfig(tmp_path / "proxied"))
    before = await lease(world)
    weather = NoLease(is_on=True)
    proxy.weather = weather
    # It may still read and be told of everything: there is always something that it would do.
    numbers = iter(range(100))

    async def has_followed() -> bool:
        await restart_by_hand(world, f"by-hand-{next(numbers)}")
        await asyncio.sleep(0.5)
        now = await lease(world)
        return bool(now["holderIdentity"] != before["holderIdentity"])

    await eventually(has_followed, "the second has taken the Lease", 60)
    taken = datetime.fromisoformat((await lease(world))["acquireTime"])
    await eventually(second.is_leading, "the second leads")
    assert proxy.changes, "the first did nothing at all"
    late = [(at, step) for at, step in proxy.changes if at >= taken]
    assert not late, "the first acted when the second could"
    ids = [restart_id for restart_id, _ in world.kubelet.executed]
    assert len(ids) == len(set(ids))

    # It sees that another one leads, and ends; its kubelet starts it again as a standby.
    weather.is_on = False
    assert await first.wait(30) == 1


async def test_stale_watches_make_a_replica_unready_and_it_comes_back(
    world: World, proxy: FaultProxy, tmp_path: Path
) -> None:
    operator = await world.start(kubeconfig=proxy.write_kubeconfig(tmp_path / "proxied"))
    weather = NoWatch(is_on=True)
    proxy.weather = weather
    proxy.cut_watches()

    async def says_why() -> bool:
        status, text = await operator.probe("/readyz")
        return status == 503 and "nothing from the watch of" in text

    await eventually(says_why, "stale watches make it unready", 60)
    assert (await operator.probe("/healthz"))[0] == 200
    assert await operator.is_leading()
    weather.is_on = False
    await eventually(operator.is_ready, "it is ready again by itself", 90)
    await world.create(workload())
    await world.until_ready()


async def test_without_the_operator_pods_serve_on_and_nothing_holds_an_object_back(
    world: World,
) -> None:
    operator = await world.start()
    await world.create(workload())
    await world.until_ready()
    await restart_by_hand(world, "by-hand")
    await world.until_finished()
    await world.until_ready()
    pods = await world.pods()
    assert await operator.terminate() == 0
    assert (await lease(world))["holderIdentity"] == ""

    made = [
        await world.workload() or {},
        *await world.restarts(),
        *await world.client.items(APPS, "deployments"),
        *await world.client.items(CORE, "services"),
        await world.client.find(CORE, "configmaps", NAME),
    ]
    assert [one["metadata"].get("finalizers") for one in made] == [None] * len(made)
    assert [one["metadata"]["uid"] for one in await world.pods()] == [
        one["metadata"]["uid"] for one in pods
    ]
    (running,) = world.kubelet.running.values()
    url = f"http://{running.ip}:8001/report"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200

    # Nobody is needed to take it all away again either.
    await world.client.delete(VRAM, "gpumodelworkloads", NAME, propagationPolicy="Background")

    async def is_empty() -> bool:
        return not (
            await world.client.items(APPS, "deployments")
            or await world.client.items(CORE, "services")
            or [one for one in await world.restarts() if one["metadata"].get("ownerReferences")]
        )

    await eventually(is_empty, "owner references have taken everything along", 60)
