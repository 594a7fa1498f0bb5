"""Ending what a process of a group left behind: subprocesses of a model's own code.

Why it exists: a template or GPU process leads a session of its own; what it started (data loaders,
decoders) is reparented to the supervisor when it ends, may hold device memory, and would stay a
zombie. Processes of other sessions are somebody else's children and are not touched. Called by
pair.py on the event loop; needs this process to be PID 1 or a subreaper.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path


def name_fork_of(template_pid: int) -> str:
    """Return the name of a GPU process: it tells whose fork it is, even of a zombie."""
    return f"vram-g{template_pid}"


async def end_orphans(leader_pid: int, known: frozenset[int]) -> None:
    """Kill and reap what a process that has ended left to this one, but for the ``known``.

    That is the processes of its session, and a GPU process that it forked without living to tell.
    Idempotent.
    """
    for pid in _list_children():
        if pid not in known and _is_orphan_of(leader_pid, pid):
            await end_process(pid)


def _list_children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (task / "children").read_text(encoding="ascii").split())
        except OSError:  # the thread has ended
            continue
    return found


def _is_orphan_of(leader_pid: int, pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    name = stat.partition("(")[2].rpartition(")")[0]
    session = int(stat.rpartition(")")[2].split()[3])
    return session == leader_pid or name == name_fork_of(leader_pid)


async def end_process(pid: int) -> None:
    """Kill and reap one process of this process's. Idempotent."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await ended.wait()
        with contextlib.suppress(ChildProcessError):  # someone else was quicker
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)  # noqa: ASYNC222 - it has ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
