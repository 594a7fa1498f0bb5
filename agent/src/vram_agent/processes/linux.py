"""The few system calls that Python has no name for. Linux only.

Called by templates and GPU processes (to die with their parent) and by the supervisor (to inherit
the children of a template that died, and to keep its heap small).
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MMAP_THRESHOLD_BYTES = 16 * 1024
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int | bytes) -> None:
    if isinstance(argument, int):
        failed = _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0)
    else:
        failed = _libc.prctl(option, ctypes.c_char_p(argument), 0, 0, 0)
    if failed:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that made it ends.

    Exits at once when the parent has ended already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def name_process(name: str) -> None:
    """Set the name that ps and top show, at most 15 bytes of it."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def bound_malloc() -> None:
    """Have the C library give buffers of 16 KiB and more back to the system when they are freed.

    After thousands of connections at once the heap would stay as large as it ever was. Nothing
    where the C library has no such knob (musl gives memory back by itself).
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_ARENA_MAX, 2)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends. Idempotent."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def list_foreign_threads() -> list[str]:
    """Return the names of this process's threads, but for the one that asks."""
    names: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) == os.getpid():
            continue
        try:
            names.append((task / "comm").read_text(encoding="utf-8", errors="replace").strip())
        except OSError:  # it has ended meanwhile
            continue
    return sorted(names)


def list_open_devices() -> list[str]:
    """Return the device files that this process has open, such as /dev/nvidia-uvm."""
    found: set[str] = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:  # the listing's own descriptor
            continue
        if target.startswith("/dev/nvidia"):
            found.add(target)
    return sorted(found)
