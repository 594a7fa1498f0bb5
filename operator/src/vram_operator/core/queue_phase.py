"""The phase Queued: a restart waits for its first step, or for leave to take the next one.

Called by ``restarts``. What it waits for is found by ``admission``; here is what follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from vram_operator.api import (
    Condition,
    ConditionStatus,
    EventReason,
    Reason,
    RestartCondition,
    RestartMethod,
    RestartOutcome,
    RestartTrigger,
)
from vram_operator.core.admission import AGENT_STEPS, IN_LINE, Candidate, Wait, find_wait
from vram_operator.core.condition_list import Finding, find_condition
from vram_operator.core.evidence import EvidenceReason
from vram_operator.core.figures import name_some, show_time, whole_seconds
from vram_operator.core.phases import concerns, next_rung, rungs
from vram_operator.core.plan import Blocked, DryRunEvict, EmitEvent
from vram_operator.core.schedule import starting_deadline
from vram_operator.core.snapshot import ActiveRestart, Pod, Restart
from vram_operator.core.turn import (
    End,
    Turn,
    begin_attempt,
    change,
    climb,
    earliest,
    figures_of,
    finish,
    note,
)
from vram_operator.core.visit import Visit

POD_APPEARS = timedelta(seconds=15)
"""For so long after its creation a restart waits for a pod that no watch has shown yet."""
LOOKS_AGAIN = timedelta(seconds=10)
"""A restart that waits looks again after this, whatever it waits for."""
_UNSEEN = frozenset({Reason.PENDING, Reason.POD_NOT_FOUND, Reason.WORKLOAD_NOT_FOUND})
_DISPROOFS = frozenset({EvidenceReason.BELOW_THRESHOLD, EvidenceReason.THRESHOLD_TOO_LOW})


def find_restart_pod(visit: Visit, restart: Restart) -> Pod | None:
    """Return the pod that is meant, while it is there to stay."""
    return next((pod for pod in visit.pods if concerns(restart, pod)), None)


def advance_queued(visit: Visit, restart: Restart, active: tuple[ActiveRestart, ...]) -> Turn:
    """Give a queued restart its turn.

    1. Its pod is not there: it waits a moment for it, then it is over.
    2. It lost its reason (deadline passed, residual gone, step not allowed): it is over.
    3. Dry run: it ends with what would have been done.
    4. The next step is one that this agent does not do: the one after it.
    5. It has to wait: ``Admitted=False`` says for what.
    6. It is admitted.
    """
    pod = find_restart_pod(visit, restart)
    if pod is None:  # 1
        return _without_pod(visit, restart)
    end = _find_end(visit, restart, pod)
    if end is not None:  # 2
        return finish(visit, restart, end)
    method = next_rung(restart, allow_delete=visit.snapshot.settings.allow_delete)
    if method is None:  # pragma: no cover - a restart without a next step has an outcome
        raise AssertionError(f"restart {restart.name} has no next step")
    candidate = Candidate(restart=restart, pod=pod, method=method, active=active)
    if visit.dry_run:  # 3
        return _pretend(visit, candidate)
    obstacle = _find_obstacle(visit, candidate)
    if obstacle:  # 4
        return climb(visit, begin_attempt(visit, restart, method), RestartOutcome.FAILED, obstacle)
    wait = find_wait(visit, candidate)
    if wait is not None:  # 5
        return _hold(visit, candidate, wait)
    return _admit(visit, candidate)  # 6


def _without_pod(visit: Visit, restart: Restart) -> Turn:
    name, appears = restart.spec.pod.name, restart.created + POD_APPEARS
    first = restart.status.start_time is None
    if first and visit.now < appears and not _was_there(visit, restart):
        message = f"waiting for pod {name}"
        finding = Finding(
            RestartCondition.ADMITTED, ConditionStatus.FALSE, Reason.POD_NOT_FOUND, message
        )
        return Turn(restart=note(visit, restart, finding), requeue_at=appears)
    if first and not restart.spec.pod.uid and not _was_seen(restart):
        message = f"workload {restart.spec.workload} has no pod {name}"
        outcome, reason = RestartOutcome.FAILED, Reason.POD_NOT_FOUND
    else:
        message = f"pod {name} is gone, and its memory with it"
        outcome, reason = RestartOutcome.SKIPPED, Reason.POD_GONE
    return finish(visit, restart, End(outcome, RestartCondition.ADMITTED, reason, message))


def _was_seen(restart: Restart) -> bool:
    """Did the restart wait for something else than its pod?"""
    admitted = find_condition(restart.status.conditions, RestartCondition.ADMITTED)
    return admitted is not None and admitted.reason not in _UNSEEN


def _was_there(visit: Visit, restart: Restart) -> bool:
    """Is a pod of that name on its way out, so that no other is to be waited for?"""
    return any(pod.name == restart.spec.pod.name for pod in visit.snapshot.pods)


def _find_end(visit: Visit, restart: Restart, pod: Pod) -> End | None:
    """Return why the restart is over before its next step: branch 2."""
    admitted, spec = RestartCondition.ADMITTED, restart.spec
    if spec.method is RestartMethod.DELETE and not visit.snapshot.settings.allow_delete:
        message = "method Delete needs the operator's --allow-delete"
        return End(RestartOutcome.FAILED, admitted, Reason.DELETE_NOT_ALLOWED, message)
    if restart.status.start_time is not None:
        return None
    deadline = starting_time_limit(visit, restart)
    if deadline is not None and visit.now > deadline:
        message = f"it could not start by {show_time(deadline)}: {_last_word(restart)}"
        return End(RestartOutcome.SKIPPED, admitted, Reason.DEADLINE_PASSED, message)
    if spec.trigger is RestartTrigger.RESIDUAL:
        evidence = visit.evidence_of(pod)
        if evidence is None:
            message = "restart.residual is not set any more"
            return End(RestartOutcome.SKIPPED, admitted, Reason.NO_THRESHOLD, message)
        if evidence.reason in _DISPROOFS:
            message = f"not needed any more: {evidence.message}"
            return End(RestartOutcome.SKIPPED, admitted, Reason.BELOW_THRESHOLD, message)
    return None


def starting_time_limit(visit: Visit, restart: Restart) -> datetime | None:
    """Return until when a scheduled restart may start; None for the others."""
    if restart.spec.trigger is not RestartTrigger.SCHEDULED or restart.spec.scheduled_time is None:
        return None
    return starting_deadline(restart.spec.scheduled_time, visit.policy, visit.jitter)


def _last_word(restart: Restart) -> str:
    admitted = find_condition(restart.status.conditions, RestartCondition.ADMITTED)
    return f"{admitted.reason}: {admitted.message}" if admitted is not None else "never looked at"


def _find_obstacle(visit: Visit, candidate: Candidate) -> str:
    """Return why the step is of no use at all; empty when it is.

    The pod keeps its place through the agent's own steps, so none brings back a GPU that is gone.
    """
    if candidate.method not in AGENT_STEPS:
        return ""
    lost = visit.lost_gpus(candidate.pod)
    if lost:
        return say_lost(lost)
    if not candidate.pod.control_port:
        return "the pod has no control port"
    if visit.agent_of(candidate.pod.uid).refuses:
        return "the agent refuses the operator's calls"
    return ""


def say_lost(uuids: Sequence[str]) -> str:
    """Say that GPUs are gone, and what helps."""
    return f"{name_some(uuids)} is gone from the node: only a new pod gets another GPU"


def _pretend(visit: Visit, candidate: Candidate) -> Turn:
    """End a dry run with what would be done. Whether a budget forbids it is really asked.

    A dry-run eviction changes nothing, so that too may be known.
    """
    wait = find_wait(visit, candidate)
    if wait is not None and wait.ask:
        return _hold(visit, candidate, wait)
    what = _say_steps(visit, candidate)
    if wait is not None:
        what = f"{what}; it would wait: {wait.reason}: {wait.message}"
    end = End(RestartOutcome.DRY_RUN, RestartCondition.ADMITTED, Reason.DRY_RUN, what)
    return finish(visit, candidate.restart, end)


def _say_steps(visit: Visit, candidate: Candidate) -> str:
    """Return the step, and those that would follow while it does not help."""
    spec, name = candidate.restart.spec, candidate.pod.name
    allow_delete = visit.snapshot.settings.allow_delete
    ladder = rungs(spec.method, spec.trigger, allow_delete=allow_delete)
    later = ladder[ladder.index(candidate.method) + 1 :]
    obstacle = _find_obstacle(visit, candidate)
    doing = f"would {candidate.method} pod {name}"
    said = ": ".join(filter(None, (doing, spec.reason)))
    if obstacle:
        said = f"{said}; that is of no use ({obstacle})"
    return f"{said}; then {', '.join(later)} while it does not help" if later else said


def _hold(visit: Visit, candidate: Candidate, wait: Wait) -> Turn:
    restart, pod = candidate.restart, candidate.pod
    before = find_condition(restart.status.conditions, RestartCondition.ADMITTED)
    pending = wait.reason is Reason.PENDING
    status = ConditionStatus.UNKNOWN if pending else ConditionStatus.FALSE
    finding = Finding(RestartCondition.ADMITTED, status, wait.reason, wait.message, wait.figures)
    event = EmitEvent(
        reason=EventReason.RESTART_BLOCKED,
        message=f"{restart.name}: {wait.reason}: {finding.text}",
        pod=pod.name,
    )
    deadline = starting_time_limit(visit, restart) if candidate.is_first else None
    past_deadline = None if deadline is None else deadline + timedelta(seconds=1)
    return Turn(
        restart=note(visit, restart, finding),
        actions=(DryRunEvict(pod=pod),) if wait.ask else (),
        events=(event,) if not pending and _is_news(before, wait) else (),
        blocked=None
        if pending
        else Blocked(
            pod=pod.name,
            restart=restart.name,
            reason=wait.reason,
            message=wait.message,
            figures=wait.figures,
        ),
        # What frees a place in another workload is no news of this one.
        requeue_at=earliest([wait.requeue_at, past_deadline, visit.now + LOOKS_AGAIN]),
    )


def _is_news(before: Condition | None, wait: Wait) -> bool:
    """Is what a restart waits for worth an Event? Not which of the others it is behind now."""
    if before is None:
        return True
    return before.reason != wait.reason and not {before.reason, wait.reason} <= IN_LINE


def _admit(visit: Visit, candidate: Candidate) -> Turn:
    pod, method = candidate.pod, candidate.method
    restart = begin_attempt(visit, candidate.restart, method)
    report = visit.agent_of(pod.uid).report
    if candidate.is_first:
        restart = change(restart, start_time=whole_seconds(visit.now))
        if report is not None:
            restart = change(restart, before=figures_of(report))
    elif report is not None:
        restart = change(restart, after=figures_of(report))
    doing = f"{method} of pod {pod.name}"
    unknown = ConditionStatus.UNKNOWN
    restart = note(
        visit,
        restart,
        Finding(RestartCondition.ADMITTED, ConditionStatus.TRUE, Reason.ADMITTED, doing),
        Finding(RestartCondition.DRAINED, unknown, Reason.PENDING),
        Finding(
            RestartCondition.RESTARTED, ConditionStatus.FALSE, Reason.RESTART_IN_PROGRESS, doing
        ),
        Finding(RestartCondition.RECOVERED, unknown, Reason.PENDING),
    )
    event = EmitEvent(
        reason=EventReason.RESTARTING,
        message=": ".join(filter(None, (restart.name, doing, restart.spec.reason))),
        pod=pod.name,
    )
    return Turn(restart=restart, events=(event,))
