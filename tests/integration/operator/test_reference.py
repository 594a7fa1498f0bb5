"""Pods that someone else runs: a StatefulSet, agents of other modes, and what is in the way."""

from __future__ import annotations

from typing import Any

import pytest
from vram_agent.protocol import AgentMode

from tests.integration.operator.client import APPS, VRAM, Object, eventually
from tests.integration.operator.kubelet import Running
from tests.integration.operator.world import MODEL, NAME, World, condition, workload
from tests.support.agents import GIB, Script

pytestmark = pytest.mark.control_plane

RESIDUAL = {"threshold": "8Gi", "forSeconds": 1, "minSamples": 2}
CONTROL = {"name": "control", "containerPort": 8001}


def referring(kind: str, target: str, name: str = NAME, **spec: Any) -> Object:
    body = workload()
    body["metadata"]["name"] = name
    reference = {"apiVersion": "apps/v1", "kind": kind, "name": target}
    body["spec"] = {"targetRef": reference, **spec}
    return body


def target(kind: str, name: str, label: str = NAME, **spec: Any) -> Object:
    """A Deployment or StatefulSet of somebody else."""
    own = {"app": name}
    container = {"name": "model", "image": "somebody/else:1", "ports": [CONTROL]}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": own},
            "template": {
                "metadata": {"labels": {**own, "vram.dev/workload": label}},
                "spec": {"containers": [container]},
            },
            **spec,
        },
    }


async def test_a_stateful_set_of_wrapped_applications_is_watched_over(world: World) -> None:
    world.kubelet.scripts = lambda: Script(mode=AgentMode.RUN)
    by_hand: Object = {"serviceName": "", "updateStrategy": {"type": "OnDelete"}}
    await world.client.create(APPS, "statefulsets", target("StatefulSet", "asr", **by_hand))
    await world.start()
    policy = {"residual": RESIDUAL, "method": "Evict"}
    await world.create(referring("StatefulSet", "asr", restart=policy))
    found = await world.until_ready()
    assert found["status"]["target"] == "StatefulSet/asr"
    (before,) = await world.pods()

    # A template that nobody rolls out is no rollout to wait for.
    stamp = {"metadata": {"annotations": {"stamp": "1"}}}
    path = world.client.path(APPS, "statefulsets", "asr")
    await world.client.merge(path, {"spec": {"template": stamp}})
    world.kubelet.agents[0].script.residual_bytes = 9 * GIB
    (restart,) = await world.until_finished()

    assert restart["status"]["outcome"] == "Recovered"
    assert [one["method"] for one in restart["status"]["attempts"]] == ["Evict"]
    assert restart["status"]["before"]["residual"] == "9Gi"
    assert restart["status"]["after"]["residual"] == "0"
    (after,) = await world.pods()
    assert after["metadata"]["name"] == before["metadata"]["name"] == "asr-0"
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert [agent.configs for agent in world.kubelet.agents] == [[], []]


async def test_models_are_pushed_to_the_targets_own_pods_alone(world: World) -> None:
    world.kubelet.scripts = lambda: Script(residual_bytes=9 * GIB)
    for name in ("asr", "copied"):
        await world.client.create(APPS, "deployments", target("Deployment", name))
    await world.start()
    spec: Object = {"models": [MODEL], "queue": {"maxDepth": 7}, "restart": {"residual": RESIDUAL}}
    await world.create(referring("Deployment", "asr", **spec))
    (restart,) = await world.until_finished()
    assert restart["status"]["outcome"] == "Recovered"
    found = await world.until_condition("AgentsReporting", "True")

    def agent_of(app: str) -> Any:
        (one,) = [one for one in world.kubelet.history if app_of(one) == app]
        return one.container

    (config,) = agent_of("asr").configs
    assert [model.name for model in config.models] == ["whisper"]
    assert config.queue.max_depth == 7
    assert agent_of("copied").configs == []
    assert agent_of("copied").executed == []
    accepted = condition(found, "Accepted")
    assert accepted["status"] == "True"
    assert "copied-" in accepted["message"]
    assert found["status"]["agents"] == {"expected": 1, "reporting": 1}


def app_of(one: Running) -> str:
    return str(one.pod["metadata"]["labels"]["app"])


async def test_what_is_in_the_way_is_said_with_what_to_do(world: World) -> None:
    portless = target("Deployment", "portless", label="portless")
    del portless["spec"]["template"]["spec"]["containers"][0]["ports"]
    await world.client.create(APPS, "deployments", portless)
    await world.start()
    await world.create(workload())
    for body in (
        referring("Deployment", "portless", "portless"),
        referring("StatefulSet", "portless", "mistaken"),
        referring("Deployment", NAME, "second"),
    ):
        await world.create(body)

    async def told(name: str, kind: str, reason: str) -> str:
        async def check() -> str:
            found = await world.client.find(VRAM, "gpumodelworkloads", name)
            said = condition(found, kind)
            is_told = (said.get("status"), said.get("reason")) == ("False", reason)
            return str(said["message"]) if is_told else ""

        return await eventually(check, f"{kind}=False, {reason} of {name}", 60)

    assert "port is named control" in await told("portless", "AgentsReporting", "NoControlPort")
    assert "there is a Deployment of that name" in await told(
        "mistaken", "Accepted", "TargetNotFound"
    )
    assert f"GPUModelWorkload {NAME}" in await told("second", "Accepted", "Conflicted")
    await world.until_ready()
