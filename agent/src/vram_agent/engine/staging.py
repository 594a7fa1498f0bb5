"""Copying to a device through a few small page-locked buffers.

Why it exists: a copy from pageable memory waits for the driver's own single buffer. While weights
are not locked yet (the first load, and the way back from the Host tier), the CPU fills one buffer
while the device reads another. Called by engine/cuda.py. It imports no library: source, target and
buffers are flat tensors of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vram_agent.progress import advance


class Slot(Protocol):
    """One buffer, and the mark that says when the device has read it."""

    @property
    def buffer(self) -> Any:
        """A flat uint8 tensor."""
        ...

    def wait(self) -> None:
        """Block until the device has read what was in the buffer at the last mark."""
        ...

    def mark(self) -> None:
        """Remember the copies that are under way from the buffer."""
        ...


class StagingRing:
    """Slots of one size, used in turn. Not for use by several threads."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = tuple(slots)
        self._next = 0
        self._under_way = [0] * len(self._slots)
        self.read_bytes = 0
        """What the device has surely read; what a slot holds counts once it was waited for."""

    def copy(self, source: Any, target: Any) -> None:
        """Copy all of ``source`` to ``target``, of the same length; the last copies go on.

        The caller waits for the device before it uses ``target``.
        """
        size = len(self._slots[0].buffer)
        for start in range(0, len(source), size):
            end = min(start + size, len(source))
            slot = self._slots[self._next]
            slot.wait()
            self.read_bytes += self._under_way[self._next]
            advance(self._under_way[self._next])
            self._under_way[self._next] = end - start
            self._next = (self._next + 1) % len(self._slots)
            staged = slot.buffer[: end - start]
            staged.copy_(source[start:end])
            target[start:end].copy_(staged, non_blocking=True)
            slot.mark()
