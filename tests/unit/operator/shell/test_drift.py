"""What somebody changes of our objects is put back; what is not ours, or nobody's, is let be."""

from __future__ import annotations

from typing import Any

import pytest
from vram_operator.cache import trimmed
from vram_operator.facts import Facts
from vram_operator.kube import DEPLOYMENTS

PATH = DEPLOYMENTS.path("lab", "speech")
LABEL: dict[str, Any] = {"f:labels": {"f:vram.dev/workload": {}}}


def owning(manager: str, operation: str = "Apply", **spec: Any) -> dict[str, Any]:
    fields = {"f:metadata": LABEL, "f:spec": {f"f:{name}": value for name, value in spec.items()}}
    return {"manager": manager, "operation": operation, "time": "now", "fieldsV1": fields}


def deployment(*entries: dict[str, Any], **spec: Any) -> dict[str, Any]:
    metadata = {"name": "speech", "namespace": "lab", "managedFields": list(entries)}
    return trimmed(DEPLOYMENTS, {"metadata": metadata, "spec": spec})


OURS = owning("vram-operator", template={"f:image": {}}, replicas={})
APPLIED = deployment(OURS, template={"image": "agent:1"})


@pytest.mark.parametrize(
    ("seen", "drifted"),
    [
        pytest.param(APPLIED, False, id="nothing has changed"),
        pytest.param(
            deployment({**OURS, "time": "later"}, template={"image": "agent:1"}),
            False,
            id="we applied the same again",
        ),
        pytest.param(
            deployment(
                owning("vram-operator", template={}, replicas={}),
                owning("kubectl-edit", "Update", template={"f:image": {}}),
                template={"image": "mine:2"},
            ),
            True,
            id="somebody set another image",
        ),
        pytest.param(
            deployment(OURS, owning("kubectl-rollout", "Update", template={"f:restartedAt": {}})),
            False,
            id="somebody restarted the rollout",
        ),
        pytest.param(
            deployment(
                owning("vram-operator", template={"f:image": {}}),
                owning("vram-operator-scale", replicas={}),
                replicas=3,
            ),
            False,
            id="it was scaled",
        ),
        pytest.param(
            deployment(OURS, owning("argocd", "Update"), paused=True), False, id="a label was added"
        ),
        pytest.param(
            deployment(OURS, template={"image": "agent:1", "newDefault": "of the apiserver"}),
            False,
            id="the apiserver was upgraded",
        ),
        pytest.param(
            deployment(owning("kubectl", "Update"), template={"image": "agent:1"}),
            True,
            id="somebody made it anew",
        ),
    ],
)
def test_drift_is_what_was_ours_and_is_not_any_more(seen: dict[str, Any], drifted: bool) -> None:
    facts = Facts()
    facts.record_applied(PATH, APPLIED)
    assert facts.is_drifted(PATH, seen) is drifted
    assert facts.is_drifted(PATH, APPLIED) is False


def test_an_object_of_the_last_operator_is_taken_as_it_is_found() -> None:
    assert Facts().is_drifted(PATH, APPLIED) is False


def test_of_the_owners_of_fields_only_we_are_kept() -> None:
    seen = deployment(OURS, owning("kubectl", "Update"), owning("vram-operator", "Update"))
    assert seen["metadata"]["managedFields"] == [OURS]
    assert "managedFields" not in deployment(owning("kubectl", "Update"))["metadata"]
