"""What this container may use, as its cgroup says; version 2 and version 1.

Called by the CPU device, by ``serve``, and for the threads of a GPU process. Reads files alone.
"""

from __future__ import annotations

import contextlib
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
