"""A queue of dirty keys: what to look at next, and when.

Watches, the agent poller and the clock add keys; workers call one function for each. A key that is
added many times before its turn is handled once. A key is never handled twice at the same time: if
it turns dirty while it is handled, it is handled once more afterwards. An error puts the key back
after a growing, jittered delay; nothing is lost and nothing spins.

Times are those of the running event loop, so a test with a fake loop needs no other clock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 60.0

Key = TypeVar("Key", bound=Hashable)


class RetryError(Exception):
    """What was asked for cannot be done now. Raised by a handler to be called again later.

    ``after_seconds`` is the delay that a server asked for; without one the usual delays apply.
    """

    def __init__(self, message: str, after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


def retry_seconds(failures: int, jitter: float) -> float:
    """Return the delay after ``failures`` errors in a row; ``jitter`` from 0 to 1 takes off half.

    Doubles from FIRST_RETRY_SECONDS up to LAST_RETRY_SECONDS.
    """
    longest = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 16))
    return longest * (1.0 - jitter / 2.0)


class KeyedQueue(Generic[Key]):
    """Calls ``handle`` for keys that are due, one call at a time for each key.

    ``handle`` returns the seconds until it wants to be called again without being asked, or None;
    this replaces what it said last time. ``on_error`` is told of each exception and must not raise.
    Everything but `run` returns at once and must be called on the loop that runs `run`.
    """

    def __init__(
        self,
        handle: Callable[[Key], Awaitable[float | None]],
        on_error: Callable[[Key, Exception], None],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._handle = handle
        self._on_error = on_error
        self._jitter = jitter
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()
        self._running: set[Key] = set()
        self._dirty: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def __len__(self) -> int:
        """Return how many keys are due and not yet being handled."""
        return len(self._waiting | self._dirty)

    def add(self, key: Key) -> None:
        """Have ``key`` handled as soon as a worker is free."""
        self._cancel_timer(key)
        if key in self._running:
            self._dirty.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: Key, delay_seconds: float) -> None:
        """Have ``key`` handled after ``delay_seconds``, or at an earlier time that is set."""
        if delay_seconds <= 0:
            self.add(key)
            return
        if key in self._waiting:
            return
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + delay_seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(delay_seconds, self.add, key)

    async def run(self, workers: int) -> None:
        """Handle keys until cancelled. Handlers that run are then cancelled too."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(workers):
                    group.create_task(self._work(), name=f"reconciler-{number}")
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._running.add(key)
            self._cancel_timer(key)
            try:
                delay = await self._handle(key)
            except Exception as error:  # whatever it is, the key must not be lost
                self._on_error(key, error)
                delay = self._retry_delay(key, error)
                # An event that the failed attempt itself caused must not undo the delay.
                self._dirty.discard(key)
            else:
                self._failures.pop(key, None)
            finally:
                self._running.discard(key)
            if key in self._dirty:
                self._dirty.discard(key)
                self.add(key)
            elif delay is not None:
                self.add_after(key, delay)

    def _retry_delay(self, key: Key, error: Exception) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = retry_seconds(failures, self._jitter())
        if isinstance(error, RetryError) and error.after_seconds is not None:
            return max(delay, error.after_seconds)
        return delay

    def _cancel_timer(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
