"""Reference mode: what is in the way of it is said once, with what, where and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vram_agent.protocol import AgentMode, HostMemoryPolicy, QueuePolicy, VramPolicy
from vram_operator.api import Condition, GpuRequest, PodTemplate
from vram_operator.core.condition_list import find_condition
from vram_operator.core.plan import PushConfig
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import Agent, PushAnswer, Snapshot

from tests.support.factories import (
    NOW,
    ago,
    make_agent,
    make_pod,
    make_reference_spec,
    make_snapshot,
    make_target,
    make_template_spec,
    make_workload,
)

POD = make_pod()
MODELS = make_template_spec().models


def referring(agent: Agent | None = None, spec: dict[str, Any] | None = None) -> Snapshot:
    workload = make_workload(spec=make_reference_spec(**(spec or {})))
    agents = (make_agent(POD),) if agent is None else (agent,)
    return make_snapshot(workload=workload, pods=(POD,), agents=agents)


def said(snapshot: Snapshot, type_: str) -> Condition:
    found = find_condition(plan(snapshot, NOW).conditions, type_)
    assert found is not None
    return found


def targeting(**target: Any) -> Snapshot:
    snapshot = referring()
    return replace(snapshot, target=make_target(snapshot.workload, **target))


@pytest.mark.parametrize(
    ("snapshot", "reason", "words"),
    [
        pytest.param(
            replace(referring(), target=None),
            "TargetNotFound",
            ["no Deployment step-audio in namespace lab", "looked for again"],
            id="nothing has the name",
        ),
        pytest.param(
            replace(referring(), target=None, namesake_kind="StatefulSet"),
            "TargetNotFound",
            ["there is a StatefulSet of that name", "anew with targetRef.kind StatefulSet"],
            id="the other kind has the name",
        ),
        pytest.param(
            targeting(template_labels={"vram.dev/workload": "other"}),
            "MissingLabel",
            ["vram.dev/workload: speech", "carries 'other' instead", "spec.template.metadata"],
            id="its pods carry the label of another workload",
        ),
        pytest.param(
            targeting(owner_kind="GPUModelWorkload", owner_name="step-audio"),
            "Conflicted",
            ["run by the template of GPUModelWorkload step-audio", "delete this one"],
            id="another workload runs it",
        ),
    ],
)
def test_what_is_wrong_with_a_target(snapshot: Snapshot, reason: str, words: list[str]) -> None:
    accepted = said(snapshot, "Accepted")
    assert (accepted.status, accepted.reason) == ("False", reason)
    assert [word for word in words if word not in accepted.message] == []
    # Nothing tells us when another object is mended.
    assert plan(snapshot, NOW).requeue_at == ago(-15)


@pytest.mark.parametrize(
    ("pod", "agent", "reason", "words"),
    [
        pytest.param(
            replace(POD, control_port=0),
            Agent(pod_uid=POD.uid),
            "NoControlPort",
            ["speech-a", "named control", "vram.dev/control-port", "pod template"],
            id="nobody knows where its agent listens",
        ),
        pytest.param(
            POD,
            Agent(pod_uid=POD.uid, error="http://10.0.0.1:8001 does not answer: refused"),
            "AgentSilent",
            ["no fresh report from speech-a", "vram-agent runs there", "10.0.0.1:8001"],
            id="nobody answers there",
        ),
        pytest.param(
            POD,
            make_agent(POD, mode=AgentMode.RUN, config_generation=0),
            "ConfigRefused",
            ["speech-a", "wraps an application", "leave spec.models out"],
            id="it wraps an application and can take no models",
        ),
        pytest.param(
            POD,
            make_agent(
                POD,
                mode=AgentMode.EMBED,
                config_generation=1,
                push=PushAnswer(generation=3, at=ago(5), status=400, message="has no whisper"),
            ),
            "ConfigRefused",
            ["speech-a: has no whisper"],
            id="the application registers other models itself",
        ),
    ],
)
def test_what_is_wrong_with_an_agent(pod: Any, agent: Agent, reason: str, words: list[str]) -> None:
    snapshot = replace(referring(agent, {"models": MODELS}), pods=(pod,))
    reporting = said(snapshot, "AgentsReporting")
    assert (reporting.status, reporting.reason) == ("False", reason)
    assert [word for word in words if word not in reporting.message] == []


def test_a_wrapped_application_needs_no_models() -> None:
    agent = make_agent(POD, mode=AgentMode.RUN, config_generation=0)
    assert said(referring(agent), "AgentsReporting").status == "True"


@pytest.mark.parametrize(
    ("spec", "unsent"),
    [
        pytest.param({}, "", id="nothing is asked for"),
        pytest.param({"vram": VramPolicy(warn_above="10Gi")}, "", id="a warning is the operator's"),
        pytest.param({"vram": VramPolicy(budget="9Gi")}, "vram of the spec", id="a budget is not"),
        pytest.param(
            {
                "queue": QueuePolicy(max_depth=9),
                "host_memory": HostMemoryPolicy(budget="9Gi"),
            },
            "hostMemory, queue of the spec",
            id="nor are these",
        ),
        pytest.param(
            {"queue": QueuePolicy(max_depth=9), "models": MODELS}, "", id="models bring them along"
        ),
    ],
)
def test_what_is_sent_to_no_agent_is_said(spec: dict[str, Any], unsent: str) -> None:
    accepted = said(referring(spec=spec), "Accepted")
    assert accepted.status == "True"
    assert accepted.message.startswith(unsent)
    assert bool(accepted.message) is bool(unsent)


# --- what is pushed -------------------------------------------------------------------------------


def pushed(snapshot: Snapshot) -> list[PushConfig]:
    return [one for one in plan(snapshot, NOW).actions if isinstance(one, PushConfig)]


@pytest.mark.parametrize(
    ("mode", "count"), [(AgentMode.SERVE, 1), (AgentMode.EMBED, 1), (AgentMode.RUN, 0)]
)
def test_models_go_to_agents_that_have_models(mode: AgentMode, count: int) -> None:
    agent = make_agent(POD, mode=mode, config_generation=2)
    assert len(pushed(referring(agent, {"models": MODELS}))) == count


def test_a_running_agent_is_not_sent_what_only_its_pod_can_have() -> None:
    """The ConfigMap has it, for the pods that the change of the template brings."""
    partial = {"terminationGracePeriodSeconds": 300}
    template = PodTemplate(gpu=GpuRequest(count=0), spec=partial)
    spec = make_template_spec(template=template, queue=QueuePolicy(max_depth=7))
    agent = make_agent(POD, config_generation=2)
    snapshot = make_snapshot(workload=make_workload(spec=spec), pods=(POD,), agents=(agent,))
    (push,) = pushed(snapshot)
    assert push.config.queue.max_depth == 7
    assert push.config.device == "Auto"
    assert push.config.drain.grace_seconds == 25
