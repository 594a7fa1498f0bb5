"""Giving back what tasks left behind in the GPU process, and measuring what that gave.

Called by processes/gpu.py after every offload and on demand. Knows no library: it is told what to
forget, and how to empty the device's caches.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any

from vram_agent.devices.base import DeviceMemory


def _find_malloc_trim() -> Callable[[int], Any]:
    libc = ctypes.CDLL(None)
    # musl has none, and gives freed memory back by itself.
    return getattr(libc, "malloc_trim", lambda _pad: 0)


_malloc_trim = _find_malloc_trim()


def trim_malloc() -> None:
    """Give freed heap pages back to the system."""
    _malloc_trim(0)


def drop_tracebacks() -> None:
    """Forget the interpreter's last error: its frames keep every local tensor alive."""
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        with contextlib.suppress(AttributeError):
            delattr(sys, name)


def scrub(memory: DeviceMemory, forget: Iterable[Callable[[], None]]) -> tuple[int, int]:
    """Give back what no model needs; return the device memory held before and after, in bytes.

    Blocks until the device has finished. ``forget`` are the models' own caches.
    """
    before_bytes = memory.used_bytes()
    memory.synchronize()
    for drop in forget:
        drop()
    drop_tracebacks()
    gc.collect()
    memory.empty_cache()
    trim_malloc()
    return before_bytes, memory.used_bytes()
