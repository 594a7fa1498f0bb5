"""How near the container is to its memory limit, and whether the kernel has ended something for it.

Why it exists: budgets count weights, the kernel counts everything; both end in models that leave
host memory, but only the second in a process that is killed. Called by the supervisor on its loop.
It decides nothing. Sizes are bytes.
"""

from __future__ import annotations

from typing import Final

from vram_agent.supervision.ports import Clock, HostMemory

RESERVE_SHARE: Final = 0.05
"""Of the limit; when less than this is left, unused models leave host memory."""
FRESH_SECONDS: Final = 1.0
STARVED_SECONDS: Final = 5.0
"""A process that is killed so soon after the kernel counted a kill for want of memory was one, or
went with one: a GPU process ends with its template, and their ends are told in any order."""


class HostGauge:
    """The container's memory, looked at no more often than is useful."""

    def __init__(self, memory: HostMemory, clock: Clock) -> None:
        self._memory = memory
        self._clock = clock
        self._read_at = float("-inf")
        self._room_bytes: int | None = None
        self._kills = memory.oom_kills()
        self._starved_at = float("-inf")

    @property
    def limit_bytes(self) -> int | None:
        """The container's limit; None where there is none."""
        return self._memory.limit_bytes()

    def room_bytes(self) -> int | None:
        """What may still be taken before unused models should leave; None without a limit."""
        now = self._clock.monotonic()
        if now - self._read_at >= FRESH_SECONDS:
            self._read_at = now
            available, limit = self._memory.available_bytes(), self._memory.limit_bytes()
            self._room_bytes = None
            if available is not None and limit is not None:
                self._room_bytes = available - int(limit * RESERVE_SHARE)
        return self._room_bytes

    def forget(self) -> None:
        """A model has moved: the next look is a new one."""
        self._read_at = float("-inf")

    def is_starved(self) -> bool:
        """Whether the kernel has just killed a process of this container for want of memory."""
        now, kills = self._clock.monotonic(), self._memory.oom_kills()
        if kills > self._kills:
            self._kills, self._starved_at = kills, now
        return now - self._starved_at < STARVED_SECONDS
