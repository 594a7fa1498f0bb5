"""The operator with real agents: real leaks, real recycles, a real exit of PID 1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.operator.client import Object, eventually
from tests.integration.operator.real_agents import LEAKY, RealAgent, leak, real_agents
from tests.integration.operator.world import World, manual_restart, workload

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(300)]


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


async def leak_in(world: World, mebibytes: int) -> None:
    """Have the model of the one pod keep memory."""
    (one,) = world.kubelet.running.values()
    await leak(one.ip, mebibytes)


async def test_a_leak_is_recycled_away_and_measured(real_world: World) -> None:
    residual = {"threshold": "256Mi", "forSeconds": 1, "minSamples": 2}
    await real_world.start()
    await real_world.create(leaky_workload(residual=residual))
    await real_world.until_ready()
    await leak_in(real_world, 400)
    (restart,) = await real_world.until_finished(timeout_seconds=90)

    status = restart["status"]
    assert status["outcome"] == "Recovered", status
    assert [one["method"] for one in status["attempts"]] == ["Recycle"]
    (one,) = real_world.kubelet.history
    assert isinstance(one.container, RealAgent)
    assert one.container.exits == []
    await leak_in(real_world, 1)


async def test_a_restart_in_place_ends_pid_1_once_and_the_pod_serves_again(
    real_world: World,
) -> None:
    await real_world.start()
    await real_world.create(leaky_workload())
    await real_world.until_ready()
    await leak_in(real_world, 1)
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
        await leak_in(real_world, 1)
        return True

    await eventually(serves, "the pod serves again")
