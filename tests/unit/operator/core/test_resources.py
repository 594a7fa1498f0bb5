"""The generated objects: what a person relies on in them, and when they are applied again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from msgspec import structs
from vram_agent.protocol import AgentConfig, AgentMode, VramPolicy
from vram_operator.api import GpuRequest, PodTemplate, TemplateMetadata
from vram_operator.core.plan import EnsureObject, PushConfig
from vram_operator.core.planning import plan
from vram_operator.core.podspec import InvalidTemplateError, merge_pod_spec
from vram_operator.core.resources import (
    make_agent_config,
    make_config_map,
    make_deployment,
    make_service,
)
from vram_operator.core.snapshot import PushAnswer, Snapshot

from tests.support.factories import (
    NOW,
    ago,
    make_agent,
    make_pod,
    make_reference_spec,
    make_settings,
    make_snapshot,
    make_target,
    make_template_spec,
    make_workload,
)


def deployment(**fields: Any) -> dict[str, Any]:
    template = PodTemplate(**fields)
    workload = make_workload(spec=make_template_spec(template=template))
    return make_deployment(workload, template, "image:1")


def container(**fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = deployment(**fields)["spec"]["template"]["spec"]["containers"][0]
    return found


def test_a_deployment_frees_the_gpu_before_it_takes_another() -> None:
    spec = deployment(replicas=3)["spec"]
    assert spec["replicas"] == 3
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    assert spec["selector"] == {"matchLabels": {"vram.dev/workload": "speech"}}


def test_pods_pass_the_restricted_profile_and_hold_no_token() -> None:
    spec = deployment()["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_agent_finds_its_names_ports_probes_and_folders() -> None:
    agent = container()
    assert agent["name"] == "agent"
    assert agent["image"] == "image:1"
    assert [one["name"] for one in agent["env"]] == [
        "POD_NAME",
        "POD_NAMESPACE",
        "POD_UID",
        "NODE_NAME",
    ]
    assert [(one["name"], one["containerPort"]) for one in agent["ports"]] == [
        ("http", 8000),
        ("control", 8001),
    ]
    assert agent["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "control"}
    assert agent["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "control"}
    mounts = {one["mountPath"]: one["name"] for one in agent["volumeMounts"]}
    volumes = {one["name"]: one for one in deployment()["spec"]["template"]["spec"]["volumes"]}
    assert volumes[mounts["/etc/vram-agent"]]["configMap"] == {
        "name": "vram-agent-trust",
        "optional": True,
    }
    assert volumes[mounts["/var/lib/vram-agent"]]["emptyDir"] == {}
    assert volumes[mounts["/tmp"]]["emptyDir"] == {}
    config = agent["args"][-1].rpartition("/")[0]
    assert volumes[mounts[config]]["configMap"] == {"name": "speech"}


@pytest.mark.parametrize(
    ("gpu", "resources", "device"),
    [
        pytest.param(
            GpuRequest(),
            {"limits": {"nvidia.com/gpu": "1"}},
            "Auto",
            id="one GPU unless said otherwise",
        ),
        pytest.param(
            GpuRequest(resource="nvidia.com/mig-1g.10gb", count=2),
            {"limits": {"nvidia.com/mig-1g.10gb": "2"}},
            "Auto",
            id="two slices of another resource",
        ),
        pytest.param(GpuRequest(count=0), None, "CPU", id="none runs on the CPU"),
    ],
)
def test_a_gpu_is_asked_for_by_count(gpu: GpuRequest, resources: object, device: str) -> None:
    workload = make_workload(spec=make_template_spec(template=PodTemplate(gpu=gpu)))
    assert container(gpu=gpu).get("resources") == resources
    assert make_agent_config(workload).device == device


def test_every_object_belongs_to_the_workload() -> None:
    workload = make_workload()
    for manifest in (make_config_map(workload), make_service(workload), deployment()):
        (owner,) = manifest["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("GPUModelWorkload", "workload-uid")
        assert owner["controller"] is True
        assert manifest["metadata"]["labels"]["vram.dev/workload"] == "speech"
        assert manifest["metadata"]["name"] == "speech"


def test_the_config_map_holds_a_config_that_the_agent_reads_back() -> None:
    spec = make_template_spec(
        vram=VramPolicy(budget="10Gi"),
        template=PodTemplate(spec={"terminationGracePeriodSeconds": 60}),
    )
    text = make_config_map(make_workload(spec=spec, generation=7))["data"]["config.yaml"]
    config = msgspec.json.decode(text, type=AgentConfig)
    assert (json.loads(text)["kind"], config.metadata.generation) == ("AgentConfig", 7)
    assert config.vram.budget == "10Gi"
    assert config.drain.grace_seconds == 55
    assert [model.name for model in config.models] == ["whisper"]


def test_labels_and_annotations_of_the_template_reach_the_pods_and_ours_wins() -> None:
    metadata = TemplateMetadata(
        labels={"team": "a", "vram.dev/workload": "other"}, annotations={"note": "b"}
    )
    found = deployment(metadata=metadata)["spec"]["template"]["metadata"]
    assert found == {
        "labels": {"team": "a", "vram.dev/workload": "speech"},
        "annotations": {"note": "b"},
    }


GENERATED = {
    "terminationGracePeriodSeconds": 30,
    "containers": [
        {
            "name": "agent",
            "image": "a",
            "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {}}}],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            "resources": {"limits": {"nvidia.com/gpu": "1"}},
        }
    ],
    "volumes": [{"name": "tmp", "emptyDir": {}}],
}


@pytest.mark.parametrize(
    ("partial", "path", "expected"),
    [
        pytest.param({}, ["volumes"], GENERATED["volumes"], id="nothing changes nothing"),
        pytest.param(
            {"containers": [{"name": "agent", "resources": {"limits": {"memory": "8Gi"}}}]},
            ["containers", 0, "resources", "limits"],
            {"nvidia.com/gpu": "1", "memory": "8Gi"},
            id="limits are added to the agent's",
        ),
        pytest.param(
            {"containers": [{"name": "proxy", "image": "p"}]},
            ["containers", 1],
            {"name": "proxy", "image": "p"},
            id="another container comes after it",
        ),
        pytest.param(
            {"containers": [{"name": "agent", "env": [{"name": "POD_NAME", "value": "x"}]}]},
            ["containers", 0, "env"],
            [{"name": "POD_NAME", "value": "x"}],
            id="a variable is replaced as a whole",
        ),
        pytest.param(
            {"volumes": [{"name": "tmp", "hostPath": {"path": "/x"}}]},
            ["volumes"],
            [{"name": "tmp", "hostPath": {"path": "/x"}}],
            id="a volume is replaced as a whole",
        ),
        pytest.param(
            {
                "containers": [
                    {"name": "agent", "volumeMounts": [{"name": "m", "mountPath": "/models"}]}
                ]
            },
            ["containers", 0, "volumeMounts", 1],
            {"name": "m", "mountPath": "/models"},
            id="a mount is added",
        ),
        pytest.param(
            {"containers": [{"name": "agent", "resources": None}]},
            ["containers", 0],
            {k: v for k, v in GENERATED["containers"][0].items() if k != "resources"},  # type: ignore[index]
            id="null removes",
        ),
        pytest.param(
            {"nodeSelector": {"gpu": "yes"}},
            ["nodeSelector"],
            {"gpu": "yes"},
            id="what was not generated is taken",
        ),
    ],
)
def test_a_partial_pod_spec_is_merged(
    partial: dict[str, Any], path: list[Any], expected: object
) -> None:
    before = json.dumps(GENERATED)
    found: Any = merge_pod_spec(GENERATED, partial)
    for step in path:
        found = found[step]
    assert found == expected
    assert json.dumps(GENERATED) == before


@pytest.mark.parametrize(
    ("partial", "said"),
    [
        pytest.param({"containers": {}}, "template.spec.containers must be a list", id="no list"),
        pytest.param(
            {"containers": [{"image": "x"}]}, "every item needs a name", id="no name to merge by"
        ),
        pytest.param(
            {"containers": [{"name": "agent", "resources": 4}]},
            "template.spec.containers[agent].resources must be an object",
            id="no object",
        ),
    ],
)
def test_what_is_no_partial_pod_spec_is_named(partial: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidTemplateError) as raised:
        merge_pod_spec(GENERATED, partial)
    assert said in str(raised.value)


# --- when it is applied -------------------------------------------------------------------------


def ensured(snapshot: Snapshot) -> list[str]:
    return [
        f"{one.manifest['kind']}/{one.manifest['metadata']['name']} by {one.field_manager}"
        for one in plan(snapshot, NOW).actions
        if isinstance(one, EnsureObject)
    ]


def test_a_new_workload_gets_its_objects_and_the_trust_of_its_namespace() -> None:
    snapshot = make_snapshot(pods=(), target=None, objects=())
    assert ensured(snapshot) == [
        "ConfigMap/vram-agent-trust by vram-operator",
        "ConfigMap/speech by vram-operator",
        "Service/speech by vram-operator",
        "Deployment/speech by vram-operator",
    ]


def test_what_is_applied_is_not_applied_again() -> None:
    assert ensured(make_snapshot()) == []


def test_a_new_operator_with_another_image_rolls_nothing() -> None:
    snapshot = replace(make_snapshot(), settings=make_settings(agent_image="another:2"))
    assert ensured(snapshot) == []


def test_a_changed_config_changes_the_config_map_and_not_the_deployment() -> None:
    before = make_snapshot()
    spec = structs.replace(before.workload.spec, vram=VramPolicy(budget="10Gi"))
    after = replace(before, workload=replace(before.workload, spec=spec, generation=4))
    assert ensured(after) == ["ConfigMap/speech by vram-operator"]


def test_another_number_of_replicas_scales_and_rolls_nothing() -> None:
    before = make_snapshot()
    template = PodTemplate(replicas=5)
    spec = structs.replace(before.workload.spec, template=template)
    after = replace(before, workload=replace(before.workload, spec=spec))
    (action,) = [one for one in plan(after, NOW).actions if isinstance(one, EnsureObject)]
    assert action.field_manager == "vram-operator-scale"
    assert action.manifest["spec"] == {"replicas": 5}


def test_another_template_is_applied() -> None:
    before = make_snapshot()
    spec = structs.replace(before.workload.spec, template=PodTemplate(image="mine:2"))
    after = replace(before, workload=replace(before.workload, spec=spec))
    assert ensured(after) == ["Deployment/speech by vram-operator"]


def test_in_reference_mode_only_the_trust_is_kept() -> None:
    workload = make_workload(spec=make_reference_spec())
    snapshot = make_snapshot(workload=workload, objects=())
    assert ensured(snapshot) == ["ConfigMap/vram-agent-trust by vram-operator"]


def test_a_refused_template_is_tried_again() -> None:
    before = make_snapshot()
    target = make_target(before.workload, annotations={})
    snapshot = replace(before, target=target, apply_error="spec.containers[0]: bad")
    assert ensured(snapshot) == ["Deployment/speech by vram-operator"]
    accepted = plan(snapshot, NOW).conditions[0]
    assert (accepted.reason, accepted.message) == ("InvalidTemplate", "spec.containers[0]: bad")


# --- when it is pushed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "pushed"),
    [
        pytest.param({}, False, id="an agent that has the config is left alone"),
        pytest.param({"config_generation": 2}, True, id="one with an old config is sent ours"),
        pytest.param(
            {"config_generation": 2, "mode": AgentMode.RUN},
            False,
            id="one that wraps has no models",
        ),
        pytest.param(
            {"config_generation": 2, "push": PushAnswer(generation=3, at=ago(5), status=200)},
            False,
            id="one that has just taken it is given time to report it",
        ),
        pytest.param(
            {"config_generation": 2, "push": PushAnswer(generation=3, at=ago(31), status=0)},
            True,
            id="one that was not reached is tried again",
        ),
        pytest.param(
            {"config_generation": 2, "push": PushAnswer(generation=3, at=ago(31), status=400)},
            False,
            id="one that refused is not asked at once",
        ),
        pytest.param(
            {"config_generation": 2, "push": PushAnswer(generation=2, at=ago(1), status=400)},
            True,
            id="one that refused the last generation is sent this one",
        ),
    ],
)
def test_a_config_is_pushed_where_another_generation_is_reported(
    fields: dict[str, Any], pushed: bool
) -> None:
    pod = make_pod()
    snapshot = make_snapshot(pods=(pod,), agents=(make_agent(pod, **fields),))
    pushes = [one for one in plan(snapshot, NOW).actions if isinstance(one, PushConfig)]
    assert bool(pushes) is pushed
    assert all(one.config.metadata.generation == 3 for one in pushes)


def test_in_reference_mode_models_are_pushed_when_there_are_some_and_only_then() -> None:
    pod = make_pod()
    agents = (make_agent(pod, config_generation=1),)
    models = make_template_spec().models
    for listed, count in (([], 0), (models, 1)):
        workload = make_workload(spec=make_reference_spec(models=listed))
        snapshot = make_snapshot(workload=workload, pods=(pod,), agents=agents)
        pushes = [one for one in plan(snapshot, NOW).actions if isinstance(one, PushConfig)]
        assert len(pushes) == count
