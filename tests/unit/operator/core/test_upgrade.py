"""A new operator restarts nothing: what another version wrote still counts as written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from vram_agent.protocol import AgentConfig, VramPolicy
from vram_operator.api import GpuRequest, PodTemplate, TemplateMetadata, WorkloadSpec, decode
from vram_operator.core import resources, upkeep
from vram_operator.core.plan import EnsureObject
from vram_operator.core.planning import plan
from vram_operator.core.resources import make_config_map, template_hash
from vram_operator.core.sparse import encode_sparsely

from tests.support.factories import (
    NOW,
    make_settings,
    make_snapshot,
    make_target,
    make_template_spec,
    make_workload,
)

PLAIN = PodTemplate()
FULL = PodTemplate(
    image="agent:1",
    gpu=GpuRequest(count=2),
    spec={"containers": [{"name": "agent", "resources": {"limits": {"memory": "4Gi"}}}]},
    metadata=TemplateMetadata(labels={"team": "speech"}),
)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        pytest.param(PLAIN, "44136fa355b3678a", id="nothing but defaults"),
        pytest.param(FULL, "4903c51686f9a96b", id="something of everything"),
    ],
)
def test_a_hash_that_an_older_operator_wrote_is_the_hash_of_today(
    template: PodTemplate, written: str
) -> None:
    """Another value here rolls every pod of every workload at the upgrade."""
    assert template_hash(template) == written


def test_a_default_that_is_written_out_is_the_default() -> None:
    gpu = {"resource": "nvidia.com/gpu", "count": 1}
    spelt = decode({"replicas": 1, "image": "", "gpu": gpu, "spec": {}}, PodTemplate)
    assert template_hash(spelt) == template_hash(PLAIN)


def test_replicas_are_no_part_of_it() -> None:
    assert template_hash(PodTemplate(replicas=7)) == template_hash(PLAIN)


def render_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be an operator that gives each agent one more variable and another probe."""
    render = resources.make_deployment

    def make_deployment(*arguments: Any) -> dict[str, Any]:
        manifest = render(*arguments)
        agent = manifest["spec"]["template"]["spec"]["containers"][0]
        agent["env"].append({"name": "NEW_IN_THIS_VERSION", "value": "1"})
        agent["readinessProbe"]["periodSeconds"] = 2
        return manifest

    monkeypatch.setattr(upkeep, "make_deployment", make_deployment)


def ensured(spec: Any, applied: PodTemplate) -> list[dict[str, Any]]:
    workload = make_workload(spec=spec)
    annotations = {resources.CONTENT_HASH_ANNOTATION: template_hash(applied)}
    snapshot = make_snapshot(workload=workload, settings=make_settings(agent_image="agent:next"))
    snapshot = replace(snapshot, target=make_target(workload, annotations=annotations))
    actions = plan(snapshot, NOW).actions
    return [
        one.manifest
        for one in actions
        if isinstance(one, EnsureObject) and one.manifest["kind"] == "Deployment"
    ]


def test_what_a_new_operator_would_render_otherwise_rolls_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    render_otherwise(monkeypatch)
    assert ensured(make_template_spec(template=PLAIN), applied=PLAIN) == []


@pytest.mark.parametrize(
    ("template", "written"),
    [
        pytest.param({}, "6bbb1d9084a6919a", id="nothing but defaults"),
        pytest.param(
            {"gpu": {"resource": "nvidia.com/gpu", "count": 1}},
            "d9d7f660640b4e91",
            id="a default that somebody wrote out",
        ),
    ],
)
def test_what_the_first_builds_applied_is_not_applied_again(
    template: dict[str, Any], written: str
) -> None:
    workload = make_workload(spec=make_template_spec(template=decode(template, PodTemplate)))
    target = make_target(workload, annotations={resources.CONTENT_HASH_ANNOTATION: written})
    snapshot = replace(make_snapshot(workload=workload), target=target)
    ensured = [one for one in plan(snapshot, NOW).actions if isinstance(one, EnsureObject)]
    assert ensured == []


def test_it_comes_with_the_next_change_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    render_otherwise(monkeypatch)
    (manifest,) = ensured(make_template_spec(template=FULL), applied=PLAIN)
    agent = manifest["spec"]["template"]["spec"]["containers"][0]
    assert agent["env"][-1]["name"] == "NEW_IN_THIS_VERSION"


def test_agents_of_the_last_version_can_read_the_config_of_this_one() -> None:
    """They refuse fields that they do not know; so only those are written that somebody set."""
    spec = make_template_spec(vram=VramPolicy(budget="9Gi"))
    (text,) = make_config_map(make_workload(spec=spec))["data"].values()
    assert json.loads(text) == {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "AgentConfig",
        "metadata": {"generation": 3},
        "models": [{"name": "whisper", "runtime": "Whisper", "source": "/models/tiny.pt"}],
        "vram": {"budget": "9Gi"},
    }


def test_what_nobody_set_is_not_written_at_any_depth_and_free_forms_stay() -> None:
    assert encode_sparsely(AgentConfig()) == {}
    spec = make_template_spec(
        template=PodTemplate(spec={"volumes": [], "affinity": {}, "hostNetwork": False})
    )
    written = encode_sparsely(spec)
    assert written["template"] == {"spec": {"volumes": [], "affinity": {}, "hostNetwork": False}}
    assert decode(written, WorkloadSpec) == spec
