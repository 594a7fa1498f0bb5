"""What holds restarts back is seen: in a condition, in an Event, and in the gauge of what waits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from vram_operator.api import (
    Attempt,
    RestartMethod,
    RestartOutcome,
    RestartStatus,
    RestartTrigger,
    Window,
    WorkloadCondition,
    WorkloadStatus,
)
from vram_operator.core.condition_list import find_condition
from vram_operator.core.plan import (
    CallRecycle,
    CallRestart,
    CreateRestart,
    DeletePod,
    DryRunEvict,
    EnsureObject,
    Evict,
    PatchRestartStatus,
    Plan,
    PushConfig,
)
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import (
    ActiveRestart,
    Cluster,
    EvictionVerdict,
    Restart,
    Snapshot,
    Workload,
)

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
    make_template_spec,
    make_workload,
)

A, B = make_pod("speech-a"), make_pod("speech-b")
LEAK = (make_agent(A, 9.0),)
QUEUED = (make_restart(A),)
BY_HAND = (make_restart(A, method=RestartMethod.RECYCLE, trigger=RestartTrigger.MANUAL),)
IN_PLACE = (make_restart(A, method=RestartMethod.IN_PLACE, trigger=RestartTrigger.MANUAL),)


def workload(**policy: Any) -> Workload:
    return make_workload(spec=make_template_spec(restart=make_policy(**policy)))


def elsewhere(node: str) -> Cluster:
    """A restart of another workload runs on a node."""
    active = ActiveRestart(namespace="prod", name="tts-1", workload="tts", node=node)
    return Cluster(total_pods=20, active_restarts=(active,))


def ended(number: int, outcome: RestartOutcome, seconds: float) -> Restart:
    status = RestartStatus(
        start_time=ago(seconds + 10), completion_time=ago(seconds), outcome=outcome
    )
    return make_restart(A, name=f"ended-{number}", created=ago(seconds + 20), status=status)


FAILURES = tuple(ended(n, RestartOutcome.NOT_RECOVERED, 5000 + n) for n in range(3))
CLOSED = [Window(schedule="0 1 * * *", duration_seconds=60)]
AWAY = replace(B, ready=False)
PodDeed = (CallRecycle, CallRestart, DryRunEvict, Evict, DeletePod)


@pytest.mark.parametrize(
    ("fields", "reason", "said"),
    [
        pytest.param(
            {
                "restarts": QUEUED,
                "settings": make_settings(max_concurrent_restarts="5%"),
                "cluster": elsewhere("node-9"),
            },
            "ConcurrencyCap",
            "1 of 1 restarts run: prod/tts-1 among them",
            id="the cap of the cluster",
        ),
        pytest.param(
            {"restarts": QUEUED, "cluster": elsewhere("node-of-speech-a")},
            "NodeBusy",
            "restart prod/tts-1 runs on node node-of-speech-a",
            id="one on each node",
        ),
        pytest.param(
            {"pods": (A, AWAY), "agents": (*LEAK, make_agent(B)), "restarts": QUEUED},
            "MaxUnavailable",
            "1 of at most 1 pods are unavailable: speech-b",
            id="maxUnavailable",
        ),
        pytest.param(
            {
                "restarts": IN_PLACE,
                "evictions": (
                    make_answer(A, EvictionVerdict.BLOCKED, blocker="pdb", message="needs 1"),
                ),
            },
            "PodDisruptionBudget",
            "PodDisruptionBudget pdb: needs 1",
            id="a budget",
        ),
        pytest.param(
            {"pods": (replace(A, agent_running_since=ago(60)),), "restarts": IN_PLACE},
            "TooYoung",
            "an exit before 2026-11-23T12:09:30Z would count into the kubelet's back-off",
            id="the kubelet's back-off",
        ),
        pytest.param(
            {"restarts": (ended(1, RestartOutcome.RECOVERED, 60),)},
            "Cooldown",
            "pod speech-a is left alone until 2026-11-23T12:10:00Z",
            id="the cooldown",
        ),
        pytest.param(
            {"workload": workload(windows=CLOSED)},
            "OutsideWindow",
            "the next window of restart.windows opens at 2026-11-24T01:00:00Z",
            id="a window",
        ),
        pytest.param(
            {"workload": workload(suspend=True)},
            "Suspended",
            "restart.suspend is true",
            id="a suspension",
        ),
        pytest.param(
            {"restarts": FAILURES},
            "RestartsDoNotHelp",
            "3 restarts in a row did not help",
            id="the circuit breaker",
        ),
    ],
)
def test_what_holds_a_restart_back_is_seen_everywhere(
    fields: dict[str, Any], reason: str, said: str
) -> None:
    snapshot = make_snapshot(**{"pods": (A,), "agents": LEAK, **fields})
    planned = plan(snapshot, NOW)
    blocked = find_condition(planned.conditions, WorkloadCondition.RESTART_BLOCKED)
    assert blocked is not None
    assert (blocked.status, blocked.reason) == ("True", reason)
    assert said in blocked.message
    assert [str(one.reason) for one in planned.blocked] == [reason]
    events = [one for one in planned.events if one.reason == "RestartBlocked"]
    assert len(events) == 1, events
    assert said in events[0].message
    standing = find_condition(planned.conditions, WorkloadCondition.RESTARTING)
    assert standing is not None
    assert f"waits ({reason})" in standing.message
    assert said in standing.message
    again = plan(seen(snapshot, planned), NOW)
    assert [one for one in again.events if one.reason == "RestartBlocked"] == []


def seen(snapshot: Snapshot, planned: Plan) -> Snapshot:
    """The snapshot after the plan's statuses were written."""
    written = {one.name: one for one in planned.actions if isinstance(one, PatchRestartStatus)}
    restarts = tuple(
        replace(one, status=written[one.name].status) if one.name in written else one
        for one in snapshot.restarts
    )
    return replace(
        snapshot, workload=replace(snapshot.workload, status=planned.status), restarts=restarts
    )


def at_the_cap(name: str, node: str = "node-9") -> Snapshot:
    """A restart is queued, and another workload's has the one place."""
    active = ActiveRestart(namespace="prod", name=name, workload="tts", node=node)
    return make_snapshot(
        pods=(A,),
        agents=LEAK,
        restarts=QUEUED,
        settings=make_settings(max_concurrent_restarts="1"),
        cluster=Cluster(total_pods=20, active_restarts=(active,)),
    )


def test_a_restart_in_line_tells_once_whatever_it_waits_for_in_turn() -> None:
    on_its_node = at_the_cap("tts-1", "node-of-speech-a")
    planned = plan(on_its_node, NOW)
    assert [str(one.reason) for one in planned.events if one.pod] == ["RestartBlocked"]
    assert [str(one.reason) for one in planned.blocked] == ["NodeBusy"]
    then = replace(seen(on_its_node, planned), cluster=at_the_cap("tts-2").cluster)
    planned = plan(then, NOW)
    assert [str(one.reason) for one in planned.blocked] == ["ConcurrencyCap"]
    assert planned.events == ()


def test_nothing_is_written_to_those_in_line_when_others_take_their_turns() -> None:
    first = at_the_cap("tts-1")
    then = replace(seen(first, plan(first, NOW)), cluster=at_the_cap("tts-2").cluster)
    assert [one for one in plan(then, NOW).actions if isinstance(one, PatchRestartStatus)] == []


def test_the_circuit_breaker_opens_once_with_an_event_and_says_how_it_closes() -> None:
    calm = make_snapshot(pods=(A,), restarts=FAILURES[:2])
    before = plan(calm, NOW)
    degraded = find_condition(before.conditions, WorkloadCondition.DEGRADED)
    assert degraded is not None
    assert degraded.status == "False"
    third = replace(seen(calm, before), restarts=FAILURES)
    planned = plan(third, NOW)
    degraded = find_condition(planned.conditions, WorkloadCondition.DEGRADED)
    assert degraded is not None
    assert (degraded.status, degraded.reason) == ("True", "RestartsDoNotHelp")
    said = "no further residual restart until one helps or the spec changes"
    assert said in degraded.message
    # Nothing leaks at this moment, and still it is told.
    assert [(str(one.reason), said in one.message) for one in planned.events] == [
        ("RestartBlocked", True)
    ]
    assert plan(seen(third, planned), NOW).events == ()


def test_restarts_that_were_decided_before_the_circuit_breaker_opened_do_not_begin() -> None:
    planned = plan(make_snapshot(pods=(A,), agents=LEAK, restarts=(*FAILURES, *QUEUED)), NOW)
    (write,) = [one for one in planned.actions if isinstance(one, PatchRestartStatus)]
    admitted = find_condition(write.status.conditions, "Admitted")
    assert admitted is not None
    assert (admitted.status, admitted.reason) == ("False", "RestartsDoNotHelp")
    assert write.status.attempts == []
    # A person may still ask for one.
    planned = plan(make_snapshot(pods=(A,), agents=LEAK, restarts=(*FAILURES, *BY_HAND)), NOW)
    assert [one.method for one in attempts_of(planned)] == [RestartMethod.RECYCLE]


def attempts_of(planned: Plan) -> list[Attempt]:
    writes = [one for one in planned.actions if isinstance(one, PatchRestartStatus)]
    return [attempt for one in writes for attempt in one.status.attempts]


@pytest.mark.parametrize(
    ("fields", "by"),
    [
        pytest.param({"settings": make_settings(dry_run=True)}, "--dry-run", id="by the flag"),
        pytest.param({"workload": workload(dry_run=True)}, "restart.dryRun", id="by the spec"),
    ],
)
def test_a_dry_run_is_seen_in_the_restart_in_an_event_and_in_the_condition(
    fields: dict[str, Any], by: str
) -> None:
    snapshot = make_snapshot(pods=(A,), agents=LEAK, restarts=QUEUED, **fields)
    planned = plan(snapshot, NOW)
    (write,) = [one for one in planned.actions if isinstance(one, PatchRestartStatus)]
    assert write.finished is RestartOutcome.DRY_RUN  # the label of restarts_total
    admitted = write.status.conditions[0]
    assert (admitted.status, admitted.reason) == ("False", "DryRun")
    assert admitted.message == (
        "would Recycle pod speech-a: residual 9Gi above 8Gi; "
        "then InPlace, Evict while it does not help"
    )
    skipped = [one.message for one in planned.events if one.reason == "RestartSkipped"]
    assert skipped == [f"speech-speech-a: DryRun: {admitted.message}"]
    standing = find_condition(planned.conditions, WorkloadCondition.RESTARTING)
    assert standing is not None
    assert f"dry run by {by}" in standing.message


@pytest.mark.parametrize(
    ("method", "trigger", "said"),
    [
        pytest.param("Auto", "Manual", "would InPlace pod speech-a: why; then Evict", id="by hand"),
        pytest.param("Evict", "Scheduled", "would Evict pod speech-a: why", id="one step alone"),
        pytest.param("InPlace", "Residual", "would InPlace pod speech-a: why", id="a residual"),
    ],
)
def test_a_dry_run_asks_the_budgets_and_says_what_they_would_forbid(
    method: str, trigger: str, said: str
) -> None:
    restart = make_restart(
        A, method=RestartMethod(method), trigger=RestartTrigger(trigger), reason="why"
    )
    snapshot = make_snapshot(
        pods=(A,), agents=LEAK, restarts=(restart,), settings=make_settings(dry_run=True)
    )
    asked = plan(snapshot, NOW)
    assert [type(one) for one in asked.actions if isinstance(one, PodDeed)] == [DryRunEvict]
    verdicts = {
        "": make_answer(A),
        "PodDisruptionBudget: PodDisruptionBudget keep-one: needs 1": make_answer(
            A, EvictionVerdict.BLOCKED, blocker="keep-one", message="needs 1"
        ),
    }
    for forbidden, answer in verdicts.items():
        planned = plan(replace(seen(snapshot, asked), evictions=(answer,)), NOW)
        (write,) = [one for one in planned.actions if isinstance(one, PatchRestartStatus)]
        assert write.finished is RestartOutcome.DRY_RUN
        message = write.status.conditions[0].message
        assert message.startswith(said)
        assert message.partition("it would wait: ")[2] == forbidden
        assert write.status.attempts == []
        assert [one for one in planned.actions if isinstance(one, PodDeed)] == []


def test_a_dry_run_still_keeps_what_a_workload_owns_and_runs_by() -> None:
    agent = make_agent(A, config_generation=2)
    snapshot = make_snapshot(
        pods=(A,), agents=(agent,), objects=(), settings=make_settings(dry_run=True)
    )
    kinds = {type(one) for one in plan(snapshot, NOW).actions}
    assert {EnsureObject, PushConfig} <= kinds


def test_the_jitter_of_a_workload_is_in_its_condition_and_in_the_reason_of_its_restarts() -> None:
    policy = make_policy(schedule="0 12 * * *", residual=None)
    later = plan(
        make_snapshot(
            workload=make_workload(spec=make_template_spec(restart=policy)),
            settings=make_settings(schedule_jitter_seconds=1800),
        ),
        ago(3600),
    )
    standing = find_condition(later.conditions, WorkloadCondition.RESTARTING)
    assert standing is not None
    _, _, spread = standing.message.partition("the schedule restarts at 2026-11-23T12:00:00Z, ")
    assert spread.endswith(" later by --schedule-jitter")
    due = make_snapshot(
        workload=make_workload(
            spec=make_template_spec(restart=policy), status=WorkloadStatus(next_restart_time=NOW)
        ),
        settings=make_settings(schedule_jitter_seconds=1800),
    )
    half_an_hour_later = plan(due, ago(-1800))
    (create,) = [one for one in half_an_hour_later.actions if isinstance(one, CreateRestart)]
    assert create.manifest["spec"]["reason"] == f"schedule 0 12 * * * in Etc/UTC, {spread}"


def test_a_storm_of_many_workloads_is_let_through_by_the_cap_alone() -> None:
    """Thirty leaking workloads of one pod each, planned one after the other from shared figures."""
    admitted: list[ActiveRestart] = []
    waiting: Counter[str] = Counter()
    for number in range(30):
        pod = make_pod(f"pod-{number}", node=f"node-{number % 20}")
        snapshot = make_snapshot(
            pods=(pod,),
            agents=(make_agent(pod, 9.0),),
            restarts=(make_restart(pod, name=f"restart-{number}"),),
            settings=make_settings(max_concurrent_restarts="10%"),
            cluster=Cluster(total_pods=30, active_restarts=tuple(admitted)),
            workload=replace(make_workload(), namespace=f"team-{number}"),
        )
        planned = plan(snapshot, NOW)
        waiting.update(str(one.reason) for one in planned.blocked)
        (write,) = [one for one in planned.actions if isinstance(one, PatchRestartStatus)]
        if write.status.attempts:
            admitted.append(
                ActiveRestart(
                    namespace=f"team-{number}", name=write.name, workload="speech", node=pod.node
                )
            )
    assert len(admitted) == 3
    # Ten of the others share their node with another pod; three of these with one that is at work.
    assert waiting == {"ConcurrencyCap": 24, "NodeBusy": 3}
