"""Who is restarted for what, once, and under which name."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from vram_operator.api import (
    RestartMethod,
    RestartOutcome,
    RestartStatus,
    RestartTrigger,
    WorkloadStatus,
)
from vram_operator.core.plan import (
    AnnotateWorkload,
    CreateRestart,
    DeleteRestart,
    PatchRestartStatus,
)
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import Pod, Restart, Snapshot

from tests.support.factories import (
    LONG_AGO,
    NOW,
    ago,
    make_agent,
    make_pod,
    make_policy,
    make_restart,
    make_settings,
    make_snapshot,
    make_template_spec,
    make_workload,
)

A, B = make_pod("speech-a"), make_pod("speech-b")
FAILED, RECOVERED, SKIPPED = (
    RestartOutcome.FAILED,
    RestartOutcome.RECOVERED,
    RestartOutcome.SKIPPED,
)


def created(snapshot: Snapshot, now: datetime = NOW) -> list[dict[str, Any]]:
    actions = plan(snapshot, now).actions
    return [one.manifest for one in actions if isinstance(one, CreateRestart)]


def pods_of(manifests: list[dict[str, Any]]) -> list[str]:
    return [one["spec"]["pod"]["name"] for one in manifests]


def visited(snapshot: Snapshot, **annotations: str) -> Snapshot:
    """The snapshot of a workload that was seen before."""
    status = plan(snapshot, ago(3600)).status
    workload = replace(snapshot.workload, status=status, annotations=annotations)
    return replace(snapshot, workload=workload)


def ended(pod: Pod, outcome: RestartOutcome, seconds: float = 5000, **fields: Any) -> Restart:
    started = None if outcome is SKIPPED else ago(seconds + 10)
    status = RestartStatus(outcome=outcome, start_time=started, completion_time=ago(seconds))
    name = f"ended-{pod.name}-{seconds:.0f}"
    return make_restart(pod, name=name, created=ago(seconds + 20), status=status, **fields)


# --- residual -------------------------------------------------------------------------------------

LEAKING = make_snapshot(pods=(A,), agents=(make_agent(A, 9.0),))


def test_a_residual_restart_carries_its_evidence_and_its_owner() -> None:
    (manifest,) = created(LEAKING)
    assert manifest["spec"]["reason"] == (
        "residual 9Gi above 8Gi for 120 s (13 samples, source Exclusive)"
    )
    assert manifest["spec"]["pod"] == {"name": "speech-a", "uid": "uid-speech-a"}
    assert manifest["metadata"]["labels"] == {"vram.dev/workload": "speech"}
    assert manifest["metadata"]["ownerReferences"][0]["uid"] == "workload-uid"
    prefix, _, digest = manifest["metadata"]["name"].rpartition("-")
    assert prefix == "speech"
    assert len(digest) == 10
    assert set(digest) <= set("0123456789abcdef")


def name_with(**agent: Any) -> str:
    snapshot = replace(LEAKING, agents=(make_agent(A, **{"residual_gib": 9.0, **agent}),))
    (manifest,) = created(snapshot)
    return str(manifest["metadata"]["name"])


def test_the_name_follows_boot_and_epoch_and_nothing_that_moves() -> None:
    assert name_with() == name_with(now=ago(-10)) == name_with(residual_gib=11.0)
    assert len({name_with(), name_with(epoch=1), name_with(boot_id="other")}) == 3


@pytest.mark.parametrize("outcome", [SKIPPED, FAILED])
def test_the_next_restart_of_a_pod_has_another_name_even_in_the_same_boot(
    outcome: RestartOutcome,
) -> None:
    first = created(LEAKING)[0]["metadata"]["name"]
    second = created(replace(LEAKING, restarts=(ended(A, outcome),)))[0]["metadata"]["name"]
    assert first != second


def test_a_pod_with_an_open_restart_gets_no_other() -> None:
    assert created(replace(LEAKING, restarts=(make_restart(A),))) == []


def test_a_restart_that_ends_in_this_visit_is_not_followed_by_another_at_once() -> None:
    away = make_restart(A, method=RestartMethod.DELETE, created=ago(60))  # ends: not allowed
    status = RestartStatus(start_time=ago(50))
    snapshot = replace(LEAKING, restarts=(replace(away, status=status),))
    (write,) = [one for one in plan(snapshot, NOW).actions if isinstance(one, PatchRestartStatus)]
    assert write.finished is FAILED
    assert created(snapshot) == []


@pytest.mark.parametrize(
    ("outcomes", "decided"),
    [
        pytest.param([FAILED, FAILED], True, id="two failures are not yet three"),
        pytest.param([FAILED, FAILED, FAILED], False, id="three failures are enough"),
        pytest.param([FAILED, FAILED, RECOVERED, FAILED], True, id="one that helped starts anew"),
        pytest.param([FAILED, FAILED, SKIPPED, FAILED], False, id="a skipped one says nothing"),
    ],
)
def test_failures_in_a_row(outcomes: list[RestartOutcome], decided: bool) -> None:
    history = tuple(ended(A, one, 9000 - 1000 * n) for n, one in enumerate(outcomes))
    assert bool(created(replace(LEAKING, restarts=history))) is decided


def test_failures_under_another_spec_do_not_count() -> None:
    old = {"vram.dev/workload-generation": "2"}
    history = tuple(ended(A, FAILED, n, annotations=old) for n in (7000, 8000, 9000))
    assert pods_of(created(replace(LEAKING, restarts=history))) == ["speech-a"]


# --- manual ---------------------------------------------------------------------------------------


def handled(snapshot: Snapshot) -> list[str]:
    return [
        one.annotations["vram.dev/restart-handled"]
        for one in plan(snapshot, NOW).actions
        if isinstance(one, AnnotateWorkload)
    ]


TWO = make_snapshot(pods=(A, B))
HANDLED = "vram.dev/restart-handled"
ASKED = {"vram.dev/restart": "now"}


def test_a_new_value_asks_for_every_pod_and_is_handled() -> None:
    snapshot = visited(TWO, **ASKED)
    assert pods_of(created(snapshot)) == ["speech-a", "speech-b"]
    assert handled(snapshot) == ["now"]
    assert {one["spec"]["trigger"] for one in created(snapshot)} == {"Manual"}


def test_a_handled_value_asks_for_nothing() -> None:
    workload = replace(visited(TWO).workload, annotations={**ASKED, HANDLED: "now"})
    assert created(replace(TWO, workload=workload)) == []


def test_after_a_crash_only_the_pods_without_one_are_asked_for() -> None:
    first = ended(A, RECOVERED, 5, trigger=RestartTrigger.MANUAL, annotations=ASKED)
    snapshot = replace(visited(TWO, **ASKED), restarts=(first,))
    assert pods_of(created(snapshot)) == ["speech-b"]
    assert handled(snapshot) == ["now"]


def test_a_pod_that_came_after_the_first_one_was_decided_is_new_enough() -> None:
    first = ended(A, RECOVERED, 60, trigger=RestartTrigger.MANUAL, annotations=ASKED)
    younger = replace(B, created=ago(30), agent_running_since=ago(25))
    snapshot = replace(visited(TWO, **ASKED), pods=(A, younger), restarts=(first,))
    assert created(snapshot) == []
    assert handled(snapshot) == ["now"]


def test_a_pod_with_an_open_restart_is_waited_for() -> None:
    other = make_restart(A, trigger=RestartTrigger.MANUAL, annotations={})
    snapshot = replace(visited(TWO, **ASKED), restarts=(other,))
    assert pods_of(created(snapshot)) == ["speech-b"]
    assert handled(snapshot) == []


# --- scheduled ------------------------------------------------------------------------------------


def scheduled(announced: datetime | None, **fields: Any) -> Snapshot:
    policy = make_policy(schedule="0 12 * * *", residual=None)
    workload = make_workload(
        spec=make_template_spec(restart=policy),
        status=WorkloadStatus(next_restart_time=announced),
    )
    return make_snapshot(workload=workload, pods=(A, B), **fields)


def test_a_run_that_was_announced_asks_for_every_pod() -> None:
    manifests = created(scheduled(NOW))
    assert pods_of(manifests) == ["speech-a", "speech-b"]
    assert {one["spec"]["scheduledTime"] for one in manifests} == {"2026-11-23T12:00:00Z"}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        pytest.param(NOW - timedelta(seconds=1), [], id="a second too early"),
        pytest.param(NOW + timedelta(seconds=3600), ["speech-a", "speech-b"], id="at the deadline"),
        pytest.param(NOW + timedelta(seconds=3601), [], id="after the deadline"),
    ],
)
def test_a_run_is_due_until_its_deadline(now: datetime, expected: list[str]) -> None:
    assert pods_of(created(scheduled(NOW), now)) == expected


def test_a_run_that_nobody_announced_is_none() -> None:
    snapshot = scheduled(None)
    assert created(snapshot, NOW + timedelta(seconds=1)) == []
    assert plan(snapshot, NOW).status.next_restart_time == NOW + timedelta(days=1)


def test_a_run_is_spread_by_the_workload() -> None:
    snapshot = replace(scheduled(NOW), settings=make_settings(schedule_jitter_seconds=1000))
    begins = [
        seconds
        for seconds in range(0, 1001, 10)
        if created(snapshot, NOW + timedelta(seconds=seconds))
    ]
    assert begins
    assert begins[0] > 0
    assert begins == list(range(begins[0], 1001, 10))


def test_a_pod_that_started_after_the_run_is_new_enough() -> None:
    younger = replace(B, agent_running_since=NOW + timedelta(seconds=5))
    snapshot = replace(scheduled(NOW), pods=(A, younger))
    assert pods_of(created(snapshot, NOW + timedelta(seconds=10))) == ["speech-a"]


def test_a_pod_that_had_this_run_is_not_asked_for_again() -> None:
    done = ended(A, SKIPPED, 0, trigger=RestartTrigger.SCHEDULED, scheduled_time=NOW)
    snapshot = replace(scheduled(NOW), restarts=(done,))
    assert pods_of(created(snapshot)) == ["speech-b"]


def test_a_run_stays_announced_while_a_pod_waits_for_another_restart() -> None:
    other = make_restart(A, trigger=RestartTrigger.MANUAL)
    snapshot = replace(scheduled(NOW), restarts=(other,))
    planned = plan(snapshot, NOW)
    assert pods_of(created(snapshot)) == ["speech-b"]
    assert planned.status.next_restart_time == NOW


def test_a_suspended_schedule_announces_nothing() -> None:
    policy = make_policy(schedule="0 12 * * *", suspend=True)
    workload = make_workload(
        spec=make_template_spec(restart=policy), status=WorkloadStatus(next_restart_time=NOW)
    )
    planned = plan(make_snapshot(workload=workload), NOW)
    assert planned.status.next_restart_time is None
    assert planned.missed_run is None


# --- what may go ----------------------------------------------------------------------------------


def removed(snapshot: Snapshot) -> list[str]:
    return [one.name for one in plan(snapshot, NOW).actions if isinstance(one, DeleteRestart)]


DAY = 86_400


@pytest.mark.parametrize(
    ("restarts", "expected"),
    [
        pytest.param((ended(A, RECOVERED, 8 * DAY),), [], id="the last one stays"),
        pytest.param(
            (ended(A, RECOVERED, 8 * DAY), ended(A, RECOVERED, 9 * DAY)),
            ["ended-speech-a-777600"],
            id="the one before it goes",
        ),
        pytest.param(
            (ended(A, RECOVERED, 60), ended(A, RECOVERED, 7 * DAY - 1)), [], id="young ones stay"
        ),
        pytest.param(
            tuple(ended(A, FAILED, (8 + n) * DAY) for n in range(4)),
            ["ended-speech-a-950400"],
            id="three failures stay, for which the workload is degraded",
        ),
        pytest.param(
            (
                ended(A, RECOVERED, 60),
                ended(
                    B,
                    RECOVERED,
                    8 * DAY,
                    trigger=RestartTrigger.SCHEDULED,
                    scheduled_time=LONG_AGO,
                ),
            ),
            ["ended-speech-b-691200"],
            id="a scheduled one goes when nothing asks for it again",
        ),
    ],
)
def test_retention(restarts: tuple[Restart, ...], expected: list[str]) -> None:
    assert removed(make_snapshot(restarts=restarts)) == expected


def test_one_of_a_value_that_is_not_handled_yet_stays() -> None:
    old = ended(B, RECOVERED, 8 * DAY, trigger=RestartTrigger.MANUAL, annotations=ASKED)
    young = ended(A, RECOVERED, 60)
    snapshot = replace(visited(TWO, **ASKED), restarts=(old, young))
    assert removed(snapshot) == []
    assert removed(replace(TWO, restarts=(old, young))) == [old.name]
