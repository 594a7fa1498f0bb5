"""What is done to GPU processes as such: scrub them, or end them all and start anew.

Why it exists: both go past the policy, since no model asked for them. Called by the supervisor on
its loop; the processes' answers come back as events like all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from vram_agent.backend import GroupBackend, Scrubbed
from vram_agent.core.pool import Reason
from vram_agent.errors import AgentError
from vram_agent.protocol import AfterTask, LoadPolicy, ModelState, Tier
from vram_agent.supervision.fleet import Fleet, GroupCell
from vram_agent.supervision.ports import TransitionObserver
from vram_agent.supervision.reconfigure import order_eager_load
from vram_agent.supervision.transitions import Transitions

_log = structlog.get_logger("vram_agent.upkeep")


NOTHING_SCRUBBED: Final = Scrubbed(before_bytes=0, after_bytes=0)


class Scrubs:
    """Scrubs that callers wait for, one for each group at most."""

    def __init__(
        self, fleet: Fleet, transitions: Transitions, observer: TransitionObserver
    ) -> None:
        self._fleet = fleet
        self._transitions = transitions
        self._observer = observer
        self._wanted: dict[str, asyncio.Future[Scrubbed]] = {}

    def want_all(self) -> list[asyncio.Future[Scrubbed]]:
        """Ask for every group that has a GPU process; the futures end with the scrubs."""
        loop = asyncio.get_running_loop()
        for name, group in self._fleet.groups.items():
            if group.backend is not None and group.backend.gpu_pid is not None:
                self._wanted.setdefault(name, loop.create_future())
        return list(self._wanted.values())

    def take_due(self) -> list[tuple[GroupCell, GroupBackend, asyncio.Future[Scrubbed]]]:
        """Return those that can begin, their groups marked busy."""
        due = []
        for name, done in list(self._wanted.items()):
            group = self._fleet.groups.get(name)
            if group is None or group.backend is None:
                self._wanted.pop(name)
                resolve(done, NOTHING_SCRUBBED)
            elif not group.is_busy:
                self._wanted.pop(name)
                group.is_moving = True
                due.append((group, group.backend, done))
        return due

    async def carry_out(
        self, group: GroupCell, backend: GroupBackend, done: asyncio.Future[Scrubbed]
    ) -> None:
        """Scrub one group and free it; a scrub that fails is logged, never raised."""
        scrubbed = NOTHING_SCRUBBED
        try:
            scrubbed = await backend.scrub()
        except AgentError as error:
            _log.warning("scrub failed", group=group.name, error=error.message)
        else:
            self._observer.observe_scrub(scrubbed.reclaimed_bytes)
            _log.info(
                "scrub",
                group=group.name,
                before_bytes=scrubbed.before_bytes,
                after_bytes=scrubbed.after_bytes,
            )
        finally:
            group.is_moving = False
            resolve(done, scrubbed)
            self._transitions.sync(group, Reason.WORKER_DIED)


def sum_scrubs(scrubs: Iterable[Scrubbed]) -> Scrubbed:
    """Return what several GPU processes held before and after, taken together."""
    each = list(scrubs)
    return Scrubbed(
        before_bytes=sum(one.before_bytes for one in each),
        after_bytes=sum(one.after_bytes for one in each),
    )


async def end_gpu_processes(
    fleet: Fleet, transitions: Transitions, observer: TransitionObserver, freed: Callable[[], None]
) -> None:
    """End every GPU process and write down what that leaves; ``freed`` is called before return.

    Raises what a backend raises, with the states true even then.
    """
    kept = [
        cell
        for cell in fleet.models.values()
        if cell.residence.state is ModelState.RESIDENT
        and cell.spec.residency.load is LoadPolicy.EAGER
        and cell.spec.residency.after_task is AfterTask.KEEP
    ]
    groups = [
        (group, group.backend)
        for group in fleet.groups.values()
        if group.backend is not None and group.backend.gpu_pid is not None
    ]
    try:
        results = await asyncio.gather(
            *(backend.end_gpu() for _, backend in groups), return_exceptions=True
        )
    finally:
        for group, _ in groups:
            for cell in fleet.members(group):
                if cell.residence.tier in (Tier.VRAM, Tier.PINNED_HOST):
                    observer.observe_worker_restart(cell.name, Reason.RECYCLE)
            if not group.is_moving:
                transitions.sync(group, Reason.RECYCLE)
        for cell in kept:
            order_eager_load(cell)
        freed()
    for result in results:
        if isinstance(result, BaseException):
            raise result


def resolve(future: asyncio.Future[Scrubbed], scrubbed: Scrubbed) -> None:
    """End a future that nobody has ended or given up."""
    if not future.done():
        future.set_result(scrubbed)
