"""Whether a wrapped application is idle, and what it holds when it is: the learned baseline.

Why it exists: nobody tells the agent what an application that is not ours needs. What its
processes held when they were idle for the first time is taken for that, and whatever an idle
application holds beyond it is its residual. Called by wrapping/ after each look at the processes.
It knows no process, device or clock; times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from vram_agent.core.residual import MemorySamples, ProcessSample, compute_memory_report
from vram_agent.protocol import IdleProbe, MemoryReport, ResidualSource

STEADY_BYTES: Final = 1 << 20
"""Memory that moves by no more than this between two looks has not moved: a garbage collector's
noise. A leak that grows more slowly does not hide behind being busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The processes at one time. ``cpu_seconds``: used so far by each, by its id."""

    at: float
    used_bytes: int
    cpu_seconds: Mapping[int, float]


def measure_cpu_percent(before: Look, after: Look) -> float:
    """Return the CPU used between two looks, in percent of one core. Processes may come and go."""
    seconds = after.at - before.at
    if seconds <= 0:
        return 0.0
    used = sum(
        max(0.0, total - before.cpu_seconds.get(pid, 0.0))
        for pid, total in after.cpu_seconds.items()
    )
    return 100.0 * used / seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """How long the application has been quiet, and the baseline, if there is one yet.

    ``baseline_bytes`` is the least that any child of this boot held when it was first idle: a new
    child that never gets as low shows the difference as residual.
    """

    rule: IdleProbe
    is_idle: bool = False
    baseline_bytes: int | None = None
    quiet_since: float | None = None
    least_bytes: int = 0
    """The least held since then."""
    has_learned: bool = False
    """Whether this child has been idle for long enough already."""
    last: Look | None = None

    def renewed(self) -> Quiet:
        """Return the value for a new child; the baseline stays."""
        return Quiet(rule=self.rule, baseline_bytes=self.baseline_bytes)

    def disturbed(self) -> Quiet:
        """Return the value while it starts, drains or is not ready: not idle, nothing learned."""
        return replace(self, is_idle=False, quiet_since=None, last=None)

    def noted(self, look: Look, *, answer: bool | None) -> Quiet:
        """Return the value after a look; ``answer`` is the idle probe's, None without one. Pure.

        1. With a probe: quiet is what it says, and idle at once.
        2. Without: quiet between two looks with little CPU and steady memory; idle after
           ``quiet_seconds`` of it.
        3. The first time that a child was quiet for ``quiet_seconds``, the least that it held
           meanwhile counts for the baseline.
        """
        # 1, 2
        is_quiet = self._is_quiet(look) if answer is None else answer
        if not is_quiet:
            return replace(self, is_idle=False, quiet_since=None, last=look)
        if self.quiet_since is None:
            began, least = look.at, look.used_bytes
        else:
            began, least = self.quiet_since, min(self.least_bytes, look.used_bytes)
        is_settled = look.at - began >= self.rule.quiet_seconds
        after = replace(
            self,
            is_idle=is_settled or answer is True,
            quiet_since=began,
            least_bytes=least,
            last=look,
        )
        # 3
        if not is_settled or self.has_learned:
            return after
        known = self.baseline_bytes
        baseline = least if known is None else min(known, least)
        return replace(after, baseline_bytes=baseline, has_learned=True)

    def _is_quiet(self, look: Look) -> bool:
        return (
            self.last is not None
            and measure_cpu_percent(self.last, look) < self.rule.cpu_percent
            and abs(look.used_bytes - self.last.used_bytes) <= STEADY_BYTES
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeMemory:
    """Device memory of the application's processes as measured at one time."""

    source: ResidualSource
    device_used_bytes: int = 0
    device_baseline_bytes: int = 0
    tree_bytes: int | None = 0
    """Sum over the processes; None where one of them cannot be measured."""


UNMEASURED: Final = TreeMemory(source=ResidualSource.UNKNOWN)


def compute_tree_report(memory: TreeMemory, baseline_bytes: int | None) -> MemoryReport:
    """Return the report's memory: the baseline stands for the models of an application.

    Before there is one, everything counts as in use and nothing as residual. Pure.
    """

    def report(model_bytes: int) -> MemoryReport:
        tree = ProcessSample(device_bytes=memory.tree_bytes, model_bytes=model_bytes)
        return compute_memory_report(
            MemorySamples(
                source=memory.source,
                device_used_bytes=memory.device_used_bytes,
                baseline_bytes=memory.device_baseline_bytes,
                processes=[tree],
            )
        )

    used = report(0).used_bytes
    return report(used if baseline_bytes is None else min(baseline_bytes, used))


def choose_source(source: ResidualSource, tree_bytes: int | None) -> ResidualSource:
    """Return how far the figures are the application's.

    On a shared device only the processes' own figures count, and the agent sees them from outside:
    where the driver does not name them, nothing is known.
    """
    if source is ResidualSource.SELF and tree_bytes is None:
        return ResidualSource.UNKNOWN
    return source
