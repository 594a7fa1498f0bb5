"""``plan(snapshot, now)``: the whole decision about one workload, as a story on one screen.

Called by ``reconcile`` and by nothing else. Pure and total: the same snapshot and moment give the
same plan, whatever the order of what is in it, and a plan that was carried out leaves nothing to
plan.
"""

from __future__ import annotations

from datetime import datetime

from vram_operator.api import EventReason
from vram_operator.core.breaker import count_failures
from vram_operator.core.conditions import (
    Progress,
    events_of,
    find_conditions,
    next_silence,
    tell_blocked,
)
from vram_operator.core.figures import show_time
from vram_operator.core.plan import (
    EmitEvent,
    EventType,
    PatchWorkloadStatus,
    Plan,
)
from vram_operator.core.restarts import advance_all
from vram_operator.core.retention import plan_retention
from vram_operator.core.snapshot import Snapshot
from vram_operator.core.status import make_status
from vram_operator.core.triggers import decide_restarts
from vram_operator.core.turn import earliest
from vram_operator.core.upkeep import plan_upkeep
from vram_operator.core.visit import begin_visit


def plan(snapshot: Snapshot, now: datetime) -> Plan:
    """Return what to do for the workload at ``now``, an aware UTC datetime."""
    visit = begin_visit(snapshot, now)

    # What the workload owns and what its agents run by is as the spec says.
    upkeep = plan_upkeep(visit)

    # Restarts that are open go on; then new ones are decided, and old ones go.
    turns = advance_all(visit)
    visit = visit.with_restarts(turns.restarts)
    decisions = decide_restarts(visit)
    removals, removal_at = plan_retention(visit)

    # What all this came to is said in the conditions, and in Events where they change.
    progress = Progress(
        restarts=turns.restarts,
        blocked=(*turns.blocked, *decisions.blocked),
        failures=count_failures(visit),
        next_restart_time=decisions.next_restart_time,
    )
    findings = find_conditions(visit, progress)
    old = snapshot.workload.status
    status = make_status(visit, findings, decisions.next_restart_time)
    changed = status != old
    write = PatchWorkloadStatus(status=status, resource_version=snapshot.workload.resource_version)

    # Intent is written before anything is done for it, and told once it is written.
    return Plan(
        actions=(
            *upkeep.actions,
            *decisions.actions,
            *turns.writes,
            *((write,) if changed else ()),
            *turns.events,
            *events_of(old.conditions, findings),
            *tell_blocked(old.conditions, progress),
            *_tell_missed(decisions.missed_run),
            *turns.actions,
            *removals,
            *upkeep.calls,
        ),
        status=status,
        requeue_at=_later_than(
            now,
            [
                upkeep.requeue_at,
                turns.requeue_at,
                decisions.requeue_at,
                removal_at,
                next_silence(visit),
            ],
        ),
        blocked=progress.blocked,
        missed_run=decisions.missed_run,
    )


def _tell_missed(run: datetime | None) -> tuple[EmitEvent, ...]:
    if run is None:
        return ()
    message = f"the scheduled restart of {show_time(run)} was missed, and its deadline is over"
    return (EmitEvent(reason=EventReason.RESTART_SKIPPED, message=message, type=EventType.WARNING),)


def _later_than(now: datetime, moments: list[datetime | None]) -> datetime | None:
    """Return the earliest moment that is still to come."""
    return earliest([moment for moment in moments if moment is not None and moment > now])
