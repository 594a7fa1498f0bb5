"""Status, scale and field selectors of the custom resources."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any

import pytest
from vram_operator import api as types

from tests.integration.crds.conftest import NAMESPACE, Answer, RawApi, collection
from tests.integration.crds.objects import pod_restart, referring, templated

pytestmark = pytest.mark.control_plane

GMW = "gpumodelworkloads"
GPR = "gpupodrestarts"
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def apply_status(api: RawApi, plural: str, name: str, status: Any) -> Answer:
    kind = {GMW: types.WORKLOAD_KIND, GPR: types.RESTART_KIND}[plural]
    body = {
        "apiVersion": types.API_VERSION,
        "kind": kind,
        "metadata": {"name": name},
        "status": types.encode(status),
    }
    path = f"{collection(plural)}/{name}/status?fieldManager=operator&force=true"
    return api.send("PATCH", f"{path}&fieldValidation=Strict", body, "application/apply-patch+yaml")


def condition(of: types.WorkloadCondition) -> types.Condition:
    return types.Condition(
        type=of,
        status=types.ConditionStatus.UNKNOWN,
        reason=types.Reason.PENDING,
        last_transition_time=NOON,
    )


FULL_STATUS = types.WorkloadStatus(
    observed_generation=1,
    conditions=[condition(one) for one in types.WorkloadCondition],
    selector="vram.dev/workload=speech",
    target="Deployment/speech",
    replicas=2,
    ready_replicas=1,
    agents=types.AgentCounts(expected=2, reporting=1),
    vram=types.VramFigures(
        used="12Gi",
        residual="512Mi",
        models="11Gi",
        trend=types.ResidualTrend(
            pod="speech-6c9f7d5b8-abcde",
            growth_per_hour="96Mi",
            threshold_time=NOON,
            out_of_memory_time=NOON,
        ),
    ),
    models=[types.ModelStatus(name="whisper", offloaded=1)],
    models_summary="0/1",
    next_restart_time=NOON,
    last_restart=types.LastRestart(
        name="speech-1a2b3c4d5e",
        trigger=types.RestartTrigger.RESIDUAL,
        method=types.RestartMethod.IN_PLACE,
        outcome=types.RestartOutcome.RECOVERED,
        reclaimed="5Gi",
        time=NOON,
    ),
)


def test_a_full_status_is_stored_and_read_back(api: RawApi) -> None:
    api.create(GMW, templated("full-status")).accepted()
    apply_status(api, GMW, "full-status", FULL_STATUS).accepted()
    stored = api.send("GET", f"{collection(GMW)}/full-status").accepted()
    assert types.decode(stored["status"], types.WorkloadStatus) == FULL_STATUS
    assert stored["metadata"]["generation"] == 1
    assert stored["status"]["lastRestart"]["time"] == "2026-11-24T12:00:00Z"


def test_the_same_status_again_is_no_change(api: RawApi) -> None:
    api.create(GMW, templated("same-status")).accepted()
    first = apply_status(api, GMW, "same-status", FULL_STATUS).accepted()
    second = apply_status(api, GMW, "same-status", FULL_STATUS).accepted()
    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


def test_an_empty_status_is_accepted(api: RawApi) -> None:
    api.create(GMW, referring("empty-status")).accepted()
    api.create(GPR, pod_restart("empty-status")).accepted()
    apply_status(api, GMW, "empty-status", types.WorkloadStatus()).accepted()
    apply_status(api, GPR, "empty-status", types.RestartStatus()).accepted()


def test_the_audit_record_of_a_restart_is_stored_and_read_back(api: RawApi) -> None:
    api.create(GPR, pod_restart("record")).accepted()
    status = types.RestartStatus(
        observed_generation=1,
        conditions=[
            types.Condition(
                type=one,
                status=types.ConditionStatus.TRUE,
                reason=types.Reason.RECOVERED,
                message="residual 3Mi",
                last_transition_time=NOON,
            )
            for one in types.RestartCondition
        ],
        outcome=types.RestartOutcome.RECOVERED,
        attempts=[
            types.Attempt(
                method=types.RestartMethod.RECYCLE,
                start_time=NOON,
                end_time=NOON,
                result=types.RestartOutcome.NOT_RECOVERED,
            ),
            types.Attempt(method=types.RestartMethod.IN_PLACE, start_time=NOON),
        ],
        before=types.MemoryFigures(used="14Gi", residual="9Gi", boot_id="a"),
        after=types.MemoryFigures(used="3Mi", residual="0", boot_id="b"),
        reclaimed="9Gi",
        downtime_seconds=4,
        start_time=NOON,
        completion_time=NOON,
    )
    apply_status(api, GPR, "record", status).accepted()
    stored = api.send("GET", f"{collection(GPR)}/record").accepted()["status"]
    assert types.decode(stored, types.RestartStatus) == status
    assert stored["before"]["bootID"] == "a"


def test_a_status_written_with_the_spec_is_dropped(api: RawApi) -> None:
    body = {**referring("no-status"), "status": {"replicas": 7}}
    assert "status" not in api.create(GMW, body).accepted()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        pytest.param(
            {"vram": {"used": "much"}}, "status.vram.used: Invalid value", id="no quantity"
        ),
        pytest.param(
            {"conditions": [{"type": "Ready", "status": "Maybe"}]},
            'status.conditions[0].status: Unsupported value: "Maybe"',
            id="a condition that is neither true nor false nor unknown",
        ),
        pytest.param({"replicas": -1}, "status.replicas: Invalid value", id="less than no pod"),
    ],
)
def test_a_broken_status_is_refused(api: RawApi, status: dict[str, Any], message: str) -> None:
    name = f"broken-{secrets.token_hex(4)}"
    api.create(GMW, referring(name)).accepted()
    path = f"{collection(GMW)}/{name}/status"
    answer = api.send("PATCH", path, {"status": status}, "application/merge-patch+json")
    assert message in answer.refusal()


def test_scaling_a_template_sets_its_replicas(api: RawApi) -> None:
    api.create(GMW, templated("scaled")).accepted()
    apply_status(api, GMW, "scaled", FULL_STATUS).accepted()
    path = f"{collection(GMW)}/scaled/scale"
    scale = api.send("GET", path).accepted()
    assert scale["spec"] == {"replicas": 1}
    assert scale["status"] == {"replicas": 2, "selector": "vram.dev/workload=speech"}
    scale["spec"]["replicas"] = 3
    api.send("PUT", path, scale).accepted()
    stored = api.send("GET", f"{collection(GMW)}/scaled").accepted()
    assert stored["spec"]["template"]["replicas"] == 3
    assert stored["metadata"]["generation"] == 2


def test_scaling_a_reference_is_refused_since_its_deployment_is_not_ours(api: RawApi) -> None:
    api.create(GMW, referring("unscalable")).accepted()
    path = f"{collection(GMW)}/unscalable/scale"
    body = {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {"name": "unscalable", "namespace": NAMESPACE},
        "spec": {"replicas": 2},
    }
    message = api.send("PUT", path, body).refusal()
    assert "set exactly one of spec.targetRef and spec.template" in message


def names(api: RawApi, plural: str, selector: str) -> set[str]:
    listed = api.send("GET", f"{collection(plural)}?fieldSelector={selector}").accepted()
    return {one["metadata"]["name"] for one in listed["items"]}


def test_workloads_are_found_by_their_target(api: RawApi) -> None:
    target = {"kind": "StatefulSet", "name": "chosen"}
    api.create(GMW, referring("selected", targetRef=target)).accepted()
    assert names(api, GMW, "spec.targetRef.name=chosen") == {"selected"}
    assert names(api, GMW, "spec.targetRef.kind=StatefulSet") == {"selected"}


def test_restarts_are_found_by_workload_pod_trigger_and_outcome(api: RawApi) -> None:
    for name, pod in (("open", "pod-1"), ("done", "pod-2")):
        spec = {"workload": "found", "pod": {"name": pod}, "trigger": "Residual"}
        api.create(GPR, pod_restart(f"found-{name}", **spec)).accepted()
    done = types.RestartStatus(outcome=types.RestartOutcome.RECOVERED)
    apply_status(api, GPR, "found-done", done).accepted()
    assert names(api, GPR, "spec.workload=found") == {"found-open", "found-done"}
    assert names(api, GPR, "spec.pod.name=pod-2") == {"found-done"}
    assert names(api, GPR, "spec.trigger=Residual") == {"found-open", "found-done"}
    assert names(api, GPR, "spec.workload=found,status.outcome=Recovered") == {"found-done"}
    assert names(api, GPR, "spec.workload=found,status.outcome=") == {"found-open"}
