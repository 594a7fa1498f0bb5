"""What this container may use, as its cgroup says; version 2 and version 1.

Called by the CPU device, by ``serve`` for the supervisor, and for the threads of a GPU process.
Reads files alone.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

# cgroup v1 writes the largest multiple of a page for "no limit".
_UNLIMITED_BYTES = 1 << 62
_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse_memory_limit_bytes(text: str) -> int | None:
    """Return the limit in memory.max or memory.limit_in_bytes; None for no limit."""
    text = text.strip()
    if not text or text == "max":
        return None
    limit = int(text)
    return None if limit >= _UNLIMITED_BYTES else limit


def read_memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory limit of this container; None where there is none or it cannot be read."""
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            return parse_memory_limit_bytes((root / path).read_text(encoding="ascii"))
    return None


class ContainerMemory:
    """How much memory this container may still take, as its cgroup counts it.

    Page cache of files can be reclaimed, so it is not held against the limit; the arenas of
    weights are shared memory, which the kernel counts apart and cannot reclaim.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._v2 = root / "sys/fs/cgroup"
        self._v1 = self._v2 / "memory"

    def limit_bytes(self) -> int | None:
        """Return the limit; None where there is none."""
        return read_memory_limit_bytes(self._root)

    def available_bytes(self) -> int | None:
        """Return the limit less what is in use and no page cache of files; None without a limit."""
        limit = self.limit_bytes()
        if limit is None:
            return None
        for folder, current, prefix in (
            (self._v2, "memory.current", ""),
            (self._v1, "memory.usage_in_bytes", "total_"),
        ):
            with contextlib.suppress(OSError, ValueError):
                used = int((folder / current).read_text(encoding="ascii"))
                stat = parse_counters((folder / "memory.stat").read_text(encoding="ascii"))
                cache = stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"]
                return max(0, limit - max(0, used - cache))
        return None

    def oom_kills(self) -> int:
        """Return how many processes were killed for want of memory; 0 where nothing counts."""
        for path in (self._v2 / "memory.events", self._v1 / "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                return parse_counters(path.read_text(encoding="ascii")).get("oom_kill", 0)
        return 0


def parse_counters(text: str) -> Counter[str]:
    """Return a flat-keyed file of a cgroup: a name and a number on each line."""
    pairs = (line.split() for line in text.splitlines())
    return Counter({name: int(number) for name, number in pairs})


def parse_cpu_quota(cpu_max: str) -> float | None:
    """Return the CPUs that cgroup v2's cpu.max grants; None for no limit."""
    quota, _, period = cpu_max.strip().partition(" ")
    if quota in {"", "max"}:
        return None
    return int(quota) / int(period or 100_000)


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs that this container may use; None where nothing limits them."""
    folder = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        return parse_cpu_quota((folder / "cpu.max").read_text(encoding="ascii"))
    with contextlib.suppress(OSError, ValueError):
        quota = int((folder / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((folder / "cpu/cpu.cfs_period_us").read_text(encoding="ascii"))
        return quota / period if quota > 0 else None
    return None
