"""Whose pods are whose, and what counts as a rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vram_operator.core.plan import CreateRestart
from vram_operator.core.planning import plan
from vram_operator.core.targets import is_of_another, is_rolling_out, say_rollout
from vram_operator.pods import read_target

from tests.support.factories import (
    NOW,
    make_agent,
    make_pod,
    make_reference_spec,
    make_snapshot,
    make_target,
    make_workload,
)

REFERENCE = make_workload(spec=make_reference_spec())
DEPLOYMENT = make_target(REFERENCE)
STATEFUL_SET = make_target(REFERENCE, kind="StatefulSet")


def pod_of(kind: str, name: str, template_hash: str = "") -> Any:
    labels = {"vram.dev/workload": "speech", "pod-template-hash": template_hash}
    return make_pod(owner_kind=kind, owner_name=name, labels=labels)


@pytest.mark.parametrize(
    ("pod", "target", "expected"),
    [
        pytest.param(pod_of("ReplicaSet", "step-audio-6c9f", "6c9f"), DEPLOYMENT, False, id="own"),
        pytest.param(
            pod_of("ReplicaSet", "copied-6c9f", "6c9f"), DEPLOYMENT, True, id="another Deployment's"
        ),
        pytest.param(
            pod_of("ReplicaSet", "by-hand"), DEPLOYMENT, False, id="a ReplicaSet that was adopted"
        ),
        pytest.param(
            pod_of("ReplicaSet", f"{'a' * 242}-6c9f", "6c9f"),
            replace(DEPLOYMENT, name="a" * 250),
            False,
            id="a name that was cut",
        ),
        pytest.param(pod_of("Job", "step-audio"), DEPLOYMENT, True, id="a Job's"),
        pytest.param(pod_of("", ""), DEPLOYMENT, False, id="nobody's: its label counts"),
        pytest.param(pod_of("StatefulSet", "step-audio"), STATEFUL_SET, False, id="own, numbered"),
        pytest.param(pod_of("StatefulSet", "step"), STATEFUL_SET, True, id="another StatefulSet's"),
        pytest.param(
            pod_of("ReplicaSet", "step-audio-6c9f", "6c9f"),
            STATEFUL_SET,
            True,
            id="a Deployment's beside a StatefulSet",
        ),
    ],
)
def test_a_pod_of_another_controller_is_told_apart(pod: Any, target: Any, expected: bool) -> None:
    assert is_of_another(pod, target) is expected


def test_a_pod_of_another_deployment_with_our_label_is_left_alone_and_named() -> None:
    own = pod_of("ReplicaSet", "step-audio-6c9f", "6c9f")
    stray = replace(pod_of("ReplicaSet", "copied-1a2b", "1a2b"), name="copied-1a2b-x", uid="stray")
    agents = tuple(make_agent(pod, 9.0) for pod in (own, stray))
    snapshot = make_snapshot(
        workload=REFERENCE,
        pods=(own, stray),
        agents=agents,
        target=make_target(REFERENCE, replicas=1),
    )
    planned = plan(snapshot, NOW)
    decided = [one for one in planned.actions if isinstance(one, CreateRestart)]
    assert [one.manifest["spec"]["pod"]["uid"] for one in decided] == [own.uid]
    assert (planned.status.ready_replicas, planned.status.agents.expected) == (1, 1)
    accepted = planned.conditions[0]
    assert (accepted.type, accepted.status) == ("Accepted", "True")
    assert "copied-1a2b-x" in accepted.message
    assert "left alone" in accepted.message


def raw(kind: str, status: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "metadata": {"name": "step-audio", "uid": "t", "generation": 2},
        "spec": {"replicas": 3, "template": {}, **spec},
        "status": {"observedGeneration": 2, "replicas": 3, "availableReplicas": 3, **status},
    }


@pytest.mark.parametrize(
    ("found", "rolls"),
    [
        pytest.param(raw("Deployment", {"updatedReplicas": 3}), False, id="all are updated"),
        pytest.param(raw("Deployment", {"updatedReplicas": 1}), True, id="two are to come"),
        pytest.param(raw("StatefulSet", {"updatedReplicas": 1}), True, id="two more, in order"),
        pytest.param(
            raw(
                "StatefulSet",
                {"updatedReplicas": 1},
                updateStrategy={"type": "RollingUpdate", "rollingUpdate": {"partition": 2}},
            ),
            False,
            id="a partition keeps two as they are",
        ),
        pytest.param(
            raw(
                "StatefulSet",
                {"updatedReplicas": 0},
                updateStrategy={"type": "RollingUpdate", "rollingUpdate": {"partition": 2}},
            ),
            True,
            id="the one beyond the partition is to come",
        ),
        pytest.param(
            raw("StatefulSet", {"updatedReplicas": 0}, updateStrategy={"type": "OnDelete"}),
            False,
            id="people update them one by one",
        ),
        pytest.param(raw("Deployment", {}, replicas=0), True, id="three are to go"),
    ],
)
def test_a_rollout_is_what_goes_on_by_itself(found: dict[str, Any], rolls: bool) -> None:
    assert is_rolling_out(read_target(found)) is rolls


def test_a_paused_rollout_says_how_it_goes_on() -> None:
    target = read_target(raw("Deployment", {"updatedReplicas": 1}, paused=True))
    assert is_rolling_out(target)
    assert "kubectl rollout resume deployment/step-audio" in say_rollout(target)
