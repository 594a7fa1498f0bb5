"""What the supervisor is given: a clock, an observer, a journal and who it is.

Why it exists: the supervisor reads no clock, disk or environment of its own, so that tests run it
on fake time and ``__main__`` and the embedding library compose it differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from vram_agent.protocol import ActionReport, AgentMode, PodIdentity
from vram_agent.supervision.sizes import LearnedSize


class Clock(Protocol):
    """Time, in both senses. The monotonic one is the event loop's: timers fire by it."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def now(self) -> datetime:
        """The wall clock, UTC."""
        ...


class LoopClock:
    """The running event loop's clock; wall time is read once and carried on by it.

    A wall clock that jumps (NTP, a suspended laptop) therefore never makes a later event look
    earlier in one boot's reports.
    """

    def __init__(self, started_at: datetime | None = None) -> None:
        self._started_at = datetime.now(UTC) if started_at is None else started_at
        self._origin = asyncio.get_running_loop().time()

    def monotonic(self) -> float:
        """Seconds of the event loop."""
        return asyncio.get_running_loop().time()

    def now(self) -> datetime:
        """The start, and what the loop's clock counted since."""
        return self._started_at + timedelta(seconds=self.monotonic() - self._origin)


class TransitionObserver(Protocol):
    """Who counts what happens; AgentMetrics is one. Must not block or raise."""

    def observe_transition(self, model: str, transition: str, seconds: float, outcome: str) -> None:
        """A transition ended; outcome is ``ok`` or ``failed``."""
        ...

    def observe_eviction(self, model: str, reason: str) -> None:
        """A model was told to leave for another."""
        ...

    def observe_queue_wait(self, model: str, seconds: float) -> None:
        """A task began after so many seconds in the queue."""
        ...

    def observe_scrub(self, reclaimed_bytes: int) -> None:
        """A scrub of a GPU process gave so many bytes of device memory back."""
        ...

    def observe_worker_restart(self, model: str, reason: str) -> None:
        """A process of the model's group was lost or renewed."""
        ...


class ActionJournal(Protocol):
    """Where the last action outlives the process."""

    def read(self) -> ActionReport | None:
        """Return what an earlier boot wrote, None where there is nothing to read. Blocking."""
        ...

    async def write(self, action: ActionReport) -> None:
        """Replace it atomically, without blocking the loop. Raises OSError."""
        ...


class SizeStore(Protocol):
    """Where learned sizes outlive the process."""

    async def read(self) -> Mapping[str, LearnedSize]:
        """Return what an earlier boot wrote, by ``sizes.model_key``; never raises."""
        ...

    async def write(self, sizes: Mapping[str, LearnedSize]) -> None:
        """Replace it atomically, without blocking the loop. Raises OSError."""
        ...


class NoSizes:
    """The store of an agent that has no place of its own."""

    async def read(self) -> Mapping[str, LearnedSize]:
        """Return nothing."""
        return {}

    async def write(self, sizes: Mapping[str, LearnedSize]) -> None:
        """Forget it."""


class HostMemory(Protocol):
    """The container's memory as the kernel counts it. Reads small files; never raises."""

    def limit_bytes(self) -> int | None:
        """Return the limit; None where there is none."""
        ...

    def available_bytes(self) -> int | None:
        """Return what may still be taken, reclaimable page cache included; None without a limit."""
        ...

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed here for want of memory."""
        ...


class UnlimitedMemory:
    """A container without a limit, or one whose limit is none of ours."""

    def limit_bytes(self) -> int | None:
        """Return None."""
        return None

    def available_bytes(self) -> int | None:
        """Return None."""
        return None

    def oom_kills(self) -> int:
        """Return 0."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Everything that the supervisor does not own."""

    clock: Clock
    observer: TransitionObserver
    journal: ActionJournal
    sizes: SizeStore = field(default_factory=NoSizes)
    host: HostMemory = field(default_factory=UnlimitedMemory)
    pod: PodIdentity = field(default_factory=PodIdentity)
    version: str = ""
    mode: AgentMode = AgentMode.SERVE
    host_limit_bytes: int | None = None
    """The container's memory limit; None where there is none."""


def format_time(moment: datetime) -> str:
    """RFC 3339, UTC, milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
