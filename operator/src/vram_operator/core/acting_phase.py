"""The phase Acting: a step was admitted and is being carried out.

Called by ``restarts``. Steps of the agent (Recycle, InPlace) are asked for by a call that the agent
remembers by its ID; the others by the Eviction API or a delete with the pod's UID. Each is asked
for again until it shows, and none for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from http import HTTPStatus

from vram_agent.protocol import ActionReport, ActionState, ActionStep, Report

from vram_operator.api import (
    ConditionStatus,
    Reason,
    RestartCondition,
    RestartMethod,
    RestartOutcome,
)
from vram_operator.core.admission import AGENT_STEPS, ANSWER_COUNTS
from vram_operator.core.condition_list import Finding, is_true
from vram_operator.core.figures import name_some, show_time
from vram_operator.core.phases import boot_before, open_attempt, restart_id
from vram_operator.core.plan import Action, CallRecycle, CallRestart, DeletePod, Evict
from vram_operator.core.queue_phase import find_restart_pod
from vram_operator.core.snapshot import (
    CallAnswer,
    EvictionAnswer,
    EvictionVerdict,
    Pod,
    Restart,
)
from vram_operator.core.turn import End, Turn, change, climb, earliest, end_attempt, finish, note
from vram_operator.core.visit import Visit

CALL_AGAIN = timedelta(seconds=10)
"""A call that did not get through is repeated after this."""
SHOWS_WITHIN = timedelta(seconds=30)
"""A call that was taken shows in the report within this, else it is repeated."""
STEP_SECONDS: Mapping[RestartMethod, int] = {
    RestartMethod.RECYCLE: 120,
    RestartMethod.IN_PLACE: 900,  # the kubelet may back off for 300 s and pull nothing
    RestartMethod.EVICT: 900,  # until the pod is gone; its grace period may be long
    RestartMethod.DELETE: 900,
}
"""How long a step may take beyond its drain before the restart is given up."""


def advance_acting(visit: Visit, restart: Restart) -> Turn:
    """Give a restart whose step is under way its turn."""
    if open_attempt(restart.status).method in AGENT_STEPS:
        return _advance_agent_step(visit, restart)
    return _advance_removal(visit, restart)


def _advance_agent_step(visit: Visit, restart: Restart) -> Turn:
    """Recycle and InPlace.

    1. The pod went away meanwhile: there is nothing left to restart.
    2. Another boot of the agent reports: the container restarted, at our word or by itself.
    3. The agent shows our action: it drains, acts, is done, or failed.
    4. The agent refused the call for good: the next step.
    5. The time is over: with word from the agent the next step, without it Failed.
    6. The call is made, or made again.
    """
    pod = find_restart_pod(visit, restart)
    if pod is None:  # 1
        message = f"pod {restart.spec.pod.name} went away meanwhile"
        end = End(RestartOutcome.SKIPPED, RestartCondition.RESTARTED, Reason.POD_GONE, message)
        return finish(visit, restart, end)
    method = open_attempt(restart.status).method
    id_ = restart_id(restart, method)
    agent = visit.agent_of(pod.uid)
    report = visit.fresh_report(agent)
    action = None if report is None else report.action
    ours = action if action is not None and action.restart_id == id_ else None
    if report is not None and report.agent.boot_id != boot_before(restart.status):  # 2
        return _done(visit, restart, _say_new_boot(method, ours), ours)
    if ours is not None and report is not None:  # 3
        return _follow(visit, restart, ours, report)
    return _ask_agent(visit, restart, pod, report)


def _ask_agent(visit: Visit, restart: Restart, pod: Pod, report: Report | None) -> Turn:
    """Branches 4 to 6: the agent does not show our action."""
    id_ = restart_id(restart, open_attempt(restart.status).method)
    answers = [one for one in visit.agent_of(pod.uid).calls if one.restart_id == id_]
    answer = max(answers, key=lambda one: one.at, default=None)
    if answer is not None and _is_final_refusal(answer):  # 4
        message = f"the agent answered {answer.status}: {answer.message}"
        return climb(visit, restart, RestartOutcome.FAILED, message)
    deadline = _deadline(restart)
    if visit.now >= deadline:  # 5
        return _give_up(visit, restart, report)
    again = _call_again_at(answer)
    if report is None or (again is not None and again > visit.now):
        return Turn(restart=restart, requeue_at=earliest([again, deadline]))
    return Turn(restart=restart, actions=(_call(restart, pod, id_),), requeue_at=deadline)  # 6


def _say_new_boot(method: RestartMethod, ours: ActionReport | None) -> str:
    if ours is not None or method is RestartMethod.IN_PLACE:
        return "the container restarted"
    return "the container restarted by itself meanwhile"


def _follow(visit: Visit, restart: Restart, action: ActionReport, report: Report) -> Turn:
    """Branch 3: say how far the agent has come with our action."""
    if action.state is ActionState.FAILED:
        return climb(visit, restart, RestartOutcome.FAILED, f"the agent failed: {action.message}")
    if action.state is ActionState.DONE and action.step is ActionStep.RECYCLE:
        return _done(visit, restart, action.message or "the GPU processes were replaced", action)
    deadline = _deadline(restart)
    if visit.now >= deadline:
        return _give_up(visit, restart, report)
    if action.state is ActionState.DRAINING:
        count = sum(model.in_flight + model.queued for model in report.models)
        message = "accepted requests are being finished" if count else "nothing is left to finish"
        finding = Finding(RestartCondition.DRAINED, ConditionStatus.FALSE, Reason.DRAINING, message)
        return Turn(restart=note(visit, restart, finding), requeue_at=deadline)
    return Turn(restart=note(visit, restart, _drained(action)), requeue_at=deadline)


def _drained(action: ActionReport | None) -> Finding:
    """Say how the drain ended; past its deadline the agent's message names what it cut."""
    if action is None:
        return Finding(
            RestartCondition.DRAINED, ConditionStatus.TRUE, Reason.DRAINED, "by the agent"
        )
    reason = Reason.DRAIN_TIMEOUT if action.message.startswith("cut") else Reason.DRAINED
    return Finding(RestartCondition.DRAINED, ConditionStatus.TRUE, reason, action.message)


def _done(visit: Visit, restart: Restart, message: str, action: ActionReport | None) -> Turn:
    """The step was carried out; what it gave is for the agent to measure."""
    method = open_attempt(restart.status).method
    return Turn(
        restart=note(
            visit,
            restart,
            _drained(action),
            Finding(
                RestartCondition.RESTARTED,
                ConditionStatus.TRUE,
                Reason.RESTARTED,
                f"{method}: {message}",
            ),
            Finding(
                RestartCondition.RECOVERED,
                ConditionStatus.UNKNOWN,
                Reason.MEASURING,
                "waiting for the agent's measurement",
            ),
        )
    )


def _is_final_refusal(answer: CallAnswer) -> bool:
    if answer.status in {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}:
        return False
    return (
        HTTPStatus.BAD_REQUEST <= answer.status < HTTPStatus.INTERNAL_SERVER_ERROR
        or answer.status == HTTPStatus.NOT_IMPLEMENTED
    )


def _call_again_at(answer: CallAnswer | None) -> datetime | None:
    """Return when to call again; None for now."""
    if answer is None:
        return None
    taken = HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES
    return answer.at + (SHOWS_WITHIN if taken else CALL_AGAIN)


def _call(restart: Restart, pod: Pod, id_: str) -> Action:
    in_place = open_attempt(restart.status).method is RestartMethod.IN_PLACE
    call = CallRestart if in_place else CallRecycle
    return call(
        pod=pod,
        restart_name=restart.name,
        restart_id=id_,
        drain_timeout_seconds=restart.spec.drain_timeout_seconds,
    )


def _deadline(restart: Restart) -> datetime:
    attempt = open_attempt(restart.status)
    seconds = restart.spec.drain_timeout_seconds + STEP_SECONDS[attempt.method]
    return attempt.start_time + timedelta(seconds=seconds)


def _give_up(visit: Visit, restart: Restart, report: Report | None) -> Turn:
    """The step's time is over. Silence proves nothing, so it never leads to a harder step."""
    attempt = open_attempt(restart.status)
    message = f"{attempt.method} did not end by {show_time(_deadline(restart))}"
    if report is not None:
        return climb(visit, restart, RestartOutcome.FAILED, message)
    silent = f"{message}, and the agent does not report"
    end = End(RestartOutcome.FAILED, RestartCondition.RESTARTED, Reason.NO_REPORT, silent)
    return finish(visit, end_attempt(visit, restart, RestartOutcome.FAILED, silent), end)


def _advance_removal(visit: Visit, restart: Restart) -> Turn:
    """Evict and Delete.

    1. The pod is gone or on its way out: the replacement is to be measured.
    2. The real eviction was blocked after all: the step is withdrawn, and it waits again.
    3. The time is over: the next step.
    4. Requests run or wait, and their time is not over: they are waited for. The pod stays ready
    meanwhile: a budget that lets a ready pod go may not let one go that is not.
    5. The pod is evicted or deleted, or again.
    """
    pod = find_restart_pod(visit, restart)
    attempt = open_attempt(restart.status)
    if pod is None:  # 1
        return _removed(visit, restart)
    answer = visit.snapshot.find_eviction(pod.uid)
    if answer is not None and answer.at < attempt.start_time:
        answer = None
    if answer is not None and _is_blocked(answer):  # 2
        withdrawn = change(restart, attempts=restart.status.attempts[:-1])
        finding = Finding(
            RestartCondition.ADMITTED,
            ConditionStatus.FALSE,
            Reason.POD_DISRUPTION_BUDGET,
            f"the eviction was refused after all: {answer.message}",
        )
        return Turn(restart=note(visit, withdrawn, finding))
    deadline = _deadline(restart)
    if visit.now >= deadline:  # 3
        message = f"{attempt.method} did not end by {show_time(deadline)}"
        return climb(visit, restart, RestartOutcome.FAILED, message)
    if answer is not None and not answer.dry_run and visit.now < answer.at + ANSWER_COUNTS:
        return Turn(restart=restart, requeue_at=answer.at + ANSWER_COUNTS)
    report = visit.fresh_report(visit.agent_of(pod.uid))
    busy = "" if report is None else _say_busy(report)
    drained_by = attempt.start_time + timedelta(seconds=restart.spec.drain_timeout_seconds)
    if busy and visit.now < drained_by:  # 4
        finding = Finding(
            RestartCondition.DRAINED,
            ConditionStatus.FALSE,
            Reason.DRAINING,
            f"what is accepted is waited for until {show_time(drained_by)}",
            busy,
        )
        return Turn(restart=note(visit, restart, finding), requeue_at=drained_by)
    restart = note(visit, restart, _drain_before_removal(restart, busy))
    action: Action
    if attempt.method is RestartMethod.DELETE:
        action = DeletePod(pod=pod, restart_name=restart.name)
    else:
        action = Evict(pod=pod, restart_name=restart.name)
    return Turn(restart=restart, actions=(action,), requeue_at=visit.now + ANSWER_COUNTS)  # 5


def _say_busy(report: Report) -> str:
    """Return what an agent is still at; empty when it is idle."""
    counts = {model.name: model.in_flight + model.queued for model in report.models}
    at_work = [f"{name} has {count} requests" for name, count in counts.items() if count]
    if at_work:
        return name_some(at_work)
    return "" if report.idle else "the agent is not idle"


def _drain_before_removal(restart: Restart, busy: str) -> Finding:
    """Say how the wait ended. What runs still has the pod's own grace period after it."""
    if not busy:
        message = "what is accepted from now on has the pod's grace period"
        return Finding(
            RestartCondition.DRAINED, ConditionStatus.TRUE, Reason.NOTHING_TO_DRAIN, message
        )
    return Finding(
        RestartCondition.DRAINED,
        ConditionStatus.TRUE,
        Reason.DRAIN_TIMEOUT,
        f"not all was finished within {restart.spec.drain_timeout_seconds} s; what is left has the "
        "pod's grace period",
        busy,
    )


def _is_blocked(answer: EvictionAnswer) -> bool:
    return answer.verdict in {EvictionVerdict.BLOCKED, EvictionVerdict.FAILED}


def _drained_at_last(restart: Restart) -> tuple[Finding, ...]:
    """Say that the pod's own end drained it, where nothing was said before it went."""
    if is_true(restart.status.conditions, RestartCondition.DRAINED):
        return ()
    message = "the agent drains when the pod is told to end"
    return (
        Finding(RestartCondition.DRAINED, ConditionStatus.TRUE, Reason.NOTHING_TO_DRAIN, message),
    )


def _removed(visit: Visit, restart: Restart) -> Turn:
    method = open_attempt(restart.status).method
    message = f"{method}: pod {restart.spec.pod.name} is gone or ends within its grace period"
    return Turn(
        restart=note(
            visit,
            restart,
            *_drained_at_last(restart),
            Finding(RestartCondition.RESTARTED, ConditionStatus.TRUE, Reason.RESTARTED, message),
            Finding(
                RestartCondition.RECOVERED,
                ConditionStatus.UNKNOWN,
                Reason.MEASURING,
                "waiting for the replacement's first report",
            ),
        )
    )
