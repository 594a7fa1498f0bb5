"""One run of restarts with faults on the way: what was asked for, and what was really done.

Called by the tests for one run of each kind, and by ``python -m bench faults`` for many.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from tests.integration.operator.client import VRAM, eventually
from tests.integration.operator.conftest import open_world
from tests.integration.operator.faults import FaultProxy, Faults
from tests.integration.operator.weather import KINDS, Storm
from tests.integration.operator.world import World, manual_restart, workload
from tests.support.agents import GIB

RESIDUAL = {"threshold": "8Gi", "forSeconds": 0, "minSamples": 1}
PATIENCE_SECONDS = 150
CALM = "Recovered"


@dataclass(frozen=True)
class Cluster:
    """Where the apiserver is, and a folder for this run."""

    server: str
    kubeconfig: Path
    folder: Path


@dataclass(frozen=True)
class Tally:
    """``asked`` restarts, of which ``lost`` never ended and ``double`` were done again."""

    asked: int
    lost: int
    double: int
    faults: int
    outcomes: tuple[str, ...]


async def run_storm(cluster: Cluster, kind: str, seed: int) -> Tally:
    """Restart one pod for its leak and another by hand, and kill the operator in between."""
    storm = Storm(KINDS[kind], seed)
    proxy = FaultProxy(cluster.server, Faults())
    cluster.folder.mkdir(parents=True, exist_ok=True)
    await proxy.start()
    try:
        async with open_world(cluster.server, cluster.kubeconfig, cluster.folder) as world:
            kubeconfig = proxy.write_kubeconfig(cluster.folder / "kubeconfig")
            return await _play(world, proxy, storm, kubeconfig)
    finally:
        await proxy.stop()


async def _play(world: World, proxy: FaultProxy, storm: Storm, kubeconfig: Path) -> Tally:
    first = await world.start(kubeconfig=kubeconfig)
    body = workload(residual=RESIDUAL)
    body["spec"]["template"]["replicas"] = 2
    await world.create(body)
    await world.until_ready()
    proxy.weather = storm
    leaking, other = world.kubelet.agents
    leaking.script.residual_bytes = 9 * GIB
    await world.create(manual_restart("by-hand", other.pod.name))
    proxy.cut_watches()
    await eventually(lambda: _has_begun(world), "a restart was carried out", PATIENCE_SECONDS)
    first.kill()
    await first.wait()
    # Another Lease, so as not to wait for the dead one's to run out.
    second = world.make(f"--lease-name=next-{secrets.token_hex(3)}", kubeconfig=kubeconfig)
    await second.start()
    await eventually(lambda: _is_over(world), "both restarts have ended", PATIENCE_SECONDS)
    return await _count(world, storm)


async def _has_begun(world: World) -> bool:
    return bool(world.kubelet.executed)


async def _is_over(world: World) -> bool:
    ended = [one for one in await world.restarts() if (one.get("status") or {}).get("outcome")]
    return len(ended) >= 2


async def _count(world: World, storm: Storm) -> Tally:
    restarts = await world.client.items(VRAM, "gpupodrestarts")
    outcomes = tuple(str((one.get("status") or {}).get("outcome", "")) for one in restarts)
    executed = world.kubelet.executed
    # One recycle for the leak and one exit for the restart by hand: what is beyond was done twice.
    double = len(executed) - len({step for _, step in executed})
    lost = 2 - sum(outcome == CALM for outcome in outcomes)
    return Tally(2, max(0, lost), double + max(0, len(restarts) - 2), storm.count, outcomes)
