"""Gather, plan, apply: one visit of one workload, the whole story on one screen.

A visit rests on what is, not on what happened, so it may come at any time and be repeated. It
answers when the next one is due.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from vram_operator.api import Condition, Reason, RestartCondition
from vram_operator.apply import Applier, RefusedManifestError
from vram_operator.cache import Key
from vram_operator.clock import Clock
from vram_operator.core.condition_list import is_true
from vram_operator.core.phases import is_active
from vram_operator.core.plan import EmitEvent, EnsureObject, PatchRestartStatus, Plan
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import Snapshot
from vram_operator.gather import Gatherer, InvalidWorkloadError
from vram_operator.metrics import Metrics
from vram_operator.pod_actions import PodAction

# A plan that still finds something to do right after it was carried out comes again at once, but
# not for ever: one that never settles must not take the whole operator with it.
IMMEDIATE_VISITS = 20
SETTLING_SECONDS = 1.0
# A refused template may be admitted later, when a quota or policy has changed.
REFUSED_SECONDS = 60.0
SHARED_REASONS = frozenset({str(Reason.CONCURRENCY_CAP), str(Reason.NODE_BUSY)})
"""What restarts wait for that those of other workloads hold."""
# A place is offered to so many: the first may have to wait for its node too. Whom it is not offered
# to looks again by itself, some seconds later.
OFFERS = 3

_log = structlog.get_logger(__name__)


class Reconciler:
    """Visits workloads. Never visits the same one twice at the same time; the queue sees to it."""

    def __init__(
        self, gatherer: Gatherer, applier: Applier, metrics: Metrics, clock: Clock
    ) -> None:
        self._gatherer = gatherer
        self._applier = applier
        self._metrics = metrics
        self._clock = clock
        self._admission = asyncio.Lock()
        self._visits: Counter[Key] = Counter()
        self.on_place: Callable[[Key], None] = lambda _: None
        """Told of a workload whose restarts may have a place now."""
        self.blocked: dict[Key, tuple[str, ...]] = {}
        """Why restarts of each workload wait, for the metrics."""

    async def reconcile(self, key: Key) -> float | None:
        """Visit one workload; returns the seconds until the next visit, None to wait for news."""
        with self._metrics.reconcile_seconds.time():
            try:
                snapshot = await self._gatherer.gather(key)
            except InvalidWorkloadError as error:
                await self._applier.refuse(error.raw, Reason.INVALID_SPEC, str(error))
                return None
            if snapshot is None:
                self._forget(key)
                await self._applier.disown(key)
                return None
            planned = plan(snapshot, self._clock.now())
            if not takes_a_place(snapshot, planned):
                return await self._apply(key, snapshot, planned)
            # Places under the cluster's cap are given out one at a time, from fresh figures.
            async with self._admission:
                await self._applier.settle()
                snapshot = await self._gatherer.gather(key)
                if snapshot is None:
                    return 0.0
                planned = plan(snapshot, self._clock.now())
                if takes_a_place(snapshot, planned):
                    return await self._apply(key, snapshot, without_calls(planned))
            return await self._apply(key, snapshot, planned)

    async def _apply(self, key: Key, snapshot: Snapshot, planned: Plan) -> float | None:
        self.blocked[key] = tuple(str(one.reason) for one in planned.blocked)
        try:
            await self._applier.apply(snapshot.workload, planned)
        except RefusedManifestError as error:
            return await self._refused(key, snapshot, str(error))
        self._count(planned)
        self._offer(key, freed_places(snapshot, planned))
        return self._next_visit(key, planned)

    def _offer(self, key: Key, places: int) -> None:
        """Wake workloads that wait for a restart of another one to end, in turn."""
        waiting = [
            other
            for other, reasons in self.blocked.items()
            if other != key and not SHARED_REASONS.isdisjoint(reasons)
        ]
        for other in waiting[: places * OFFERS]:
            self.blocked[other] = self.blocked.pop(other)
            self.on_place(other)

    async def _refused(self, key: Key, before: Snapshot, message: str) -> float:
        """Do all but what the apiserver refused, so that the status says it; try again later."""
        _log.warning("manifest refused", namespace=key[0], workload=key[1], error=message)
        snapshot = replace(before, apply_error=message)
        planned = plan(snapshot, self._clock.now())
        rest = tuple(one for one in planned.actions if not isinstance(one, EnsureObject))
        await self._applier.apply(snapshot.workload, replace(planned, actions=rest))
        self._count(planned)
        return REFUSED_SECONDS

    def _count(self, planned: Plan) -> None:
        # Only now: a status that could not be written lets the next visit miss the same run.
        if planned.missed_run is not None:
            self._metrics.schedule_missed.inc()

    def _next_visit(self, key: Key, planned: Plan) -> float | None:
        """Return when to come again.

        1. Something was done: at once, since what it brought may call for more.
        2. But not at once for ever. 3. Nothing was done: when the plan says.
        """
        if any(not isinstance(action, EmitEvent) for action in planned.actions):
            self._visits[key] += 1
            if self._visits[key] <= IMMEDIATE_VISITS:  # 1
                return 0.0
            if self._visits[key] == IMMEDIATE_VISITS + 1:  # 2
                _log.info("much to do, once a second now", namespace=key[0], workload=key[1])
            return SETTLING_SECONDS
        self._visits.pop(key, None)
        if planned.requeue_at is None:  # 3
            return None
        return max(0.05, (planned.requeue_at - self._clock.now()).total_seconds())

    def _forget(self, key: Key) -> None:
        self._visits.pop(key, None)
        self.blocked.pop(key, None)
        self._gatherer.forget(key)


def takes_a_place(snapshot: Snapshot, planned: Plan) -> bool:
    """Does the plan admit a restart, so that it counts under the caps from then on?"""
    admitted = {one.name for one in snapshot.restarts if _is_admitted(one.status.conditions)}
    return any(
        isinstance(action, PatchRestartStatus)
        and action.name not in admitted
        and _is_admitted(action.status.conditions)
        for action in planned.actions
    )


def freed_places(snapshot: Snapshot, planned: Plan) -> int:
    """Return how many restarts that ran the plan has end, or queue for their next step."""
    running = {one.name for one in snapshot.restarts if is_active(one.status)}
    return sum(
        isinstance(action, PatchRestartStatus)
        and action.name in running
        and not is_active(action.status)
        for action in planned.actions
    )


def without_calls(planned: Plan) -> Plan:
    """Return what a plan writes. The calls to pods are for the next visit, which comes at once.

    An agent that does not answer must not keep other workloads from being admitted.
    """
    writes = tuple(one for one in planned.actions if not isinstance(one, PodAction))
    return replace(planned, actions=writes)


def _is_admitted(conditions: Sequence[Condition]) -> bool:
    return is_true(conditions, RestartCondition.ADMITTED)
