"""The application's processes as /proc shows them, and the end of those that outlive it.

Why it exists: an application starts workers, shells and daemons; what they hold on the device is
the application's, and none of them may outlive it. All of this process's descendants are the
application's, since a wrapping agent starts nothing else; those whose parent ended come back to it
(it is PID 1, or a subreaper). Called by process.py and measuring.py.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from vram_agent.processes.orphans import end_process

PROC: Final = Path("/proc")
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_UTIME, _STIME = 11, 12
"""Places after the name in /proc/PID/stat, from 0: proc_pid_stat(5)."""


def list_descendants(pid: int, proc: Path = PROC) -> list[int]:
    """Return the processes below one, each parent before its children. Blocking."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = _list_children(proc / str(waiting.pop()))
        found += children
        waiting += children
    return found


def read_cpu_seconds(pid: int, proc: Path = PROC) -> float | None:
    """Return the CPU time that a process has used so far; None when it has ended."""
    try:
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_SECOND


def may_use_gpu(pid: int, proc: Path = PROC) -> bool:
    """Whether a process has an NVIDIA device open, or will not show what it has open."""
    try:
        links = list((proc / str(pid) / "fd").iterdir())
    except FileNotFoundError:  # it has ended
        return False
    except PermissionError:  # another user's
        return True
    for link in links:
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(link.readlink()).startswith("/dev/nvidia"):
                return True
    return False


async def end_descendants() -> None:
    """Kill and reap every process below this one, until none is left. Idempotent."""
    while pids := _list_children(PROC / "self"):
        # The first one's own children come here when it has ended, and have their turn then.
        for pid in pids:
            await end_process(pid)


def _list_children(process: Path) -> list[int]:
    found: list[int] = []
    for listing in (process / "task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found += map(int, listing.read_text(encoding="ascii").split())
    return found
