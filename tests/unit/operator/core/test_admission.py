"""What a restart waits for, in which order, and by which name it is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vram_agent.protocol import AgentMode
from vram_operator.api import (
    Attempt,
    PodRef,
    Reason,
    RestartMethod,
    RestartOutcome,
    RestartStatus,
    RestartTrigger,
    Window,
)
from vram_operator.core.admission import (
    Candidate,
    Wait,
    concurrency_cap,
    find_wait,
    unavailable_limit,
)
from vram_operator.core.snapshot import ActiveRestart, EvictionVerdict, Restart, Snapshot
from vram_operator.core.visit import begin_visit

from tests.support.factories import (
    NOW,
    ago,
    make_agent,
    make_answer,
    make_pod,
    make_policy,
    make_restart,
    make_settings,
    make_snapshot,
    make_target,
    make_template_spec,
    make_workload,
)

A, B, C = make_pod("speech-a"), make_pod("speech-b"), make_pod("speech-c")
ELSEWHERE = ActiveRestart(namespace="other", name="x-1", workload="x", node="node-9")
RESIDUAL, SCHEDULED, MANUAL = (
    RestartTrigger.RESIDUAL,
    RestartTrigger.SCHEDULED,
    RestartTrigger.MANUAL,
)
RECYCLE, IN_PLACE, EVICT = RestartMethod.RECYCLE, RestartMethod.IN_PLACE, RestartMethod.EVICT


def snapshot_with(policy: dict[str, Any] | None = None, **fields: Any) -> Snapshot:
    """Pod A leaks and may be evicted; B and C are well."""
    spec = make_template_spec(restart=make_policy(**(policy or {})))
    return make_snapshot(
        **{
            "workload": make_workload(spec=spec),
            "pods": (A, B, C),
            "agents": (make_agent(A, 9.0), make_agent(B), make_agent(C)),
            "evictions": (make_answer(A),),
            **fields,
        }
    )


def wait_of(
    snapshot: Snapshot,
    method: RestartMethod = IN_PLACE,
    active: tuple[ActiveRestart, ...] = (),
    **restart: Any,
) -> Wait | None:
    own = make_restart(A, **restart)
    pod = snapshot.find_pod(A.uid)
    assert pod is not None
    visit = begin_visit(replace(snapshot, restarts=(*snapshot.restarts, own)), NOW)
    return find_wait(visit, Candidate(restart=own, pod=pod, method=method, active=active))


def ended(pod_seconds_ago: float) -> Restart:
    status = RestartStatus(
        outcome=RestartOutcome.RECOVERED,
        start_time=ago(pod_seconds_ago + 10),
        completion_time=ago(pod_seconds_ago),
    )
    return make_restart(A, name="before", status=status)


@pytest.mark.parametrize("trigger", list(RestartTrigger))
@pytest.mark.parametrize("method", [RECYCLE, IN_PLACE, EVICT])
def test_nothing_in_the_way_admits_every_step(
    method: RestartMethod, trigger: RestartTrigger
) -> None:
    assert wait_of(snapshot_with(), method, trigger=trigger) is None


CLOSED = Window(schedule="0 1 * * *", duration_seconds=3600)
OPEN = Window(schedule="0 11 * * *", duration_seconds=7200)


@pytest.mark.parametrize(
    ("policy", "trigger", "reason"),
    [
        pytest.param({"suspend": True}, RESIDUAL, Reason.SUSPENDED, id="suspend stops residual"),
        pytest.param({"suspend": True}, SCHEDULED, Reason.SUSPENDED, id="suspend stops scheduled"),
        pytest.param({"suspend": True}, MANUAL, None, id="suspend does not stop a person"),
        pytest.param(
            {"windows": [CLOSED]}, RESIDUAL, Reason.OUTSIDE_WINDOW, id="windows bind residual"
        ),
        pytest.param({"windows": [CLOSED, OPEN]}, RESIDUAL, None, id="one open window is enough"),
        pytest.param({"windows": [CLOSED]}, SCHEDULED, None, id="windows do not bind scheduled"),
        pytest.param({"windows": [CLOSED]}, MANUAL, None, id="windows do not bind a person"),
    ],
)
def test_leave(policy: dict[str, Any], trigger: RestartTrigger, reason: Reason | None) -> None:
    wait = wait_of(snapshot_with(policy), trigger=trigger)
    assert (wait.reason if wait else None) is reason


@pytest.mark.parametrize(
    ("seconds", "trigger", "reason"),
    [
        pytest.param(659, RESIDUAL, Reason.COOLDOWN, id="a second before the cooldown is over"),
        pytest.param(660, RESIDUAL, None, id="when the cooldown is over"),
        pytest.param(10, SCHEDULED, Reason.COOLDOWN, id="a schedule waits for it too"),
        pytest.param(10, MANUAL, None, id="a person does not"),
    ],
)
def test_cooldown(seconds: float, trigger: RestartTrigger, reason: Reason | None) -> None:
    snapshot = replace(snapshot_with(), restarts=(ended(seconds),))
    wait = wait_of(snapshot, trigger=trigger)
    assert (wait.reason if wait else None) is reason


def test_a_pod_whose_restart_was_skipped_needs_no_cooldown() -> None:
    status = RestartStatus(outcome=RestartOutcome.SKIPPED, completion_time=ago(10))
    snapshot = replace(snapshot_with(), restarts=(make_restart(A, name="b", status=status),))
    assert wait_of(snapshot) is None


@pytest.mark.parametrize(
    ("dry_run", "seconds", "reason"),
    [
        pytest.param(True, 600, Reason.COOLDOWN, id="records of a dry run do not pile up"),
        pytest.param(True, 631, None, id="and come again after a while"),
        pytest.param(False, 1, None, id="a real restart does not wait for a pretended one"),
    ],
)
def test_the_cooldown_after_a_dry_run(dry_run: bool, seconds: float, reason: Reason | None) -> None:
    status = RestartStatus(outcome=RestartOutcome.DRY_RUN, completion_time=ago(seconds))
    snapshot = snapshot_with(
        {"dry_run": dry_run, "cooldown_seconds": 0, "method": RECYCLE},
        restarts=(make_restart(A, name="b", status=status),),
    )
    wait = wait_of(snapshot, RECYCLE)
    assert (wait.reason if wait else None) is reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({}, Reason.NO_EVIDENCE, id="its report is stale"),
        pytest.param({"idle": False}, Reason.NOT_IDLE, id="it is at work"),
    ],
)
def test_evidence_must_hold_at_the_moment_of_admission(
    changes: dict[str, Any], reason: Reason
) -> None:
    seen = NOW if changes else ago(31)
    agents = (make_agent(A, 9.0, seen, **changes), make_agent(B), make_agent(C))
    wait = wait_of(snapshot_with(agents=agents), EVICT)
    assert wait is not None
    assert wait.reason is reason


@pytest.mark.parametrize("method", [RECYCLE, IN_PLACE])
def test_a_silent_agent_is_not_asked_to_restart(method: RestartMethod) -> None:
    agents = (make_agent(A, 9.0, ago(31)), make_agent(B), make_agent(C))
    wait = wait_of(snapshot_with(agents=agents), method, trigger=MANUAL)
    assert wait is not None
    assert wait.reason is Reason.AGENT_SILENT


@pytest.mark.parametrize(
    "target",
    [
        pytest.param({"observed_generation": 1}, id="the controller has not seen it yet"),
        pytest.param({"updated": 1}, id="two pods are of the old template"),
        pytest.param({"current": 4}, id="one pod is too many"),
    ],
)
def test_a_rollout_goes_first(target: dict[str, Any]) -> None:
    snapshot = snapshot_with()
    target_ = make_target(snapshot.workload, **{"replicas": 3, **target})
    wait = wait_of(replace(snapshot, target=target_), trigger=MANUAL)
    assert wait is not None
    assert wait.reason is Reason.ROLLOUT_IN_PROGRESS


@pytest.mark.parametrize(
    ("since", "method", "reason"),
    [
        pytest.param(ago(629), IN_PLACE, Reason.TOO_YOUNG, id="629 seconds are too young to exit"),
        pytest.param(ago(630), IN_PLACE, None, id="630 seconds are old enough"),
        pytest.param(None, IN_PLACE, Reason.TOO_YOUNG, id="a container that is down does not exit"),
        pytest.param(ago(629), RECYCLE, None, id="a recycle needs no age"),
        pytest.param(ago(629), EVICT, None, id="an eviction needs no age"),
    ],
)
def test_a_container_exits_only_after_the_back_off(
    since: Any, method: RestartMethod, reason: Reason | None
) -> None:
    pods = (replace(A, agent_running_since=since), B, C)
    wait = wait_of(snapshot_with(pods=pods), method, trigger=MANUAL)
    assert (wait.reason if wait else None) is reason
    if since == ago(629) and wait:
        assert wait.requeue_at == ago(-1)


def test_the_cap_counts_the_restarts_of_all_workloads_and_names_one() -> None:
    snapshot = replace(snapshot_with(), settings=make_settings(max_concurrent_restarts="1"))
    wait = wait_of(snapshot, active=(ELSEWHERE,), trigger=MANUAL)
    assert wait is not None
    assert wait.reason is Reason.CONCURRENCY_CAP
    assert "other/x-1" in wait.figures


@pytest.mark.parametrize(
    ("setting", "pods", "cap"),
    [("10%", 3, 1), ("10%", 39, 3), ("10%", 40, 4), ("100%", 7, 7), ("5", 2, 5), ("1%", 0, 1)],
)
def test_a_percentage_is_rounded_down_and_at_least_one(setting: str, pods: int, cap: int) -> None:
    assert concurrency_cap(setting, pods) == cap


@pytest.mark.parametrize(
    ("setting", "replicas", "limit"), [(1, 9, 1), (3, 9, 3), ("25%", 9, 2), ("10%", 9, 1)]
)
def test_the_unavailable_limit(setting: int | str, replicas: int, limit: int) -> None:
    assert unavailable_limit(setting, replicas) == limit


def test_one_restart_for_each_node() -> None:
    busy = replace(ELSEWHERE, node=A.node)
    wait = wait_of(snapshot_with(), active=(busy,), trigger=MANUAL)
    assert wait is not None
    assert wait.reason is Reason.NODE_BUSY
    assert "other/x-1" in wait.message


def own_active(pod: str) -> ActiveRestart:
    return ActiveRestart(namespace="lab", name=f"speech-{pod}", workload="speech", node=f"n-{pod}")


@pytest.mark.parametrize(
    ("pods", "active", "limit", "reason"),
    [
        pytest.param((A, B, C), (), 1, None, id="all others are ready"),
        pytest.param(
            (A, replace(B, ready=False), C), (), 1, Reason.MAX_UNAVAILABLE, id="another is not"
        ),
        pytest.param((A, replace(B, ready=False), C), (), 2, None, id="two may be away"),
        pytest.param(
            (replace(A, ready=False), B, C), (), 1, None, id="the pod itself is away already"
        ),
        pytest.param((A, B), (), 1, Reason.MAX_UNAVAILABLE, id="a pod is missing"),
        pytest.param(
            (A, B, C),
            (own_active("speech-b"),),
            1,
            Reason.MAX_UNAVAILABLE,
            id="another of its restarts runs",
        ),
        pytest.param(
            (A, B, replace(C, terminating=True)),
            (),
            1,
            Reason.MAX_UNAVAILABLE,
            id="a pod on its way out is a missing one",
        ),
        *(
            pytest.param(
                (A, B, C, make_pod("speech-old", phase=phase, ready=False)),
                (),
                1,
                None,
                id=f"one that {phase} is no pod any more",
            )
            for phase in ("Failed", "Succeeded")
        ),
    ],
)
def test_max_unavailable(pods: Any, active: Any, limit: int, reason: Reason | None) -> None:
    snapshot = snapshot_with({"max_unavailable": limit})
    snapshot = replace(snapshot, pods=pods, restarts=(make_restart(B),))
    wait = wait_of(snapshot, RECYCLE, active=active, trigger=MANUAL)
    assert (wait.reason if wait else None) is reason


@pytest.mark.parametrize(
    ("answers", "method", "reason", "asks"),
    [
        pytest.param((), IN_PLACE, Reason.PENDING, True, id="the budgets are asked first"),
        pytest.param(
            (make_answer(A, at=ago(15)),),
            IN_PLACE,
            Reason.PENDING,
            True,
            id="an answer of fifteen seconds ago is asked again",
        ),
        pytest.param((make_answer(A, at=ago(14)),), IN_PLACE, None, False, id="a fresh yes"),
        pytest.param(
            (make_answer(A, EvictionVerdict.BLOCKED, blocker="pdb", message="needs 3"),),
            IN_PLACE,
            Reason.POD_DISRUPTION_BUDGET,
            False,
            id="a fresh no",
        ),
        pytest.param(
            (make_answer(A, EvictionVerdict.BLOCKED, at=ago(60), blocker="pdb"),),
            EVICT,
            Reason.POD_DISRUPTION_BUDGET,
            True,
            id="an old no stays said while it is asked again",
        ),
        pytest.param(
            (make_answer(A, EvictionVerdict.FAILED, message="500"),),
            EVICT,
            Reason.EVICTION_REFUSED,
            False,
            id="an error is no yes",
        ),
        pytest.param((), RECYCLE, None, False, id="a recycle asks nobody"),
    ],
)
def test_budgets(answers: Any, method: RestartMethod, reason: Reason | None, asks: bool) -> None:
    wait = wait_of(snapshot_with(evictions=answers), method, trigger=MANUAL)
    assert (wait.reason if wait else None) is reason
    assert (wait.ask if wait else False) is asks


def test_a_pod_that_is_not_ready_may_exit_without_asking_but_not_be_evicted() -> None:
    snapshot = snapshot_with(pods=(replace(A, ready=False), B, C), evictions=())
    assert wait_of(snapshot, IN_PLACE, trigger=MANUAL) is None
    wait = wait_of(snapshot, EVICT, trigger=MANUAL)
    assert wait is not None
    assert wait.ask


def test_a_recycle_of_a_wrapped_application_takes_it_away_and_asks() -> None:
    agents = (make_agent(A, 9.0, mode=AgentMode.RUN), make_agent(B), make_agent(C))
    wait = wait_of(snapshot_with(agents=agents, evictions=()), RECYCLE)
    assert wait is not None
    assert wait.ask
    assert wait_of(snapshot_with(agents=agents), RECYCLE) is None
    unready = (replace(A, ready=False), B, C)
    assert wait_of(snapshot_with(agents=agents, pods=unready, evictions=()), RECYCLE) is None


def test_a_yes_is_not_used_twice_while_the_first_disruption_does_not_show() -> None:
    snapshot = snapshot_with({"max_unavailable": 2})
    snapshot = replace(snapshot, restarts=(make_restart(B),))
    wait = wait_of(snapshot, active=(own_active("speech-b"),), trigger=MANUAL)
    assert wait is not None
    assert wait.reason is Reason.POD_DISRUPTION_BUDGET
    assert "speech-speech-b was just admitted" in wait.message
    away = replace(snapshot, pods=(A, replace(B, ready=False), C))
    assert wait_of(away, active=(own_active("speech-b"),), trigger=MANUAL) is None


def test_two_hand_made_restarts_of_one_pod_run_one_after_the_other() -> None:
    snapshot = snapshot_with(pods=(A,), agents=(make_agent(A),))
    first = make_restart(A, name="first", pod_ref=PodRef(name=A.name))
    running = Attempt(method=RECYCLE, start_time=ago(5))
    first = replace(first, status=RestartStatus(attempts=[running], start_time=ago(5)))
    wait = wait_of(
        replace(snapshot, restarts=(first,)), trigger=MANUAL, pod_ref=PodRef(name=A.name)
    )
    assert wait is not None
    assert "restart first of the same pod" in wait.message


def test_a_refused_spec_admits_nothing() -> None:
    wait = wait_of(snapshot_with({"schedule": "never"}), trigger=MANUAL)
    assert wait is not None
    assert wait.reason is Reason.INVALID_SCHEDULE
