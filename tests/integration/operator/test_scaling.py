"""What people scale and roll: by kubectl, by an autoscaler, by a new template."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.integration.operator.client import APPS, VRAM, Object, eventually
from tests.integration.operator.world import NAME, World, workload

pytestmark = pytest.mark.control_plane

AUTOSCALING = "/apis/autoscaling/v2"
RESTARTED_AT = "kubectl.kubernetes.io/restartedAt"


def autoscaler(least: int) -> Object:
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": NAME},
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "vram.dev/v1alpha1",
                "kind": "GPUModelWorkload",
                "name": NAME,
            },
            "minReplicas": least,
            "maxReplicas": least + 1,
        },
    }


def reason_of(autoscaler: Object, kind: str) -> str:
    found = (autoscaler.get("status") or {}).get("conditions") or []
    return str(next((one["reason"] for one in found if one["type"] == kind), ""))


async def until_replicas(world: World, count: int) -> Object:
    """Wait until spec, Deployment and pods agree; returns the workload."""

    async def check() -> Object | None:
        found, deployment = await world.workload(), await world.deployment()
        assert found is not None
        assert deployment is not None
        figures = (
            found["spec"]["template"]["replicas"],
            deployment["spec"]["replicas"],
            found["status"].get("readyReplicas"),
        )
        return found if figures == (count, count, count) else None

    found = await eventually(check, f"{count} replicas everywhere", 60)
    assert found is not None
    return found


async def until_rolled(world: World, generation: int, **annotations: str) -> Object:
    """Wait for a rollout that ends with these annotations on the pods; returns the Deployment."""

    async def check() -> Object | None:
        found = await world.deployment()
        assert found is not None
        status, pods = found["status"], found["spec"]["template"]["metadata"]
        done = (
            found["metadata"]["generation"] > generation
            and status.get("observedGeneration") == found["metadata"]["generation"]
            and status.get("updatedReplicas") == status.get("availableReplicas") == 1
            and status.get("replicas") == 1
        )
        named = annotations.items() <= (pods.get("annotations") or {}).items()
        return found if done and named else None

    found = await eventually(check, f"a rollout beyond generation {generation}", 60)
    assert found is not None
    return found


async def test_what_people_scale_and_roll_stays_as_they_want_it(
    world: World, control_plane: Cluster
) -> None:
    async def kubectl(*arguments: str) -> Any:
        namespace = f"--namespace={world.client.namespace}"
        return await asyncio.to_thread(control_plane.kubectl, namespace, *arguments)

    await world.start()
    await world.create(workload())
    await world.until_ready()
    (first,) = {one["metadata"]["uid"] for one in await world.pods()}

    # A restart of the rollout rolls once, and no visit takes its mark away.
    await kubectl("rollout", "restart", f"deployment/{NAME}")
    rolled = await until_rolled(world, 1)
    stamp = rolled["spec"]["template"]["metadata"]["annotations"][RESTARTED_AT]
    (second,) = {one["metadata"]["uid"] for one in await world.pods()}
    assert second != first

    # So does a new template, which frees the GPU first and keeps the mark.
    path = world.client.path(VRAM, "gpumodelworkloads", NAME)
    annotated = {"metadata": {"annotations": {"team": "speech"}}}
    await world.client.merge(path, {"spec": {"template": annotated}})
    generation = rolled["metadata"]["generation"]
    rolled = await until_rolled(world, generation, team="speech", **{RESTARTED_AT: stamp})
    assert rolled["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    (third,) = {one["metadata"]["uid"] for one in await world.pods()}
    assert third not in {first, second}

    # Scaling rolls nothing, by hand or by an autoscaler without any metrics.
    await kubectl("scale", f"gmw/{NAME}", "--replicas=2")
    await until_replicas(world, 2)
    await world.client.create(AUTOSCALING, "horizontalpodautoscalers", autoscaler(3))
    await until_replicas(world, 3)
    assert third in {one["metadata"]["uid"] for one in await world.pods()}

    async def is_measured() -> bool:
        found = await world.client.find(AUTOSCALING, "horizontalpodautoscalers", NAME)
        # It found the pods by our selector, and only then missed the metrics server.
        return reason_of(found, "ScalingActive") == "FailedGetResourceMetric"

    await eventually(is_measured, "the autoscaler asks for the pods' metrics", 60)

    # What scales the Deployment past the workload is undone.
    await world.client.merge(
        world.client.path(APPS, "deployments", NAME), {"spec": {"replicas": 1}}
    )
    await until_replicas(world, 3)
    assert world.kubelet.executed == []
