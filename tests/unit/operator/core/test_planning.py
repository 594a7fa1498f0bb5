"""Properties of whole plans, whatever the snapshot."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vram_agent.protocol import ResidualSource
from vram_operator.api import (
    Attempt,
    Condition,
    ConditionStatus,
    Reason,
    RestartMethod,
    RestartOutcome,
    RestartStatus,
    RestartTrigger,
)
from vram_operator.core.phases import (
    TRANSITIONS,
    IllegalTransitionError,
    Phase,
    check_transition,
    phase_of,
    rungs,
)
from vram_operator.core.plan import (
    CallRecycle,
    CallRestart,
    CreateRestart,
    DeletePod,
    DryRunEvict,
    Evict,
    Knock,
    PatchRestartStatus,
    PushConfig,
)
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import CallAnswer, PushAnswer, Restart, Snapshot

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

RECYCLE, IN_PLACE, EVICT, DELETE = (
    RestartMethod.RECYCLE,
    RestartMethod.IN_PLACE,
    RestartMethod.EVICT,
    RestartMethod.DELETE,
)
HARD = (CallRecycle, CallRestart, Evict, DeletePod)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Workloads with up to four pods in any condition, some with restarts."""
    policy = make_policy(
        max_unavailable=draw(st.integers(1, 3)),
        suspend=draw(st.booleans()),
        schedule=draw(st.sampled_from(["", "0 12 * * *"])),
    )
    pods, agents, restarts, answers = [], [], [], []
    for n in range(draw(st.integers(0, 4))):
        pod = make_pod(
            f"speech-{n}",
            node=draw(st.sampled_from(["node-1", "node-2", f"own-{n}"])),
            ready=draw(st.booleans()),
            terminating=draw(st.integers(0, 9)) == 0,
            agent_running_since=draw(st.sampled_from([None, ago(60), ago(5000)])),
        )
        pods.append(pod)
        if draw(st.booleans()):
            answers.append(make_answer(pod, at=ago(draw(st.integers(0, 20)))))
        if draw(st.integers(0, 3)):
            agents.append(
                make_agent(
                    pod,
                    draw(st.sampled_from([1.0, 9.0])),
                    ago(draw(st.sampled_from([0, 5, 31, 200]))),
                    source=draw(st.sampled_from(list(ResidualSource))),
                    idle=draw(st.booleans()),
                    refuses=draw(st.integers(0, 5)) == 0,
                )
            )
        if draw(st.booleans()):
            trigger = draw(st.sampled_from([RestartTrigger.RESIDUAL, RestartTrigger.MANUAL]))
            restarts.append(
                make_restart(pod, trigger=trigger, created=ago(draw(st.integers(0, 99))))
            )
    return make_snapshot(
        workload=make_workload(spec=make_template_spec(restart=policy)),
        settings=make_settings(max_concurrent_restarts=draw(st.sampled_from(["1", "2", "50%"]))),
        pods=tuple(pods),
        agents=tuple(agents),
        restarts=tuple(restarts),
        evictions=tuple(answers),
    )


@given(snapshots(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_what_is_seen_does_not_matter(
    snapshot: Snapshot, shuffler: random.Random
) -> None:
    def shuffled(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(shuffler.sample(items, len(items)))

    other = replace(
        snapshot,
        pods=shuffled(snapshot.pods),
        agents=shuffled(snapshot.agents),
        restarts=shuffled(snapshot.restarts),
        evictions=shuffled(snapshot.evictions),
        objects=shuffled(snapshot.objects),
    )
    assert plan(snapshot, NOW) == plan(other, NOW)


@given(snapshots())
@settings(max_examples=150, deadline=None)
def test_the_cap_and_the_limit_are_never_exceeded_and_nodes_never_shared(
    snapshot: Snapshot,
) -> None:
    planned = plan(snapshot, NOW)
    admitted = [
        one for one in planned.actions if isinstance(one, PatchRestartStatus) and is_open(one)
    ]
    setting = snapshot.settings.max_concurrent_restarts
    cap = max(1, len(snapshot.pods) // 2) if setting == "50%" else int(setting)
    assert len(admitted) <= cap
    limit = snapshot.workload.spec.restart.max_unavailable
    assert isinstance(limit, int)
    assert len(admitted) <= limit
    restarted = {one.name.removeprefix("speech-") for one in admitted}
    nodes = [pod.node for pod in snapshot.pods if pod.name in restarted]
    assert len(nodes) == len(set(nodes))
    away = {pod.name for pod in snapshot.pods if not pod.ready and not pod.terminating}
    assert not restarted or len(away | restarted) <= max(limit, len(away))


def is_open(action: PatchRestartStatus) -> bool:
    return phase_of(action.status) is Phase.ACTING


@given(snapshots())
@settings(max_examples=150, deadline=None)
def test_nothing_rests_on_stale_unknown_or_busy_reports(snapshot: Snapshot) -> None:
    planned = plan(snapshot, NOW)
    good = set()
    for agent in snapshot.agents:
        newest = agent.history[-1]
        fresh = NOW - newest.received_at <= timedelta(seconds=30)
        proves = newest.residual_bytes > 8 * 1024**3 and newest.source != "Unknown"
        if fresh and proves and newest.idle:
            good.add(agent.pod_uid)
    for action in planned.actions:
        if isinstance(action, CreateRestart) and action.manifest["spec"]["trigger"] == "Residual":
            assert action.manifest["spec"]["pod"]["uid"] in good
        if isinstance(action, HARD):
            restart = next(one for one in snapshot.restarts if one.name == action.restart_name)
            assert restart.spec.trigger == "Manual" or restart.spec.pod.uid in good


@given(snapshots())
@settings(max_examples=100, deadline=None)
def test_the_same_snapshot_gives_the_same_plan_and_a_later_look(snapshot: Snapshot) -> None:
    planned = plan(snapshot, NOW)
    assert planned == plan(snapshot, NOW)
    assert planned.requeue_at is None or planned.requeue_at > NOW


@given(snapshots())
@settings(max_examples=100, deadline=None)
def test_intent_is_written_before_anything_is_done_for_it(snapshot: Snapshot) -> None:
    kinds = [type(one) for one in plan(snapshot, NOW).actions]
    writes = [n for n, kind in enumerate(kinds) if kind is PatchRestartStatus]
    deeds = [n for n, kind in enumerate(kinds) if kind in HARD]
    assert not deeds or max(writes, default=-1) < min(deeds)


# --- the state machine --------------------------------------------------------------------------

OPEN = Attempt(method=RECYCLE, start_time=ago(5))
STATUSES = {
    Phase.QUEUED: RestartStatus(),
    Phase.ACTING: RestartStatus(attempts=[OPEN]),
    Phase.FINISHED: RestartStatus(outcome=RestartOutcome.SKIPPED),
}


@pytest.mark.parametrize("before", list(STATUSES))
@pytest.mark.parametrize("after", list(STATUSES))
def test_only_transitions_of_the_table_pass(before: Phase, after: Phase) -> None:
    if before is after or after in TRANSITIONS[before]:
        check_transition(STATUSES[before], STATUSES[after])
    else:
        with pytest.raises(IllegalTransitionError):
            check_transition(STATUSES[before], STATUSES[after])


@pytest.mark.parametrize(
    ("method", "trigger", "allow_delete", "expected"),
    [
        ("Auto", "Residual", False, (RECYCLE, IN_PLACE, EVICT)),
        ("Auto", "Scheduled", False, (IN_PLACE, EVICT)),
        ("Auto", "Manual", True, (IN_PLACE, EVICT, DELETE)),
        ("Recycle", "Manual", True, (RECYCLE,)),
        ("Evict", "Residual", False, (EVICT,)),
    ],
)
def test_the_ladder(
    method: str, trigger: str, allow_delete: bool, expected: tuple[RestartMethod, ...]
) -> None:
    found = rungs(RestartMethod(method), RestartTrigger(trigger), allow_delete=allow_delete)
    assert found == expected


# --- what an agent answers ----------------------------------------------------------------------

POD = make_pod()


def acting(method: RestartMethod = RECYCLE, **fields: Any) -> Restart:
    """A restart that was admitted ten seconds ago, seen by the plan that admitted it."""
    snapshot = make_snapshot(
        pods=(POD,),
        agents=(make_agent(POD, 9.0),),
        evictions=(make_answer(POD),),
        restarts=(make_restart(POD, method=method, **fields),),
    )
    (write,) = [one for one in plan(snapshot, NOW).actions if isinstance(one, PatchRestartStatus)]
    return replace(snapshot.restarts[0], status=write.status)


def answered(restart: Restart, status: int, seconds: float = 1, **agent: Any) -> Snapshot:
    step = restart.status.attempts[-1].method
    answer = CallAnswer(
        restart_id=f"{restart.name}.{restart.uid}.{step.lower()}",
        step=step,  # type: ignore[arg-type]
        at=ago(seconds),
        status=status,
        message="said so",
    )
    return make_snapshot(
        pods=(POD,),
        agents=(make_agent(POD, 9.0, calls=(answer,), **agent),),
        evictions=(make_answer(POD),),
        restarts=(restart,),
    )


def calls(snapshot: Snapshot) -> list[type]:
    return [type(one) for one in plan(snapshot, NOW).actions if isinstance(one, HARD)]


def written(snapshot: Snapshot) -> RestartStatus:
    (write,) = [one for one in plan(snapshot, NOW).actions if isinstance(one, PatchRestartStatus)]
    return write.status


@pytest.mark.parametrize(
    ("status", "seconds", "expected"),
    [
        pytest.param(202, 1, [], id="taken a second ago: wait for it to show"),
        pytest.param(202, 31, [CallRecycle], id="taken, and never showed: call again"),
        pytest.param(0, 9, [], id="not reached: wait a little"),
        pytest.param(0, 10, [CallRecycle], id="not reached: call again"),
        pytest.param(503, 10, [CallRecycle], id="a server error: call again"),
        pytest.param(429, 10, [CallRecycle], id="too many calls: call again"),
    ],
)
def test_a_call_is_repeated_until_it_shows(
    status: int, seconds: float, expected: list[type]
) -> None:
    assert calls(answered(acting(), status, seconds)) == expected


@pytest.mark.parametrize("status", [400, 401, 403, 404, 501])
def test_a_final_refusal_takes_the_next_step_of_the_ladder(status: int) -> None:
    restart = acting(RestartMethod.AUTO)
    snapshot = answered(restart, status)
    assert calls(snapshot) == [CallRestart]
    first, second = written(snapshot).attempts
    assert (first.method, first.result) == (RECYCLE, RestartOutcome.FAILED)
    assert first.message == f"the agent answered {status}: said so"
    assert second.method is IN_PLACE


def test_a_final_refusal_of_the_only_step_fails_the_restart() -> None:
    assert written(answered(acting(), 501)).outcome is RestartOutcome.FAILED


def test_a_call_is_never_made_blind() -> None:
    restart = acting()
    silent = make_agent(POD, 9.0, ago(31))
    snapshot = make_snapshot(pods=(POD,), agents=(silent,), restarts=(restart,))
    assert calls(snapshot) == []


def test_an_agent_of_another_boot_is_not_called_again() -> None:
    restart = acting(IN_PLACE)
    snapshot = make_snapshot(
        pods=(POD,), agents=(make_agent(POD, 1.0, boot_id="next"),), restarts=(restart,)
    )
    assert calls(snapshot) == []
    assert written(snapshot).outcome is RestartOutcome.RECOVERED


def test_a_refusing_agent_can_only_be_evicted() -> None:
    agents = (make_agent(POD, 9.0, refuses=True),)
    restart = make_restart(POD, method=RestartMethod.AUTO)
    snapshot = make_snapshot(pods=(POD,), agents=agents, restarts=(restart,))
    kinds = [type(one) for one in plan(snapshot, NOW).actions]
    assert DryRunEvict in kinds
    assert calls(replace(snapshot, evictions=(make_answer(POD),))) == [Evict]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        pytest.param(59, [], id="not at once"),
        pytest.param(60, [Knock], id="after a minute"),
    ],
)
def test_an_agent_that_refuses_is_asked_again_before_a_config_is_pushed(
    seconds: float, expected: list[type]
) -> None:
    agent = make_agent(POD, refuses=True, refused_at=ago(seconds), config_generation=1)
    snapshot = make_snapshot(pods=(POD,), agents=(agent,))
    actions = plan(snapshot, NOW).actions
    assert [type(one) for one in actions if isinstance(one, Knock | PushConfig)] == expected


def test_a_config_is_pushed_as_soon_as_the_agent_takes_our_calls() -> None:
    push = PushAnswer(generation=3, at=ago(20), status=401)
    agent = make_agent(POD, push=push, config_generation=1)
    actions = plan(make_snapshot(pods=(POD,), agents=(agent,)), NOW).actions
    assert [type(one) for one in actions if isinstance(one, PushConfig)] == [PushConfig]


@pytest.mark.parametrize("allowed", [False, True])
def test_a_pod_is_deleted_only_with_leave(allowed: bool) -> None:
    snapshot = make_snapshot(
        settings=make_settings(allow_delete=allowed),
        pods=(POD,),
        agents=(make_agent(POD, 9.0),),
        evictions=(make_answer(POD),),
        restarts=(make_restart(POD, method=DELETE, trigger=RestartTrigger.MANUAL),),
    )
    assert calls(snapshot) == ([DeletePod] if allowed else [])
    if not allowed:
        assert written(snapshot).outcome is RestartOutcome.FAILED
        assert written(snapshot).conditions[0].reason == "DeleteNotAllowed"


def test_a_pod_that_is_gone_skips_its_restart() -> None:
    snapshot = make_snapshot(restarts=(make_restart(make_pod("speech-old"), created=ago(60)),))
    status = written(snapshot)
    assert status.outcome is RestartOutcome.SKIPPED
    assert status.conditions[0].reason == "PodGone"


def test_a_restart_by_hand_whose_pod_went_while_it_waited_is_skipped() -> None:
    said = Condition(
        type="Admitted",
        status=ConditionStatus.FALSE,
        reason=Reason.POD_DISRUPTION_BUDGET,
        last_transition_time=ago(50),
    )
    by_hand = make_restart(make_pod("speech-old", uid=""), created=ago(60))
    assert written(make_snapshot(restarts=(by_hand,))).outcome is RestartOutcome.FAILED
    waited = replace(by_hand, status=RestartStatus(conditions=[said]))
    status = written(make_snapshot(restarts=(waited,)))
    assert (status.outcome, status.conditions[0].reason) == ("Skipped", "PodGone")


def test_a_residual_that_went_away_by_itself_skips_its_restart() -> None:
    snapshot = make_snapshot(pods=(POD,), restarts=(make_restart(POD),))
    status = written(snapshot)
    assert status.outcome is RestartOutcome.SKIPPED
    assert "not needed any more" in status.conditions[0].message
