"""PID 1's duty: reap the children that nobody waits for.

Why it exists: a process that outlives its parent becomes a child of PID 1 and, once it ends, keeps
its entry in the process table until somebody waits for it. Called by ``__main__``. It must not take
a status that the process backend waits for, so it waits by id, never for any child, and only for
those that two sweeps found ended: whoever is waited for is reaped between them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SWEEP_SECONDS: Final = 10.0


def list_ended_children(proc: Path = Path("/proc")) -> set[int]:
    """Return this process's children that have ended and have not been waited for."""
    children: set[int] = set()
    for listing in (proc / "self" / "task").glob("*/children"):
        try:
            children.update(map(int, listing.read_text(encoding="ascii").split()))
        except OSError:  # the thread has ended meanwhile
            continue
    return {pid for pid in children if _has_ended(proc / str(pid) / "stat")}


def reap(pids: Iterable[int]) -> list[int]:
    """Wait for each, by its id and without blocking; return those that were there."""
    reaped = []
    for pid in pids:
        try:
            found, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # somebody waited for it after all
            continue
        if found:
            reaped.append(found)
    return reaped


async def keep_reaping(sweep_seconds: float = SWEEP_SECONDS) -> None:
    """Sweep until cancelled."""
    before: set[int] = set()
    while True:
        await asyncio.sleep(sweep_seconds)
        ended = list_ended_children()
        reap(ended & before)
        before = ended


def _has_ended(stat: Path) -> bool:
    try:
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return bool(fields) and fields[0] == "Z"
