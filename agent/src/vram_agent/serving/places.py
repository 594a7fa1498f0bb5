"""How many requests with a task are in the house at once, those still being received included.

Why it exists: a body is in memory before its model's queue can refuse it, so without a bound ten
thousand clients at once would cost gigabytes. There are as many places as all queues together have
and one running task for each model: who finds none would have found no queue with a place either.
Called by the handlers before they read a body. It knows no model and reads nothing.

Who finds no place is told when one is likely free: the mean time that one was held lately, by how
many are held.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from vram_agent.errors import QueueFullError
from vram_agent.serving.limits import RequestLimits

_WEIGHT_OF_LAST = 0.1


class Places:
    """Counts the requests in the house. Call it on one event loop; ``clock`` gives seconds."""

    def __init__(self, limits: RequestLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._taken = 0
        self._held_seconds: float | None = None

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place for as long as the block lasts. Raises QueueFullError where none is free."""
        if self._taken >= self._limits.open_requests:
            raise QueueFullError(
                f"{self._taken} requests are open, as many as queue.maxDepth admits over all "
                "models; try again later",
                retry_after_seconds=(self._held_seconds or 0.0) / self._taken,
            )
        self._taken += 1
        began = self._clock()
        try:
            yield
        finally:
            self._taken -= 1
            seconds = self._clock() - began
            mean = seconds if self._held_seconds is None else self._held_seconds
            self._held_seconds = mean + _WEIGHT_OF_LAST * (seconds - mean)
