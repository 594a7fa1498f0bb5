"""Work that is done one piece at a time, and to its end.

Why it exists: a transition that stopped half-way because its caller went away would leave a model
between two states. Called by the groups of processes/ and embedding/, on the event loop. It knows
nothing of what is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Serial:
    """A line of work. Make it and call it on one event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do the work once all that was asked for before is done, and return what it returns.

        Cancelling gives up the answer: the work keeps its place in the line and runs to its end.
        ``work`` is called when its turn comes, so that nothing is made that never begins.
        """

        async def take_turn() -> T:
            async with self._lock:
                return await work()

        task = asyncio.ensure_future(take_turn())
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever asked may have gone; asyncio would call an error unseen.
            task.exception()
