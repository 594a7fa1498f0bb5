"""Page-locking host memory in the background, within a budget.

Why it exists: a copy from page-locked memory runs at the bus's speed, and locking costs more time
than the copy (some 0.1 s a GiB), so it is done once, after the first load, while tasks run already.
Called by engine/cuda.py in the GPU process. It knows neither torch nor CUDA: a `Registrar` locks.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
from typing import Protocol

from vram_agent.devices.base import MIB
from vram_agent.pages import align

CHUNK_BYTES = 64 << 20
"""What is locked, and copied, at a time: a multiple of every page size."""


class Registrar(Protocol):
    """Locks pages for a device's driver."""

    def register(self, address: int, nbytes: int) -> str:
        """Lock the pages of a range; return why that is refused, empty when done. May block."""
        ...

    def unregister(self, address: int) -> None:
        """Unlock what was registered at that address. May block."""
        ...


class PinnedPages:
    """Which chunks of host memory are locked; a thread locks those that are wanted.

    Safe to call from any thread. After the first refusal no further chunk is tried: what the
    driver or a limit refuses once, it refuses again.
    """

    def __init__(self, registrar: Registrar, budget_bytes: int) -> None:
        self._registrar = registrar
        self._budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._pinned: dict[int, int] = {}
        self._wanted: deque[tuple[int, int]] = deque()
        self._current: tuple[int, int] | None = None
        self._is_running = False
        self._refusal = ""

    @property
    def refusal(self) -> str:
        """Why some of the wanted memory is not locked; empty while nothing was refused."""
        return self._refusal

    @property
    def pinned_bytes(self) -> int:
        """How much is locked."""
        with self._changed:
            return sum(self._pinned.values())

    def is_pinned(self, address: int) -> bool:
        """Whether the chunk that begins at an address is locked."""
        with self._changed:
            return address in self._pinned

    def want(self, address: int, nbytes: int) -> None:
        """Have a range locked, chunk by chunk, in the background. Idempotent, never fails."""
        with self._changed:
            known = {self._current, *self._wanted}
            for start in range(0, nbytes, CHUNK_BYTES):
                length = min(CHUNK_BYTES, nbytes - start)
                chunk = (address + start, align(length, mmap.PAGESIZE))
                if chunk[0] not in self._pinned and chunk not in known:
                    self._wanted.append(chunk)
            if self._wanted and not self._is_running and not self._refusal:
                self._is_running = True
                threading.Thread(target=self._lock_wanted, name="vram-pin", daemon=True).start()

    def wait(self) -> None:
        """Wait until nothing that is wanted is still to be locked or refused."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_running)

    def forget(self, address: int, nbytes: int) -> None:
        """Unlock a range, and want it no more. Blocks while a chunk of it is being locked."""
        end = address + nbytes

        def is_inside(chunk: tuple[int, int] | None) -> bool:
            return chunk is not None and address <= chunk[0] < end

        with self._changed:
            self._wanted = deque(chunk for chunk in self._wanted if not is_inside(chunk))
            self._changed.wait_for(lambda: not is_inside(self._current))
            leaving = [at for at in self._pinned if address <= at < end]
            for at in leaving:
                del self._pinned[at]
        for at in leaving:
            self._registrar.unregister(at)

    def _lock_wanted(self) -> None:
        while True:
            with self._changed:
                self._current = None
                if self._refusal or not self._wanted:
                    self._wanted.clear()
                    self._is_running = False
                    self._changed.notify_all()
                    return
                self._current = self._wanted.popleft()
                address, nbytes = self._current
                self._changed.notify_all()
            refusal = self._explain_budget(nbytes) or self._try_register(address, nbytes)
            with self._changed:
                if refusal:
                    self._refusal = refusal
                else:
                    self._pinned[address] = nbytes

    def _explain_budget(self, nbytes: int) -> str:
        if self.pinned_bytes + nbytes <= self._budget_bytes:
            return ""
        return f"the budget of {self._budget_bytes / MIB:.0f} MiB is used up"

    def _try_register(self, address: int, nbytes: int) -> str:
        refusal = "the thread that locks pages failed"
        with contextlib.suppress(Exception):  # copies go on without: slower, not wrong
            refusal = self._registrar.register(address, nbytes)
        return refusal
