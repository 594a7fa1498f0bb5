"""Reading what the apiserver sends, and writing what it takes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from vram_operator.api import (
    Condition,
    ConditionStatus,
    EventReason,
    LastRestart,
    Reason,
    RestartMethod,
    RestartOutcome,
    RestartSpec,
    RestartStatus,
    RestartTrigger,
    TargetKind,
    WorkloadCondition,
    WorkloadSpec,
    WorkloadStatus,
    decode,
    encode,
)

MODEL = {"name": "whisper", "runtime": "Whisper", "source": "/models/large-v3.pt"}


def test_a_spec_is_read_with_the_same_defaults_as_the_apiserver_fills_in() -> None:
    spec = decode({"targetRef": {"kind": "Deployment", "name": "a"}}, WorkloadSpec)
    assert spec.target_ref is not None
    assert spec.target_ref.kind is TargetKind.DEPLOYMENT
    assert (spec.restart.cooldown_seconds, spec.restart.time_zone) == (660, "Etc/UTC")
    assert spec.restart.residual is None
    assert spec.template is None


def test_fields_of_a_newer_version_are_passed_over_at_every_level() -> None:
    raw = {
        "new": 1,
        "template": {"new": 1, "gpu": {"count": 2, "new": 1}},
        "models": [{**MODEL, "new": 1, "residency": {"new": 1, "idleTier": "Disk"}}],
        "restart": {"residual": {"threshold": "8Gi", "new": 1}, "windows": []},
    }
    spec = decode(raw, WorkloadSpec)
    assert spec.template is not None
    assert spec.template.gpu.count == 2
    assert spec.models[0].residency.idle_tier == "Disk"
    assert spec.restart.residual is not None
    assert spec.restart.residual.threshold == "8Gi"


def test_free_form_parts_are_kept_as_they_are() -> None:
    options = {"a": {"b": [1, None]}, "loadsOn": "cuda"}
    pod = {"containers": [{"name": "agent", "unknownToUs": None}]}
    spec = decode(
        {"template": {"spec": pod}, "models": [{**MODEL, "options": options}]}, WorkloadSpec
    )
    assert spec.template is not None
    assert spec.template.spec == pod
    assert spec.models[0].options == options


def test_a_null_is_the_same_as_nothing() -> None:
    assert decode({"restart": None, "models": None}, WorkloadSpec) == WorkloadSpec()


@pytest.mark.parametrize("given", [2, "25%"])
def test_a_cap_is_a_number_or_a_percentage(given: int | str) -> None:
    assert (
        decode({"restart": {"maxUnavailable": given}}, WorkloadSpec).restart.max_unavailable
        == given
    )


def test_what_cannot_be_read_is_named_by_its_path() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.restart\.method"):
        decode({"restart": {"method": "Reboot"}}, WorkloadSpec)


def test_times_are_read_with_their_zone_and_written_in_whole_seconds_of_utc() -> None:
    raw = {
        "workload": "speech",
        "pod": {"name": "a"},
        "trigger": "Scheduled",
        "scheduledTime": "2026-11-24T19:00:00Z",
    }
    spec = decode(raw, RestartSpec)
    assert spec.scheduled_time == datetime(2026, 11, 24, 19, tzinfo=UTC)
    shanghai = datetime(2026, 11, 25, 3, 0, 0, 987654, timezone(timedelta(hours=8)))
    assert encode(RestartStatus(start_time=shanghai))["startTime"] == "2026-11-24T19:00:00Z"


def test_a_status_writes_zeros_and_leaves_out_what_is_unknown() -> None:
    written = encode(WorkloadStatus(target="Deployment/speech"))
    assert written["replicas"] == 0
    assert written["agents"] == {"expected": 0, "reporting": 0}
    assert "nextRestartTime" not in written
    assert "lastRestart" not in written
    assert "outcome" not in encode(RestartStatus())


def test_a_status_is_read_back_as_it_was_written() -> None:
    at = datetime(2026, 11, 24, 19, tzinfo=UTC)
    status = WorkloadStatus(
        observed_generation=3,
        conditions=[
            Condition(
                type=WorkloadCondition.READY,
                status=ConditionStatus.TRUE,
                reason=Reason.READY,
                last_transition_time=at,
            )
        ],
        last_restart=LastRestart(
            name="a",
            trigger=RestartTrigger.MANUAL,
            method=RestartMethod.EVICT,
            outcome=RestartOutcome.FAILED,
            time=at,
        ),
    )
    assert decode(encode(status), WorkloadStatus) == status


def test_every_event_reason_is_the_documented_one() -> None:
    assert list(EventReason) == [
        "Restarting",
        "Restarted",
        "RestartBlocked",
        "RestartNotRecovered",
        "RestartSkipped",
        "ResidualHigh",
        "VRAMHigh",
        "AgentSilent",
        "ModelFailed",
        "InvalidSchedule",
        "Conflicted",
    ]
