"""Reference mode, refusals, and what the operator does with objects it cannot act on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.integration.operator.client import APPS, CORE, VRAM, Object, eventually
from tests.integration.operator.world import NAME, World, condition, manual_restart, workload
from tests.support.agents import GIB, Script

pytestmark = pytest.mark.control_plane

TARGET = "step-audio"


def referring(name: str = NAME, **restart: Any) -> Object:
    body = workload(**restart)
    body["metadata"]["name"] = name
    body["spec"] = {
        "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": TARGET},
        "restart": restart,
    }
    return body


def deployment(**labels: str) -> Object:
    """A Deployment of somebody else, with or without our label on its pods."""
    own = {"app": TARGET}
    container = {
        "name": "model",
        "image": "somebody/else:1",
        "ports": [{"name": "control", "containerPort": 8001}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": TARGET},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": own},
            "template": {
                "metadata": {"labels": {**own, **labels}},
                "spec": {"containers": [container]},
            },
        },
    }


async def test_a_target_of_somebody_else_is_watched_over(world: World) -> None:
    world.kubelet.scripts = lambda: Script(residual_bytes=9 * GIB)
    await world.client.create(APPS, "deployments", deployment(**{"vram.dev/workload": NAME}))
    await world.start()
    residual = {"threshold": "8Gi", "forSeconds": 1, "minSamples": 2}
    await world.create(referring(residual=residual))
    (restart,) = await world.until_finished()
    assert restart["status"]["outcome"] == "Recovered"
    found = await world.until_ready()
    assert found["status"]["target"] == f"Deployment/{TARGET}"
    # Nothing of it was touched, and nothing was made beside it but the keys.
    target = await world.client.find(APPS, "deployments", TARGET)
    managers = {one["manager"] for one in target["metadata"]["managedFields"]}
    assert "vram-operator" not in managers
    assert [one["metadata"]["name"] for one in await world.client.items(CORE, "services")] == []


async def test_a_target_without_the_label_is_not_accepted_until_it_has_it(world: World) -> None:
    await world.client.create(APPS, "deployments", deployment())
    await world.start()
    await world.create(referring())
    found = await world.until_condition("Accepted", "False")
    assert condition(found, "Accepted")["reason"] == "MissingLabel"

    labels = {"metadata": {"labels": {"vram.dev/workload": NAME}}}
    path = world.client.path(APPS, "deployments", TARGET)
    await world.client.merge(path, {"spec": {"template": labels}})
    await world.until_condition("Accepted", "True")


async def test_the_older_of_two_workloads_with_one_target_wins(world: World) -> None:
    await world.client.create(APPS, "deployments", deployment(**{"vram.dev/workload": NAME}))
    await world.start()
    await world.create(referring())
    await world.until_condition("Accepted", "True")
    # Creation times have whole seconds.
    await asyncio.sleep(1.1)
    await world.create(referring("rival"))

    async def is_conflicted() -> bool:
        rival = await world.client.find(VRAM, "gpumodelworkloads", "rival")
        return condition(rival, "Accepted").get("reason") == "Conflicted"

    await eventually(is_conflicted, "the younger is Conflicted")
    assert condition(await world.workload(), "Accepted")["status"] == "True"


async def test_a_foreign_deployment_of_the_same_name_is_left_alone(world: World) -> None:
    foreign = deployment()
    foreign["metadata"]["name"] = NAME
    await world.client.create(APPS, "deployments", foreign)
    await world.start()
    await world.create(workload())
    found = await world.until_condition("Accepted", "False")
    assert condition(found, "Accepted")["reason"] == "Conflicted"
    left = await world.deployment()
    assert left is not None
    assert left["spec"]["template"]["spec"]["containers"][0]["image"] == "somebody/else:1"


async def test_a_template_that_the_apiserver_refuses_is_told_and_can_be_mended(
    world: World,
) -> None:
    await world.start()
    body = workload()
    body["spec"]["template"]["spec"] = {"restartPolicy": "Sometimes"}
    await world.create(body)
    found = await world.until_condition("Accepted", "False")
    accepted = condition(found, "Accepted")
    assert accepted["reason"] in {"InvalidTemplate", "InvalidSpec"}
    assert "restartPolicy" in accepted["message"]

    path = world.client.path(VRAM, "gpumodelworkloads", NAME)
    await world.client.merge(path, {"spec": {"template": {"spec": {"restartPolicy": "Always"}}}})
    await world.until_ready()


async def test_a_restart_of_an_unknown_workload_waits_and_says_so(world: World) -> None:
    await world.start()
    await world.create(manual_restart("by-hand", "no-such-pod"))

    async def is_told() -> bool:
        (restart,) = await world.restarts()
        return condition(restart, "Admitted").get("reason") == "WorkloadNotFound"

    await eventually(is_told, "WorkloadNotFound")


async def test_finished_restarts_go_after_their_time_but_for_the_last(world: World) -> None:
    await world.start("--restart-ttl=2s")
    await world.create(workload())
    await world.until_ready()
    (pod,) = await world.pods()
    for name in ("first", "second"):
        await world.create(manual_restart(name, pod["metadata"]["name"], method="Recycle"))

        async def has_ended(name: str = name) -> bool:
            found = await world.client.find(VRAM, "gpupodrestarts", name)
            return found is None or bool(found.get("status", {}).get("outcome"))

        await eventually(has_ended, f"{name} has ended")

    async def is_alone() -> bool:
        return [one["metadata"]["name"] for one in await world.restarts()] == ["second"]

    await eventually(is_alone, "the first is gone")
    await asyncio.sleep(3)
    assert await is_alone()


async def test_one_operator_can_serve_all_namespaces(world: World) -> None:
    await world.start(all_namespaces=True)
    await world.create(workload())
    await world.until_ready()
