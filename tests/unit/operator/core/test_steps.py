"""A step under way and its measurement: what is waited for, for how long, and what is recorded."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from msgspec import structs
from vram_agent.protocol import ActionState, ActionStep, DeviceKind, ResidualSource
from vram_operator.api import (
    Attempt,
    Condition,
    ConditionStatus,
    MemoryFigures,
    RestartMethod,
    RestartOutcome,
    RestartStatus,
    RestartTrigger,
)
from vram_operator.core.plan import DeletePod, Evict, PatchRestartStatus
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import EvictionVerdict, Pod, Restart, Snapshot, hear

from tests.support.factories import (
    NOW,
    ago,
    make_action,
    make_agent,
    make_answer,
    make_model,
    make_pod,
    make_policy,
    make_restart,
    make_settings,
    make_snapshot,
    make_template_spec,
    make_workload,
    rfc3339,
)

POD = make_pod()
RECYCLE, IN_PLACE, EVICT, DELETE = (
    RestartMethod.RECYCLE,
    RestartMethod.IN_PLACE,
    RestartMethod.EVICT,
    RestartMethod.DELETE,
)
SKIPPED, FAILED, RECOVERED, NOT_RECOVERED = (
    RestartOutcome.SKIPPED,
    RestartOutcome.FAILED,
    RestartOutcome.RECOVERED,
    RestartOutcome.NOT_RECOVERED,
)


def condition(type_: str, status: ConditionStatus, seconds: float = 0) -> Condition:
    return Condition(type=type_, status=status, reason="x", last_transition_time=ago(seconds))


def acting(method: RestartMethod, seconds: float = 5, **fields: Any) -> Restart:
    """A restart whose step began so long ago; the agent's boot was ``boot-speech-a``."""
    status = RestartStatus(
        observed_generation=1,
        conditions=[
            condition("Admitted", ConditionStatus.TRUE, seconds),
            condition("Drained", ConditionStatus.UNKNOWN, seconds),
            condition("Restarted", ConditionStatus.FALSE, seconds),
            condition("Recovered", ConditionStatus.UNKNOWN, seconds),
        ],
        attempts=[Attempt(method=method, start_time=ago(seconds))],
        before=MemoryFigures(used="9Gi", residual="9Gi", boot_id="boot-speech-a"),
        start_time=ago(seconds),
    )
    return make_restart(POD, method=method, created=ago(seconds + 5), status=status, **fields)


def verifying(method: RestartMethod, seconds: float = 20) -> Restart:
    """A restart whose step was seen to be carried out so long ago."""
    restart = acting(method, seconds + 10)
    conditions = [
        one if one.type != "Restarted" else condition("Restarted", ConditionStatus.TRUE, seconds)
        for one in restart.status.conditions
    ]
    return replace(restart, status=structs.replace(restart.status, conditions=conditions))


def id_of(restart: Restart) -> str:
    return f"{restart.name}.{restart.uid}.{restart.status.attempts[0].method.lower()}"


def seen(restart: Restart, pod: Pod | None = POD, **agent: Any) -> Snapshot:
    """The restart with one pod, whose agent says this."""
    pods = () if pod is None else (pod,)
    residual = agent.pop("residual_gib", 9.0)
    agents = () if pod is None else (make_agent(pod, residual, **agent),)
    return make_snapshot(pods=pods, agents=agents, restarts=(restart,))


def result(snapshot: Snapshot) -> RestartStatus:
    writes = [one for one in plan(snapshot, NOW).actions if isinstance(one, PatchRestartStatus)]
    return writes[0].status if writes else snapshot.restarts[0].status


def conditions_of(status: RestartStatus) -> dict[str, tuple[str, str]]:
    return {one.type: (str(one.status), one.reason) for one in status.conditions}


# --- acting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message", "drained", "restarted"),
    [
        pytest.param(
            ActionState.DRAINING,
            "",
            ("False", "Draining"),
            ("False", "x"),
            id="draining says so",
        ),
        pytest.param(
            ActionState.ACTING, "", ("True", "Drained"), ("False", "x"), id="acting has drained"
        ),
        pytest.param(
            ActionState.ACTING,
            "cut after 300 s: whisper 2 requests",
            ("True", "DrainTimeout"),
            ("False", "x"),
            id="acting past the deadline names what it cut",
        ),
        pytest.param(
            ActionState.DONE,
            "",
            ("True", "Drained"),
            ("True", "Restarted"),
            id="done is restarted",
        ),
    ],
)
def test_the_agents_progress_is_shown(
    state: ActionState, message: str, drained: Any, restarted: Any
) -> None:
    restart = acting(RECYCLE)
    action = make_action(id_of(restart), state, message=message)
    found = conditions_of(result(seen(restart, action=action)))
    assert found["Drained"] == drained
    assert found["Restarted"] == restarted


def test_an_action_of_another_restart_is_not_ours() -> None:
    status = result(seen(acting(RECYCLE), action=make_action("other", ActionState.DONE)))
    assert conditions_of(status)["Restarted"] == ("False", "x")


def test_an_action_that_failed_takes_the_next_step() -> None:
    restart = acting(RECYCLE)
    action = make_action(id_of(restart), ActionState.FAILED, message="no template")
    status = result(seen(restart, action=action))
    assert status.attempts[0].message == "the agent failed: no template"
    assert status.outcome is FAILED  # the method is Recycle alone


def test_a_container_that_restarted_by_itself_counts_as_restarted() -> None:
    status = result(seen(acting(RECYCLE), residual_gib=1.0, boot_id="next"))
    assert status.outcome is RECOVERED
    restarted = next(one for one in status.conditions if one.type == "Restarted")
    assert "by itself" in restarted.message


@pytest.mark.parametrize("method", [RECYCLE, IN_PLACE])
def test_a_pod_that_went_away_meanwhile_is_skipped(method: RestartMethod) -> None:
    for restart in (acting(method), verifying(method)):
        status = result(seen(restart, None))
        assert status.outcome is SKIPPED
        assert "went away" in status.conditions[-1].message or "went away" in str(status)


@pytest.mark.parametrize(
    ("method", "seconds"), [(RECYCLE, 300 + 120), (IN_PLACE, 300 + 900), (EVICT, 300 + 900)]
)
def test_a_step_that_never_ends_is_given_up(method: RestartMethod, seconds: float) -> None:
    assert result(seen(acting(method, seconds - 1))).outcome is None
    status = result(seen(acting(method, seconds)))
    assert status.outcome is FAILED
    assert f"{method} did not end by 2026-11-23T12:00:00Z" in status.attempts[0].message


def test_silence_never_leads_to_a_harder_step() -> None:
    restart = acting(RECYCLE, 420)
    restart = replace(restart, spec=structs.replace(restart.spec, method=RestartMethod.AUTO))
    assert result(seen(restart, now=ago(31))).outcome is FAILED
    spoken = result(seen(restart))
    assert spoken.outcome is None
    assert spoken.attempts[0].result is FAILED


# --- eviction -------------------------------------------------------------------------------------


def evicting(**answer: Any) -> Snapshot:
    restart = acting(EVICT, trigger=RestartTrigger.MANUAL)
    answers = (make_answer(POD, **answer),) if answer else ()
    return replace(seen(restart), evictions=answers)


@pytest.mark.parametrize(
    ("answer", "evicts"),
    [
        pytest.param({}, True, id="nobody was asked yet"),
        pytest.param({"at": ago(1)}, True, id="a dry run said yes"),
        pytest.param({"at": ago(1), "dry_run": False}, False, id="it was evicted a second ago"),
        pytest.param({"at": ago(15), "dry_run": False}, True, id="it was, and is still there"),
    ],
)
def test_an_eviction(answer: dict[str, Any], evicts: bool) -> None:
    restart = acting(EVICT, 60, trigger=RestartTrigger.MANUAL)
    answers = (make_answer(POD, **answer),) if answer else ()
    planned = plan(replace(seen(restart), evictions=answers), NOW)
    assert any(isinstance(one, Evict) for one in planned.actions) is evicts


def removing(method: RestartMethod, seconds: float, **agent: Any) -> Snapshot:
    """A step that takes the pod away, begun so long ago, with a minute for what is accepted."""
    restart = acting(method, seconds, trigger=RestartTrigger.MANUAL, drain_timeout_seconds=60)
    snapshot = seen(restart, **agent)
    return replace(snapshot, settings=make_settings(allow_delete=True))


BUSY = {"idle": False, "models": [make_model(in_flight=1, queued=2)]}


@pytest.mark.parametrize("method", [EVICT, DELETE])
@pytest.mark.parametrize(
    ("seconds", "agent", "goes", "drained"),
    [
        pytest.param(5, {}, True, "NothingToDrain", id="nothing runs"),
        pytest.param(5, BUSY, False, "Draining", id="three requests are waited for"),
        pytest.param(59, BUSY, False, "Draining", id="until a second before the deadline"),
        pytest.param(60, BUSY, True, "DrainTimeout", id="and no longer"),
        pytest.param(5, {"idle": False}, False, "Draining", id="a wrapped application is at work"),
        pytest.param(5, {**BUSY, "now": ago(31)}, True, "NothingToDrain", id="nobody can say"),
    ],
)
def test_a_pod_goes_once_what_it_has_accepted_is_done_or_its_time_is_over(
    method: RestartMethod, seconds: float, agent: dict[str, Any], goes: bool, drained: str
) -> None:
    snapshot = removing(method, seconds, **agent)
    actions = plan(snapshot, NOW).actions
    assert any(isinstance(one, Evict | DeletePod) for one in actions) is goes
    assert conditions_of(result(snapshot))["Drained"][1] == drained


def test_what_the_deadline_did_not_wait_for_is_named_and_stays_named() -> None:
    status = result(removing(EVICT, 60, **BUSY))
    drained = next(one for one in status.conditions if one.type == "Drained")
    assert "within 60 s" in drained.message
    assert "whisper has 3 requests" in drained.message
    gone = replace(acting(EVICT, 70), status=status)
    after = next(one for one in result(seen(gone, None)).conditions if one.type == "Drained")
    assert after == drained


def test_an_eviction_that_is_blocked_after_all_is_withdrawn_and_waits() -> None:
    status = result(evicting(verdict=EvictionVerdict.BLOCKED, blocker="pdb", message="needs 1"))
    assert status.attempts == []
    assert status.outcome is None
    assert conditions_of(status)["Admitted"] == ("False", "PodDisruptionBudget")


def test_the_figures_after_an_eviction_are_the_replacements() -> None:
    new = make_pod(
        "speech-new",
        created=ago(15),
        ready_changed_at=ago(4),
        agent_running_since=ago(10),
    )
    status = result(seen(verifying(EVICT), new, residual_gib=0.5))
    assert status.outcome is RECOVERED
    assert status.after == MemoryFigures(used="512Mi", residual="512Mi", boot_id="boot-speech-new")
    assert status.reclaimed == "8704Mi"
    assert status.downtime_seconds == 26  # asked for thirty seconds ago, ready four seconds ago


def test_an_older_pod_is_no_replacement() -> None:
    assert result(seen(verifying(EVICT), make_pod("speech-old"))).outcome is None


# --- verifying ------------------------------------------------------------------------------------


def measured(restart: Restart, pod: Pod = POD, **agent: Any) -> RestartStatus:
    """What is found when the agent says that our action was done, and this besides."""
    action = make_action(
        id_of(restart), ActionState.DONE, agent.pop("done_at", ago(15)), step=ActionStep.RECYCLE
    )
    return result(seen(restart, pod, **{"action": action, **agent}))


@pytest.mark.parametrize(
    ("restart", "agent", "outcome"),
    [
        pytest.param(verifying(RECYCLE), {"residual_gib": 8.0}, RECOVERED, id="at the threshold"),
        pytest.param(
            verifying(RECYCLE, 1),
            {"residual_gib": 1.0, "idle": False},
            RECOVERED,
            id="low at once, even at work",
        ),
        pytest.param(verifying(RECYCLE), {}, NOT_RECOVERED, id="still high"),
        pytest.param(verifying(RECYCLE, 9), {}, None, id="high, but not settled"),
        pytest.param(verifying(RECYCLE), {"idle": False}, None, id="high, but at work"),
        pytest.param(
            verifying(RECYCLE),
            {"residual_gib": 1.0, "source": ResidualSource.UNKNOWN},
            None,
            id="low, of an unknown source",
        ),
        pytest.param(
            verifying(RECYCLE), {"residual_gib": 1.0, "now": ago(31)}, None, id="low, but stale"
        ),
        pytest.param(
            verifying(RECYCLE),
            {"residual_gib": 1.0, "done_at": NOW + timedelta(seconds=1)},
            None,
            id="low, but observed before it was done",
        ),
        pytest.param(
            verifying(RECYCLE, 300), {"idle": False}, FAILED, id="never quiet within its time"
        ),
        pytest.param(verifying(RECYCLE, 300), {"now": ago(31)}, FAILED, id="never heard of again"),
    ],
)
def test_a_recycle_is_measured(
    restart: Restart, agent: dict[str, Any], outcome: RestartOutcome | None
) -> None:
    assert measured(restart, **agent).outcome is outcome


def losing_gpu(seconds: float, *, falls_back: bool = False) -> Any:
    """What an agent knows whose GPU is missing from its reports for so long."""
    agent = make_agent(POD, 0.5, boot_id="next")
    assert agent.report is not None
    assert agent.gpus == {"GPU-1"}
    (gpu,) = agent.report.devices
    cpu = structs.replace(gpu, uuid="CPU-0", kind=DeviceKind.CPU)
    for age in (seconds, seconds / 2, 0):
        devices = [cpu] if falls_back else []
        report = structs.replace(agent.report, devices=devices, observed_at=rfc3339(ago(age - 1)))
        agent = hear(agent, report, ago(age), 600)
    return agent


@pytest.mark.parametrize("falls_back", [False, True], ids=["no device", "the CPU instead"])
@pytest.mark.parametrize(
    ("seconds", "attempts"),
    [
        pytest.param(29, [(IN_PLACE, None)], id="a driver may be slow to answer"),
        pytest.param(30, [(IN_PLACE, NOT_RECOVERED)], id="for half a minute it is gone"),
    ],
)
def test_a_pod_without_its_gpu_has_not_recovered(
    seconds: float, attempts: Any, falls_back: bool
) -> None:
    restart = replace(verifying(IN_PLACE, 40), spec=make_restart(POD).spec)
    agents = (losing_gpu(seconds, falls_back=falls_back),)
    status = result(replace(seen(restart), agents=agents))
    assert [(one.method, one.result) for one in status.attempts][:1] == attempts
    if seconds == 30:
        assert "GPU-1 is gone from the node" in status.attempts[0].message


@pytest.mark.parametrize("method", [RestartMethod.AUTO, RECYCLE])
def test_a_restart_of_a_pod_whose_gpu_is_gone_begins_with_the_eviction(
    method: RestartMethod,
) -> None:
    restart = make_restart(POD, method=method, trigger=RestartTrigger.MANUAL)
    snapshot = make_snapshot(pods=(POD,), agents=(losing_gpu(30),), restarts=(restart,))
    status = result(replace(snapshot, evictions=(make_answer(POD),)))
    first, *others = status.attempts
    assert first.result is FAILED
    assert "only a new pod gets another GPU" in first.message
    assert [one.method for one in others] == ([EVICT] if method is RestartMethod.AUTO else [])
    assert (status.outcome is FAILED) is (method is RECYCLE)


def test_a_gpu_that_is_back_is_not_gone() -> None:
    agent = losing_gpu(60)
    back = make_agent(POD).report
    assert back is not None
    later = structs.replace(back, observed_at=rfc3339(ago(-5)))
    assert hear(agent, later, NOW, 600).gpus_missing_since is None


def test_without_a_threshold_a_report_of_the_new_boot_is_enough() -> None:
    workload = make_workload(spec=make_template_spec(restart=make_policy(residual=None)))
    snapshot = seen(verifying(IN_PLACE), residual_gib=20.0, boot_id="next")
    assert result(replace(snapshot, workload=workload)).outcome is RECOVERED


def test_a_container_that_exited_is_waited_for_until_its_pod_is_ready() -> None:
    away = replace(POD, ready=False, ready_changed_at=ago(12), unready_since=ago(12))
    restart = verifying(IN_PLACE, 10)
    assert result(seen(restart, away, residual_gib=0.5, boot_id="next")).outcome is None
    back = replace(away, ready=True, ready_changed_at=ago(2))
    status = result(seen(restart, back, residual_gib=0.5, boot_id="next"))
    assert status.outcome is RECOVERED
    assert status.downtime_seconds == 10


def test_a_downtime_that_no_watch_saw_begins_when_the_container_ended() -> None:
    pod = replace(POD, ready_changed_at=ago(2), agent_finished_at=ago(9))
    status = result(seen(verifying(IN_PLACE, 5), pod, residual_gib=0.5, boot_id="next"))
    assert status.downtime_seconds == 7


def test_a_pod_that_was_not_ready_before_need_not_be_after() -> None:
    pod = replace(POD, ready=False, ready_changed_at=ago(5000))
    assert measured(verifying(RECYCLE), pod, residual_gib=1.0).outcome is RECOVERED


def test_reclaimed_is_never_below_zero() -> None:
    workload = make_workload(spec=make_template_spec(restart=make_policy(residual=None)))
    snapshot = seen(verifying(IN_PLACE), residual_gib=20.0, boot_id="next")
    assert result(replace(snapshot, workload=workload)).reclaimed == "0"


def test_a_busy_model_keeps_its_place_in_the_drain_message() -> None:
    restart = acting(RECYCLE)
    action = make_action(id_of(restart), ActionState.DRAINING)
    busy = seen(restart, action=action, models=[make_model(in_flight=2)])
    drained = next(one for one in result(busy).conditions if one.type == "Drained")
    assert drained.message == "accepted requests are being finished"
