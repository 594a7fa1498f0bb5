"""Which GPUPodRestarts the apiserver takes, and what it says to the others."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from tests.integration.crds.conftest import RawApi
from tests.integration.crds.objects import pod_restart

pytestmark = pytest.mark.control_plane

GPR = "gpupodrestarts"
NIGHT = "2026-11-24T19:00:00Z"


@pytest.mark.parametrize(
    "restart",
    [
        pytest.param(pod_restart(), id="a person names workload and pod only"),
        pytest.param(pod_restart(pod={"name": "a", "uid": ""}), id="the uid may be empty"),
        pytest.param(pod_restart(trigger="Residual", reason="9Gi above 8Gi"), id="a residual one"),
        pytest.param(
            pod_restart(trigger="Scheduled", scheduledTime=NIGHT),
            id="a scheduled one with its time",
        ),
        pytest.param(pod_restart(method="Delete", drainTimeoutSeconds=0), id="the hardest one"),
    ],
)
def test_is_accepted(api: RawApi, restart: dict[str, Any]) -> None:
    assert api.try_create(GPR, restart).accepted()["spec"]["workload"] == "speech"


@pytest.mark.parametrize(
    ("restart", "message"),
    [
        pytest.param(
            pod_restart(trigger="Scheduled"),
            "spec.scheduledTime is required with trigger Scheduled",
            id="a scheduled one without its time",
        ),
        pytest.param(
            pod_restart(scheduledTime=NIGHT),
            "spec.scheduledTime goes with trigger Scheduled only",
            id="a manual one with a time",
        ),
        pytest.param(
            pod_restart(trigger="Residual", scheduledTime=NIGHT),
            "spec.scheduledTime goes with trigger Scheduled only",
            id="a residual one with a time",
        ),
        pytest.param(
            pod_restart(trigger="Scheduled", scheduledTime="tomorrow"),
            "spec.scheduledTime in body must be of type date-time",
            id="a time that is none",
        ),
        pytest.param(
            pod_restart(trigger="Whim"),
            'spec.trigger: Unsupported value: "Whim": supported values: "Scheduled", "Residual", '
            '"Manual"',
            id="an unknown trigger",
        ),
        pytest.param(
            pod_restart(method="Reboot"),
            'spec.method: Unsupported value: "Reboot"',
            id="an unknown method",
        ),
        pytest.param(
            pod_restart(drainTimeoutSeconds=86_401),
            "spec.drainTimeoutSeconds in body should be less than or equal to 86400",
            id="a drain of more than a day",
        ),
        pytest.param(pod_restart(pod={}), "spec.pod.name: Required value", id="no pod"),
        pytest.param(
            pod_restart(workload=""),
            "spec.workload in body should be at least 1 chars long",
            id="no workload",
        ),
        pytest.param(
            pod_restart(reason="x" * 1025),
            "spec.reason: Too long: may not be more than 1024",
            id="a reason that is a novel",
        ),
        pytest.param(pod_restart(force=True), 'unknown field "spec.force"', id="an unknown field"),
    ],
)
def test_is_refused_with_a_message(api: RawApi, restart: dict[str, Any], message: str) -> None:
    assert message in api.try_create(GPR, restart).refusal()


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param({"method": "Evict"}, id="to another method"),
        pytest.param({"pod": {"uid": "6c9f"}}, id="to another pod"),
        pytest.param({"reason": "because"}, id="to another reason"),
        pytest.param({"drainTimeoutSeconds": None}, id="back to a default"),
    ],
)
def test_a_stored_spec_does_not_change(api: RawApi, patch: dict[str, Any]) -> None:
    name = f"immutable-{secrets.token_hex(4)}"
    api.create(GPR, pod_restart(name, drainTimeoutSeconds=10)).accepted()
    message = api.merge(GPR, name, {"spec": patch}).refusal()
    assert "spec is immutable; create another GPUPodRestart" in message


def test_a_name_is_taken_once(api: RawApi) -> None:
    assert api.create(GPR, pod_restart("lock-0123456789")).code == 201
    second = api.create(GPR, pod_restart("lock-0123456789", method="Evict"))
    assert (second.code, second.body["reason"]) == (409, "AlreadyExists")
