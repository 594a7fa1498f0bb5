"""A workload's life: what the operator makes, keeps and lets go; and the operator's own."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.operator.client import APPS, CORE, eventually
from tests.integration.operator.world import NAME, World, condition, workload

pytestmark = pytest.mark.control_plane


async def test_a_workload_becomes_a_deployment_whose_agents_report(world: World) -> None:
    operator = await world.start()
    await world.create(workload())
    ready = await world.until_ready()

    deployment = await world.deployment()
    assert deployment is not None
    rolling = deployment["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": 1}
    pod_spec = deployment["spec"]["template"]["spec"]
    assert pod_spec["automountServiceAccountToken"] is False
    assert pod_spec["containers"][0]["image"] == "agent:test"
    service = await world.client.find(CORE, "services", NAME)
    ports = {one["name"]: one["port"] for one in service["spec"]["ports"]}
    assert ports == {"http": 8000, "control": 8001}
    assert (await world.client.find(CORE, "configmaps", NAME))["data"]
    trust = await world.client.find(CORE, "configmaps", "vram-agent-trust")
    assert "BEGIN PUBLIC KEY" in trust["data"]["keys.pem"]
    for made in (deployment, service):
        owner = made["metadata"]["ownerReferences"][0]
        assert (owner["kind"], owner["name"]) == ("GPUModelWorkload", NAME)

    status = ready["status"]
    assert status["observedGeneration"] == 1
    assert (status["target"], status["replicas"]) == (f"Deployment/{NAME}", 1)
    assert status["agents"] == {"expected": 1, "reporting": 1}
    types = {one["type"] for one in status["conditions"]}
    assert types == {
        "Accepted",
        "Ready",
        "AgentsReporting",
        "ResidualHigh",
        "VRAMHigh",
        "Restarting",
        "RestartBlocked",
        "Degraded",
    }
    assert await operator.terminate() == 0


async def test_deleting_a_workload_leaves_nothing(world: World) -> None:
    await world.start()
    await world.create(workload())
    await world.until_ready()
    await world.client.delete(
        "/apis/vram.dev/v1alpha1", "gpumodelworkloads", NAME, propagationPolicy="Background"
    )

    async def is_empty() -> bool:
        left = [
            *await world.client.items(APPS, "deployments"),
            *await world.client.items(CORE, "services"),
            *await world.pods(),
            *await world.restarts(),
        ]
        return not left and await world.client.find(CORE, "configmaps", NAME) is None

    await eventually(is_empty, "nothing is left", 60)


async def test_a_deleted_service_comes_back(world: World) -> None:
    await world.start()
    await world.create(workload())
    await world.until_ready()
    await world.client.delete(CORE, "services", NAME)
    await eventually(lambda: world.client.find(CORE, "services", NAME), "the service is back")


async def test_a_changed_spec_is_pushed_to_running_agents_and_rolls_nothing(world: World) -> None:
    await world.start()
    await world.create(workload())
    await world.until_ready()
    pods = {one["metadata"]["uid"] for one in await world.pods()}
    path = world.client.path("/apis/vram.dev/v1alpha1", "gpumodelworkloads", NAME)
    await world.client.merge(path, {"spec": {"queue": {"maxDepth": 7}}})

    async def is_pushed() -> bool:
        return any(
            config.queue.max_depth == 7
            for agent in world.kubelet.agents
            for config in agent.configs
        )

    await eventually(is_pushed, "the agent has the new config")
    assert {one["metadata"]["uid"] for one in await world.pods()} == pods
    assert all(agent.refused == [] for agent in world.kubelet.agents)


async def test_an_operator_restart_restarts_and_writes_nothing(world: World) -> None:
    operator = await world.start()
    await world.create(workload(schedule="0 3 * * *", residual={"threshold": "8Gi"}))
    await world.until_ready()
    deployment = await world.deployment()
    assert await operator.terminate() == 0
    before = await world.workload()

    again = await world.start("--agent-image=agent:newer")
    await eventually(again.is_leading, "the next operator leads")
    await asyncio.sleep(3)
    after = await world.deployment()
    assert deployment is not None
    assert after is not None
    assert after["metadata"]["resourceVersion"] == deployment["metadata"]["resourceVersion"]
    assert await world.restarts() == []
    assert world.kubelet.executed == []
    status = await world.workload()
    assert status is not None
    assert before is not None
    assert status["status"]["conditions"] == before["status"]["conditions"]


async def test_a_silent_agent_restarts_nothing(world: World) -> None:
    await world.start()
    await world.create(workload(residual={"threshold": "1Gi", "forSeconds": 0, "minSamples": 1}))
    await world.until_ready()
    for one in world.kubelet.running.values():
        await one.container.stop()
    found = await world.until_condition("AgentsReporting", "False", 60)
    assert condition(found, "AgentsReporting")["reason"] == "AgentSilent"
    assert await world.restarts() == []


async def test_a_lost_leader_is_replaced_and_a_stopped_one_at_once(world: World) -> None:
    first = await world.start()
    await eventually(first.is_leading, "the first leads")
    second = await world.start()
    assert await second.is_leading() is False
    await world.create(workload())
    await world.until_ready()

    assert await first.terminate() == 0
    await eventually(second.is_leading, "the second leads soon after a clean stop", 8)
    third = await world.start()
    second.kill()
    await eventually(third.is_leading, "the third leads once the Lease ran out", 40)
    await world.until_ready()
    assert world.kubelet.executed == []
