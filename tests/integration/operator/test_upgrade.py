"""A next version of the operator, which would make other pods, takes over: no pod restarts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.operator.client import APPS, VRAM, Object, eventually
from tests.integration.operator.next_version import NEW_VARIABLE
from tests.integration.operator.world import NAME, World, workload

pytestmark = pytest.mark.control_plane

NEXT = {"module": "tests.integration.operator.next_version"}


async def what_runs(world: World) -> Object:
    """All that a restart or a rollout would change."""
    deployment = await world.deployment()
    assert deployment is not None
    return {
        "template": deployment["spec"]["template"],
        "pods": sorted(
            (
                one["metadata"]["uid"],
                one["metadata"]["labels"]["pod-template-hash"],
                one["status"]["containerStatuses"][0]["restartCount"],
            )
            for one in await world.pods()
        ),
    }


async def generation_of(world: World) -> Any:
    found = await world.deployment()
    assert found is not None
    return found["metadata"]["generation"]


async def test_an_upgrade_rolls_nothing_until_the_template_changes(world: World) -> None:
    first = await world.start()
    await world.create(workload(schedule="0 3 * * *", residual={"threshold": "8Gi"}))
    await world.until_ready()
    before, generation = await what_runs(world), await generation_of(world)
    assert await first.terminate() == 0

    await world.start("--agent-image=agent:next", **NEXT)
    # It works on this workload: a new config arrives.
    path = world.client.path(VRAM, "gpumodelworkloads", NAME)
    await world.client.merge(path, {"spec": {"queue": {"maxDepth": 7}}})

    async def is_pushed() -> bool:
        return any(config.queue.max_depth == 7 for config in world.kubelet.agents[0].configs)

    await eventually(is_pushed, "the next version's config in the running agent")
    # What others add to the Deployment is no reason to write it anew.
    own = world.client.path(APPS, "deployments", NAME)
    await world.client.merge(own, {"metadata": {"labels": {"team": "speech"}}})
    await world.client.merge(own, {"spec": {"minReadySeconds": 0, "revisionHistoryLimit": 3}})
    await world.client.merge(path, {"spec": {"queue": {"maxDepth": 8}}})

    async def is_pushed_again() -> bool:
        return any(config.queue.max_depth == 8 for config in world.kubelet.agents[0].configs)

    await eventually(is_pushed_again, "another visit after it")
    assert await what_runs(world) == before
    # The history's limit was the test's own change.
    assert await generation_of(world) == generation + 1
    assert len(world.kubelet.history) == 1
    assert world.kubelet.executed == []

    # What is new comes with the next change of the template.
    await world.client.merge(path, {"spec": {"template": {"metadata": {"labels": {"a": "b"}}}}})

    async def is_rolled() -> bool:
        pods = await world.pods()
        return any(
            NEW_VARIABLE in pod["spec"]["containers"][0]["env"]
            and pod["spec"]["containers"][0]["image"] == "agent:next"
            for pod in pods
        )

    await eventually(is_rolled, "a pod as the next version makes it", 60)
