"""The operator with real agents: real leaks, real recycles, a real exit of PID 1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration.operator.client import Object, eventually
from tests.integration.operator.real_agents import MODELS, RealAgent, real_agents
from tests.integration.operator.world import World, manual_restart, workload

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(300)]

LEAKY = {
    "name": "leaky",
    "runtime": "Python",
    "source": "leaky:make",
    "options": {"path": str(MODELS)},
    # The GPU process stays after a task, and with it what it leaked.
    "residency": {"afterTask": "Keep", "offloadTier": "PinnedHost", "idleTimeoutSeconds": 0},
}


def leaky_workload(**restart: object) -> Object:
    body = workload(**restart)
    body["spec"]["models"] = [LEAKY]
    return body


@pytest.fixture
async def real_world(world: World, tmp_path: Path) -> AsyncIterator[World]:
    world.kubelet.make_container = real_agents(tmp_path)
    yield world
    for one in world.kubelet.history:
        print(f"--- agent of {one.pod['metadata']['name']}\n{one.container.log}")


async def leak(world: World, mebibytes: int) -> None:
    """Have the model keep memory, as a request would."""
    (one,) = world.kubelet.running.values()
    body = {
        "inputs": [{"name": "mebibytes", "shape": [1], "datatype": "INT64", "data": [mebibytes]}]
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{one.ip}:8000/v2/models/leaky/infer", json=body) as response,
    ):
        assert response.status == 200, await response.text()


async def test_a_leak_is_recycled_away_and_measured(real_world: World) -> None:
    residual = {"threshold": "256Mi", "forSeconds": 1, "minSamples": 2}
    await real_world.start()
    await real_world.create(leaky_workload(residual=residual))
    await real_world.until_ready()
    await leak(real_world, 400)
    (restart,) = await real_world.until_finished(timeout_seconds=90)

    status = restart["status"]
    assert status["outcome"] == "Recovered", status
    assert [one["method"] for one in status["attempts"]] == ["Recycle"]
    (one,) = real_world.kubelet.history
    assert isinstance(one.container, RealAgent)
    assert one.container.exits == []
    await leak(real_world, 1)


async def test_a_restart_in_place_ends_pid_1_once_and_the_pod_serves_again(
    real_world: World,
) -> None:
    await real_world.start()
    await real_world.create(leaky_workload())
    await real_world.until_ready()
    await leak(real_world, 1)
    (pod,) = await real_world.pods()
    await real_world.create(manual_restart("by-hand", pod["metadata"]["name"]))
    (restart,) = await real_world.until_finished(timeout_seconds=90)

    status = restart["status"]
    assert status["outcome"] == "Recovered", status
    assert status["before"]["bootID"] != status["after"]["bootID"]
    (one,) = real_world.kubelet.history
    assert one.container.exits == [0]
    assert one.restarts == 1

    async def serves() -> bool:
        await leak(real_world, 1)
        return True

    await eventually(serves, "the pod serves again")
