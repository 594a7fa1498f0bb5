"""What is said of a workload: reasons, figures that stay quiet, and the Events of changes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from msgspec import structs
from vram_agent.protocol import ModelState, ResidualSource, VramPolicy
from vram_operator.api import (
    TRUST_CONFIG_MAP,
    Condition,
    PodTemplate,
    RestartMethod,
    RestartOutcome,
    RestartStatus,
    Window,
    WorkloadStatus,
    decode,
    encode,
)
from vram_operator.core.plan import EmitEvent, EnsureObject, PatchWorkloadStatus, Plan
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import OwnedObject, PushAnswer, Rival, Snapshot

from tests.support.factories import (
    NOW,
    ago,
    make_agent,
    make_model,
    make_pod,
    make_policy,
    make_reference_spec,
    make_restart,
    make_settings,
    make_snapshot,
    make_target,
    make_template_spec,
    make_workload,
)

A, B = make_pod("speech-a"), make_pod("speech-b")
ALL = [
    "Accepted",
    "Ready",
    "AgentsReporting",
    "ResidualHigh",
    "VRAMHigh",
    "Restarting",
    "RestartBlocked",
    "Degraded",
]


def condition(planned: Plan, type_: str) -> Condition:
    return next(one for one in planned.conditions if one.type == type_)


def said(snapshot: Snapshot, type_: str) -> tuple[str, str]:
    found = condition(plan(snapshot, NOW), type_)
    return found.status, found.reason


def after(snapshot: Snapshot, planned: Plan) -> Snapshot:
    """The snapshot once the status was written and read back."""
    status = decode(encode(planned.status), WorkloadStatus)
    return replace(snapshot, workload=replace(snapshot.workload, status=status))


def test_all_conditions_are_there_from_the_first_visit_on_with_their_generation() -> None:
    planned = plan(make_snapshot(), NOW)
    assert [one.type for one in planned.conditions] == ALL
    assert {one.observed_generation for one in planned.conditions} == {3}
    assert planned.status.observed_generation == 3


def template(**fields: Any) -> dict[str, Any]:
    return {"workload": make_workload(spec=make_template_spec(**fields))}


REFERENCE = make_workload(spec=make_reference_spec())
FOREIGN = OwnedObject(kind="Service", name="speech", owner_uid="someone")


def made(planned: Plan) -> set[str]:
    """The names of the objects that a plan makes or mends."""
    return {
        one.manifest["metadata"]["name"] for one in planned.actions if isinstance(one, EnsureObject)
    }


def test_a_target_that_comes_later_finds_the_keys_in_its_namespace() -> None:
    planned = plan(make_snapshot(workload=REFERENCE, target=None, objects=()), NOW)
    assert condition(planned, "Accepted").reason == "TargetNotFound"
    assert made(planned) == {TRUST_CONFIG_MAP}


@pytest.mark.parametrize(
    ("snapshot", "reason", "message"),
    [
        pytest.param(make_snapshot(), "Accepted", "", id="a good template"),
        pytest.param(make_snapshot(workload=REFERENCE), "Accepted", "", id="a good reference"),
        pytest.param(
            make_snapshot(**template(restart=make_policy(schedule="0 3 * *"))),
            "InvalidSchedule",
            "restart.schedule: '0 3 * *' does not have five fields",
            id="a schedule that does not parse",
        ),
        pytest.param(
            make_snapshot(
                **template(restart=make_policy(windows=[Window(schedule="x", duration_seconds=60)]))
            ),
            "InvalidSchedule",
            "restart.windows[0].schedule",
            id="a window that does not parse",
        ),
        pytest.param(
            make_snapshot(**template(restart=make_policy(method=RestartMethod.DELETE))),
            "DeleteNotAllowed",
            "--allow-delete",
            id="delete without leave",
        ),
        pytest.param(
            make_snapshot(workload=REFERENCE, target=None),
            "TargetNotFound",
            "there is no Deployment step-audio",
            id="a target that is not there",
        ),
        pytest.param(
            make_snapshot(
                workload=REFERENCE, target=make_target(REFERENCE, template_labels={"app": "x"})
            ),
            "MissingLabel",
            "vram.dev/workload: speech",
            id="a target whose pods lack the label",
        ),
        pytest.param(
            make_snapshot(
                workload=REFERENCE, rivals=(Rival(name="elder", created=ago(90 * 86_400)),)
            ),
            "Conflicted",
            "GPUModelWorkload elder is older",
            id="an older workload names the same target",
        ),
        pytest.param(
            make_snapshot(workload=REFERENCE, rivals=(Rival(name="younger", created=ago(60)),)),
            "Accepted",
            "",
            id="a younger one does not take it",
        ),
        pytest.param(
            make_snapshot(objects=(FOREIGN,)),
            "Conflicted",
            "Service speech exists",
            id="a foreign object has its name",
        ),
        pytest.param(
            make_snapshot(settings=make_settings(agent_image="")),
            "InvalidSpec",
            "--agent-image",
            id="no image anywhere",
        ),
        pytest.param(
            make_snapshot(**template(template=PodTemplate(spec={"containers": "x"}))),
            "InvalidSpec",
            "template.spec.containers",
            id="a template that is none",
        ),
    ],
)
def test_accepted(snapshot: Snapshot, reason: str, message: str) -> None:
    planned = plan(snapshot, NOW)
    found = condition(planned, "Accepted")
    assert found.reason == reason
    assert message in found.message
    assert found.status == ("True" if reason == "Accepted" else "False")
    if reason != "Accepted":
        assert condition(planned, "Ready").reason == "NotAccepted"
        assert {type(one) for one in planned.actions} <= {
            PatchWorkloadStatus,
            EmitEvent,
            EnsureObject,
        }
        assert made(planned) <= {TRUST_CONFIG_MAP}


@pytest.mark.parametrize(
    ("snapshot", "expected"),
    [
        pytest.param(make_snapshot(), ("True", "Ready"), id="all pods are ready"),
        pytest.param(
            make_snapshot(pods=(A, replace(B, ready=False))),
            ("False", "ReplicasNotReady"),
            id="one is not",
        ),
        pytest.param(make_snapshot(pods=()), ("True", "ScaledToZero"), id="none is wanted"),
        pytest.param(
            make_snapshot(
                pods=(A,),
                agents=(make_agent(A, models=[make_model(state=ModelState.FAILED, error="bad")]),),
            ),
            ("False", "ModelFailed"),
            id="a model is Failed",
        ),
    ],
)
def test_ready(snapshot: Snapshot, expected: tuple[str, str]) -> None:
    assert said(snapshot, "Ready") == expected


@pytest.mark.parametrize(
    ("snapshot", "expected"),
    [
        pytest.param(make_snapshot(), ("True", "Reporting"), id="all report"),
        pytest.param(make_snapshot(pods=()), ("Unknown", "NoAgents"), id="there are none"),
        pytest.param(
            make_snapshot(pods=(A, B), agents=(make_agent(A), make_agent(B, now=ago(91)))),
            ("False", "AgentSilent"),
            id="one is silent",
        ),
        pytest.param(
            make_snapshot(pods=(A, B), agents=(make_agent(A), make_agent(B, now=ago(89)))),
            ("True", "Reporting"),
            id="one is slow",
        ),
        pytest.param(
            make_snapshot(pods=(replace(A, agent_running_since=ago(5)),), agents=()),
            ("Unknown", "Pending"),
            id="one has just started",
        ),
        pytest.param(
            make_snapshot(pods=(A,), agents=(make_agent(A, refuses=True),)),
            ("False", "ControlRefused"),
            id="one does not take our word",
        ),
        pytest.param(
            make_snapshot(
                pods=(A,),
                agents=(
                    make_agent(
                        A,
                        config_generation=2,
                        push=PushAnswer(generation=3, at=NOW, status=400, message="no such model"),
                    ),
                ),
            ),
            ("False", "ConfigRefused"),
            id="one refuses its config",
        ),
    ],
)
def test_agents_reporting(snapshot: Snapshot, expected: tuple[str, str]) -> None:
    assert said(snapshot, "AgentsReporting") == expected


def test_an_agent_turns_silent_without_any_news() -> None:
    planned = plan(make_snapshot(), NOW)
    assert planned.requeue_at is not None
    found = condition(plan(make_snapshot(), planned.requeue_at), "AgentsReporting")
    assert found.reason == "AgentSilent"


@pytest.mark.parametrize(
    ("agent", "policy", "expected"),
    [
        pytest.param({}, {}, ("False", "BelowThreshold"), id="below"),
        pytest.param({"residual_gib": 9.0}, {}, ("True", "AboveThreshold"), id="above, proven"),
        pytest.param(
            {"residual_gib": 9.0, "idle": False},
            {},
            ("False", "CollectingEvidence"),
            id="above, at work",
        ),
        pytest.param(
            {"residual_gib": 9.0, "source": ResidualSource.UNKNOWN},
            {},
            ("Unknown", "NoEvidence"),
            id="above, of an unknown source",
        ),
        pytest.param(
            {"residual_gib": 9.0, "context_bytes": 9 * 1024**3},
            {},
            ("False", "ThresholdTooLow"),
            id="the context alone is above",
        ),
        pytest.param(
            {"residual_gib": 9.0}, {"residual": None}, ("False", "NoThreshold"), id="no threshold"
        ),
    ],
)
def test_residual_high(
    agent: dict[str, Any], policy: dict[str, Any], expected: tuple[str, str]
) -> None:
    snapshot = make_snapshot(
        **template(restart=make_policy(**policy)), pods=(A,), agents=(make_agent(A, **agent),)
    )
    assert said(snapshot, "ResidualHigh") == expected


def with_used(gib: float, status: WorkloadStatus | None = None) -> Snapshot:
    spec = make_template_spec(
        vram=VramPolicy(warn_above="10Gi"), restart=make_policy(residual=None)
    )
    workload = make_workload(spec=spec, status=status or WorkloadStatus())
    return make_snapshot(workload=workload, pods=(A,), agents=(make_agent(A, gib),))


def test_vram_high_goes_five_percent_below_before_it_is_over() -> None:
    high = plan(with_used(10.1), NOW)
    assert condition(high, "VRAMHigh").status == "True"
    assert [one.reason for one in high.events] == ["VRAMHigh"]
    still = plan(with_used(9.6, high.status), NOW)
    assert condition(still, "VRAMHigh").status == "True"
    assert still.events == ()
    assert condition(plan(with_used(9.4, high.status), NOW), "VRAMHigh").status == "False"


def test_sums_are_rounded_and_written_again_only_when_they_move_by_more_than_512mi() -> None:
    first = plan(with_used(5.1), NOW)
    assert (first.status.vram.used, first.status.vram.residual) == ("5Gi", "5Gi")
    small = plan(with_used(5.4, first.status), NOW)
    assert small.actions == ()
    assert small.status.vram.used == "5Gi"
    large = plan(with_used(5.6, first.status), NOW)
    assert large.status.vram.used == "5632Mi"
    assert [type(one) for one in large.actions] == [PatchWorkloadStatus]
    with_news = plan(with_used(10.2, first.status), NOW)
    assert with_news.status.vram.used == "10496Mi"


def test_a_transition_time_moves_only_with_the_status() -> None:
    snapshot = make_snapshot(pods=(A,), agents=(make_agent(A),))
    first = plan(snapshot, NOW)
    later = NOW + timedelta(seconds=60)
    high = replace(after(snapshot, first), agents=(make_agent(A, 9.0, later),))
    second = plan(high, later)
    assert condition(second, "ResidualHigh").last_transition_time == later
    assert condition(second, "Ready").last_transition_time == NOW


def test_models_are_counted_where_they_are() -> None:
    resident = make_model(state=ModelState.RESIDENT)
    failed = make_model(name="extra", state=ModelState.FAILED, error="no file")
    agents = (make_agent(A, models=[resident]), make_agent(B, models=[make_model(), failed]))
    status = plan(make_snapshot(pods=(A, B), agents=agents), NOW).status
    assert [(one.name, one.resident, one.offloaded, one.failed) for one in status.models] == [
        ("whisper", 1, 1, 0),
        ("extra", 0, 0, 1),
    ]
    assert status.models[1].message == "no file"
    assert status.models_summary == "1/3"


def test_an_agent_without_a_report_yet_still_shows_its_models() -> None:
    status = plan(make_snapshot(pods=(A,), agents=()), NOW).status
    assert [(one.name, one.resident) for one in status.models] == [("whisper", 0)]
    assert status.models_summary == "0/1"


def test_counts_target_and_selector() -> None:
    status = plan(make_snapshot(pods=(A, B)), NOW).status
    assert (status.target, status.selector) == ("Deployment/speech", "vram.dev/workload=speech")
    assert (status.replicas, status.ready_replicas) == (2, 2)
    assert (status.agents.expected, status.agents.reporting) == (2, 2)


def test_the_last_restart_stays_when_its_record_is_gone() -> None:
    ended = RestartStatus(
        outcome=RestartOutcome.RECOVERED, completion_time=ago(60), reclaimed="5Gi"
    )
    snapshot = make_snapshot(restarts=(make_restart(A, name="speech-1", status=ended),))
    first = plan(snapshot, NOW)
    assert first.status.last_restart is not None
    assert (first.status.last_restart.name, first.status.last_restart.reclaimed) == (
        "speech-1",
        "5Gi",
    )
    gone = replace(after(snapshot, first), restarts=())
    assert plan(gone, NOW).status.last_restart == first.status.last_restart


def test_restarting_and_blocked_name_the_restarts() -> None:
    agents = (make_agent(A, 9.0), make_agent(B, 9.0))
    snapshot = make_snapshot(
        pods=(A, B), agents=agents, restarts=(make_restart(A), make_restart(B))
    )
    planned = plan(snapshot, NOW)
    restarting = condition(planned, "Restarting")
    assert restarting.message == "speech-speech-a (Recycle of speech-a)"
    blocked = condition(planned, "RestartBlocked")
    assert (blocked.status, blocked.reason) == ("True", "MaxUnavailable")
    assert blocked.message == "speech-speech-b: 1 of at most 1 pods are unavailable: speech-a"
    assert [one.reason for one in planned.blocked] == ["MaxUnavailable"]


def test_a_residual_restart_outside_of_its_windows_is_blocked_before_it_exists() -> None:
    windows = [Window(schedule="0 1 * * *", duration_seconds=3600)]
    snapshot = make_snapshot(
        **template(restart=make_policy(windows=windows)), pods=(A,), agents=(make_agent(A, 9.0),)
    )
    planned = plan(snapshot, NOW)
    blocked = condition(planned, "RestartBlocked")
    assert (blocked.status, blocked.reason) == ("True", "OutsideWindow")
    assert "2026-11-24T01:00:00Z" in blocked.message
    assert planned.blocked[0].restart == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"restart": make_policy(schedule="x")}, "InvalidSchedule", id="schedule"),
        pytest.param({}, None, id="nothing is wrong"),
    ],
)
def test_events_come_once_when_a_reason_appears(
    changes: dict[str, Any], reason: str | None
) -> None:
    snapshot = make_snapshot(**template(**changes))
    first = plan(snapshot, NOW)
    assert [one.reason for one in first.events] == ([reason] if reason else [])
    assert plan(after(snapshot, first), NOW).events == ()


def test_the_next_run_is_announced_and_a_new_schedule_announces_anew() -> None:
    policy = make_policy(schedule="0 3 * * *", time_zone="Asia/Shanghai")
    snapshot = make_snapshot(**template(restart=policy))
    first = plan(snapshot, NOW)
    assert first.status.next_restart_time == NOW.replace(hour=19)
    changed = after(snapshot, first)
    spec = structs.replace(changed.workload.spec, restart=make_policy(schedule="30 11 * * *"))
    changed = replace(changed, workload=replace(changed.workload, spec=spec))
    second = plan(changed, NOW)  # half past eleven was half an hour ago, and nobody announced it
    assert second.status.next_restart_time == (NOW + timedelta(days=1)).replace(hour=11, minute=30)
    assert second.missed_run is None
