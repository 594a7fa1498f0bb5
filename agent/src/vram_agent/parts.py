"""The parts of one task's result on their way from the process that makes them to who waits.

Why it exists: a stream begins before its task has ended. Whoever asks makes a ``Parts`` and hands
it to ``submit``; the backend attaches itself when the task begins, puts parts in and is told when
one was taken, so that it can bound what lies here; who stops reading abandons the task. All of it
runs on one event loop. It knows no process and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from vram_agent.backend import TaskPart


class PartSource(Protocol):
    """Who makes the parts."""

    def note_taken(self) -> None:
        """One more part was taken."""
        ...

    def abandon(self) -> None:
        """Nobody takes parts any more: the task is to end as soon as it can. Idempotent."""
        ...


class Parts:
    """An ordered stream with one reader; what waits is bounded by its source."""

    def __init__(self) -> None:
        self._waiting: deque[TaskPart] = deque()
        self._news = asyncio.Event()
        self._source: PartSource | None = None
        self._is_over = False
        self.is_abandoned = False

    def attach(self, source: PartSource) -> None:
        """Take parts from a source, in the place of an earlier one."""
        self._source = source
        if self.is_abandoned:
            source.abandon()

    def put(self, part: TaskPart) -> None:
        """Add a part; dropped where nobody reads any more."""
        if not self.is_abandoned:
            self._waiting.append(part)
            self._news.set()

    def end(self) -> None:
        """No part comes any more; those that wait are still to be had. Idempotent."""
        self._is_over = True
        self._news.set()

    def abandon(self) -> None:
        """Read no more, and let the task end. Idempotent."""
        if self.is_abandoned:
            return
        self.is_abandoned = True
        self._waiting.clear()
        self.end()
        if self._source is not None:
            self._source.abandon()

    async def take(self) -> TaskPart | None:
        """Wait for the next part; None at the end."""
        while not self._waiting:
            if self._is_over:
                return None
            self._news.clear()
            await self._news.wait()
        part = self._waiting.popleft()
        if self._source is not None:
            self._source.note_taken()
        return part
