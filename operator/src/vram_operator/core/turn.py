"""What one restart's turn gives, and the few ways in which its status changes.

Why it exists: the phases write conditions, attempts, outcomes and Events in one manner. Called by
the phases. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from msgspec import structs
from vram_agent.protocol import Report

from vram_operator.api import (
    Attempt,
    ConditionStatus,
    EventReason,
    MemoryFigures,
    Reason,
    RestartCondition,
    RestartMethod,
    RestartOutcome,
)
from vram_operator.core.condition_list import Finding, find_condition, with_findings
from vram_operator.core.figures import whole_mebibytes, whole_seconds
from vram_operator.core.phases import next_rung
from vram_operator.core.plan import Action, Blocked, EmitEvent, EventType
from vram_operator.core.snapshot import Restart
from vram_operator.core.visit import Visit

_MESSAGE_CHARACTERS = 1024

_EVENTS = {
    RestartOutcome.RECOVERED: (EventReason.RESTARTED, EventType.NORMAL),
    RestartOutcome.NOT_RECOVERED: (EventReason.RESTART_NOT_RECOVERED, EventType.WARNING),
    RestartOutcome.FAILED: (EventReason.RESTART_NOT_RECOVERED, EventType.WARNING),
    RestartOutcome.SKIPPED: (EventReason.RESTART_SKIPPED, EventType.NORMAL),
    RestartOutcome.DRY_RUN: (EventReason.RESTART_SKIPPED, EventType.NORMAL),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The restart as it should be, and what to do once its status is written."""

    restart: Restart
    actions: tuple[Action, ...] = ()
    events: tuple[EmitEvent, ...] = ()
    blocked: Blocked | None = None
    requeue_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class End:
    """How a restart ends: the outcome, and the condition that says why."""

    outcome: RestartOutcome
    condition: RestartCondition
    reason: Reason
    message: str


def note(visit: Visit, restart: Restart, *findings: Finding) -> Restart:
    """Return the restart with these findings among its conditions; all four are always there."""
    seen = restart.status.conditions
    unseen = [
        Finding(type_, ConditionStatus.UNKNOWN, Reason.PENDING)
        for type_ in RestartCondition
        if find_condition(seen, type_) is None
    ]
    conditions = with_findings(seen, unseen, restart.generation, visit.now)
    conditions = with_findings(conditions, findings, restart.generation, visit.now)
    status = structs.replace(
        restart.status, conditions=conditions, observed_generation=restart.generation
    )
    return replace(restart, status=status)


def change(restart: Restart, **fields: object) -> Restart:
    """Return the restart with these fields of its status changed."""
    return replace(restart, status=structs.replace(restart.status, **fields))


def begin_attempt(visit: Visit, restart: Restart, method: RestartMethod) -> Restart:
    """Return the restart with a new step under way."""
    attempt = Attempt(method=method, start_time=whole_seconds(visit.now))
    return change(restart, attempts=[*restart.status.attempts, attempt])


def end_attempt(visit: Visit, restart: Restart, result: RestartOutcome, message: str) -> Restart:
    """Return the restart with its open step ended."""
    ended = structs.replace(
        restart.status.attempts[-1],
        end_time=whole_seconds(visit.now),
        result=result,
        message=message[:_MESSAGE_CHARACTERS],
    )
    return change(restart, attempts=[*restart.status.attempts[:-1], ended])


def climb(visit: Visit, restart: Restart, result: RestartOutcome, message: str) -> Turn:
    """End the open step without success; queue the next one, or end the restart.

    A restart that was measured and still holds too much is NotRecovered; one of which no step
    could be carried out is Failed.
    """
    restart = end_attempt(visit, restart, result, message)
    following = next_rung(restart, allow_delete=visit.snapshot.settings.allow_delete)
    if following is not None:
        pending = f"{message}; next: {following}"
        finding = Finding(
            RestartCondition.ADMITTED, ConditionStatus.UNKNOWN, Reason.PENDING, pending
        )
        return Turn(restart=note(visit, restart, finding))
    if any(one.result is RestartOutcome.NOT_RECOVERED for one in restart.status.attempts):
        reason, outcome = Reason.RESIDUAL_REMAINS, RestartOutcome.NOT_RECOVERED
    else:
        reason, outcome = Reason.STEP_FAILED, RestartOutcome.FAILED
    return finish(visit, restart, End(outcome, RestartCondition.RECOVERED, reason, message))


def finish(visit: Visit, restart: Restart, end: End) -> Turn:
    """Return the restart with its outcome, and the Event that tells it."""
    holds = end.outcome is RestartOutcome.RECOVERED
    status = ConditionStatus.TRUE if holds else ConditionStatus.FALSE
    restart = note(visit, restart, Finding(end.condition, status, end.reason, end.message))
    restart = change(restart, outcome=end.outcome, completion_time=whole_seconds(visit.now))
    reason, type_ = _EVENTS[end.outcome]
    event = EmitEvent(
        reason=reason,
        message=f"{restart.name}: {end.outcome}: {end.message}",
        type=type_,
        pod=restart.spec.pod.name,
    )
    return Turn(restart=restart, events=(event,))


def figures_of(report: Report) -> MemoryFigures:
    """Return what a report says of the pod's memory, as a status keeps it."""
    return MemoryFigures(
        used=whole_mebibytes(report.memory.used_bytes),
        residual=whole_mebibytes(report.memory.residual_bytes),
        boot_id=report.agent.boot_id,
    )


def earliest(moments: Sequence[datetime | None]) -> datetime | None:
    """Return the earliest of the moments that are known."""
    return min((moment for moment in moments if moment is not None), default=None)
