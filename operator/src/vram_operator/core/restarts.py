"""All restarts of one workload in one visit: each open one gets its turn, new ones are decided.

Why it exists: places under the caps are given out in one order, and a restart's status is written
before anything is done for it. Called by ``planning``. The phases decide; here is the round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from vram_operator.core.acting_phase import advance_acting
from vram_operator.core.phases import (
    Phase,
    check_transition,
    is_active,
    is_finished,
    phase_of,
)
from vram_operator.core.plan import Action, Blocked, EmitEvent, PatchRestartStatus
from vram_operator.core.queue_phase import advance_queued
from vram_operator.core.snapshot import ActiveRestart, Restart
from vram_operator.core.turn import Turn, earliest
from vram_operator.core.verifying_phase import advance_verifying
from vram_operator.core.visit import Visit

_MOST_MOVES = 16
"""A turn ends when nothing moves; a ladder has fewer rungs than this."""

WATCHED_EVERY = timedelta(seconds=2)
"""A running restart is looked at so often, whatever news comes of it."""

_Running = tuple[ActiveRestart, ...]
_HANDLERS: Mapping[Phase, Callable[[Visit, Restart, _Running], Turn]] = {
    Phase.QUEUED: advance_queued,
    Phase.ACTING: lambda visit, restart, _: advance_acting(visit, restart),
    Phase.VERIFYING: lambda visit, restart, _: advance_verifying(visit, restart),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What the open restarts ask for; ``restarts`` are all of them as they should be."""

    restarts: tuple[Restart, ...]
    writes: tuple[PatchRestartStatus, ...] = ()
    actions: tuple[Action, ...] = ()
    events: tuple[EmitEvent, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    requeue_at: datetime | None = None


def advance(visit: Visit, restart: Restart, active: _Running) -> Turn:
    """Take a restart as far as it goes now. Raises IllegalTransitionError for a bug of ours.

    A phase that ends lets the next one have its turn at once; only the last one's actions are done,
    since they are what the status then says.
    """
    turn = Turn(restart=restart)
    others = _without(visit, active, restart)
    events: tuple[EmitEvent, ...] = ()
    for _ in range(_MOST_MOVES):
        before = turn.restart
        phase = phase_of(before.status)
        if phase is Phase.FINISHED:
            break
        turn = _HANDLERS[phase](visit, before, others)
        check_transition(before.status, turn.restart.status)
        events += turn.events
        moved = phase_of(turn.restart.status) is not phase
        climbed = len(turn.restart.status.attempts) != len(before.status.attempts)
        if not moved and not climbed:
            break
    return replace(turn, events=events)


def advance_all(visit: Visit) -> Round:
    """Give every open restart its turn: those that run first, then the oldest.

    The order in the snapshot does not matter. One that is admitted counts for those after it.
    """
    snapshot = visit.snapshot
    active = _running(visit)
    settled = [one for one in snapshot.restarts if is_finished(one.status)]
    queue = [one for one in snapshot.restarts if not is_finished(one.status)]
    queue.sort(key=lambda one: (not is_active(one.status), one.created, one.name))
    turns = []
    for restart in queue:
        turn = advance(visit, restart, active)
        turns.append((restart, turn))
        active = _with(visit, active, turn.restart)
    return Round(
        restarts=(*settled, *(turn.restart for _, turn in turns)),
        writes=tuple(
            _write(before, turn.restart)
            for before, turn in turns
            if before.status != turn.restart.status
        ),
        actions=tuple(action for _, turn in turns for action in turn.actions),
        events=tuple(event for _, turn in turns for event in turn.events),
        blocked=tuple(turn.blocked for _, turn in turns if turn.blocked is not None),
        requeue_at=earliest(
            [
                *(turn.requeue_at for _, turn in turns),
                *(visit.now + WATCHED_EVERY for _, turn in turns if is_active(turn.restart.status)),
            ]
        ),
    )


def _running(visit: Visit) -> _Running:
    """Return what runs: the cluster's restarts, our own as this snapshot has them."""
    workload = visit.snapshot.workload
    own = (workload.namespace, workload.name)
    others = tuple(
        active
        for active in visit.snapshot.cluster.active_restarts
        if (active.namespace, active.workload) != own
    )
    ours = (_active(visit, one) for one in visit.snapshot.restarts if is_active(one.status))
    return (*others, *ours)


def _active(visit: Visit, restart: Restart) -> ActiveRestart:
    pods = (pod for pod in visit.snapshot.pods if pod.name == restart.spec.pod.name)
    return ActiveRestart(
        namespace=visit.snapshot.workload.namespace,
        name=restart.name,
        workload=visit.snapshot.workload.name,
        node=next((pod.node for pod in pods), ""),
    )


def _with(visit: Visit, active: _Running, restart: Restart) -> _Running:
    """Return what runs after this restart's turn: it may have begun, or ended."""
    others = _without(visit, active, restart)
    return (*others, _active(visit, restart)) if is_active(restart.status) else others


def _without(visit: Visit, active: _Running, restart: Restart) -> _Running:
    own = (visit.snapshot.workload.namespace, restart.name)
    return tuple(one for one in active if (one.namespace, one.name) != own)


def _write(before: Restart, after: Restart) -> PatchRestartStatus:
    return PatchRestartStatus(
        name=after.name,
        uid=after.uid,
        resource_version=before.resource_version,
        status=after.status,
        finished=after.status.outcome,
    )
