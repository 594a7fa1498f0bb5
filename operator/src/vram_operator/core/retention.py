"""Which finished GPUPodRestarts are old enough to go.

Why it exists: they are the audit record and part of the memory of the triggers, so age alone does
not decide. Called by ``planning``.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from vram_operator.api import RESTART_ANNOTATION
from vram_operator.core.breaker import failure_streak
from vram_operator.core.plan import DeleteRestart
from vram_operator.core.snapshot import Restart
from vram_operator.core.triggers import HANDLED_ANNOTATION
from vram_operator.core.turn import earliest
from vram_operator.core.visit import Visit


def plan_retention(visit: Visit) -> tuple[tuple[DeleteRestart, ...], datetime | None]:
    """Return what to remove, and when the next one is due.

    Kept beyond ``--restart-ttl`` are:

    1. the last one of the workload;
    2. those that a schedule or a half-handled annotation would otherwise ask for again;
    3. those for which the workload is Degraded.
    """
    ended = [one for one in visit.snapshot.restarts if one.status.completion_time is not None]
    ended.sort(key=lambda one: (one.status.completion_time or visit.now, one.name))
    streak = failure_streak(visit)[: visit.policy.max_consecutive_failures]  # 3
    kept = {one.uid for one in (*ended[-1:], *streak)}  # 1
    removals, due = [], []
    for restart in ended:
        removal = _removal_time(visit, restart)
        if restart.uid in kept or removal is None:
            continue
        if removal <= visit.now:
            removals.append(DeleteRestart(name=restart.name, uid=restart.uid))
        else:
            due.append(removal)
    return tuple(removals), earliest(due)


def _removal_time(visit: Visit, restart: Restart) -> datetime | None:
    """Return when age lets the restart go; None while something still rests on it."""
    completed = restart.status.completion_time
    if completed is None:
        return None
    due = completed + timedelta(seconds=visit.snapshot.settings.restart_ttl_seconds)
    if restart.spec.scheduled_time is not None:  # 2
        deadline = timedelta(seconds=visit.policy.starting_deadline_seconds + 3600)
        due = max(due, restart.spec.scheduled_time + deadline)
    value = restart.annotations.get(RESTART_ANNOTATION)
    asked = visit.snapshot.workload.annotations
    unhandled = value is not None and asked.get(HANDLED_ANNOTATION) != value  # 2
    if unhandled and asked.get(RESTART_ANNOTATION) == value:
        return None
    return due
