"""How many requests with a task are in the house at once, those still being received included.

Why it exists: a body is in memory before its model's queue can refuse it, so without a bound ten
thousand clients at once would cost gigabytes. There are as many places as all queues together have
and one running task for each model: who finds none would have found no queue with a place either.
Called by the handlers before they read a body. It knows no model and reads nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vram_agent.errors import QueueFullError
from vram_agent.serving.limits import RequestLimits


class Places:
    """Counts the requests in the house. Call it on one event loop."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._taken = 0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place for as long as the block lasts. Raises QueueFullError where none is free."""
        if self._taken >= self._limits.open_requests:
            raise QueueFullError(
                f"{self._taken} requests are open, as many as queue.maxDepth admits over all "
                "models; try again later",
                retry_after_seconds=1.0,
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
