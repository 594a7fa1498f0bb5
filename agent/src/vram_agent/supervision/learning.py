"""From measurements to what the next boot is told, and back.

Why it exists: the ledgers learn what each model holds; this remembers it under what makes a model
the same, and hands it to models that have not been measured in this boot. Called by the supervisor
on its loop; what a store does with it is not its concern.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from vram_agent.supervision.fleet import Fleet, ModelCell
from vram_agent.supervision.ports import SizeStore
from vram_agent.supervision.sizes import LearnedSize, model_key

READ_SECONDS: Final = 5.0
MAX_MODELS: Final = 256
_TOLERANCE: Final = 0.01
"""Figures of two restores differ by this much; the disk need not hear of it."""
_log = structlog.get_logger("vram_agent.sizes")


class Learning:
    """Keeps what is remembered in line with the ledgers."""

    def __init__(self, fleet: Fleet, store: SizeStore) -> None:
        self._fleet = fleet
        self._store = store
        self._is_stale = False
        self._is_writing = False
        self._was_unwritable = False

    async def recall(self) -> None:
        """Read what an earlier boot learned; a disk that does not answer is not waited for."""
        try:
            async with asyncio.timeout(READ_SECONDS):
                self._fleet.remembered.update(await self._store.read())
        except TimeoutError:
            _log.warning("learned sizes ignored", error=f"not read within {READ_SECONDS:g} s")

    def note(self, cell: ModelCell) -> bool:
        """Take over what the ledgers measured; whether there is something to ``save``."""
        if not self._fleet.devices:
            return False
        vram_bytes = self._fleet.vram.learned_bytes.get(cell.name, 0)
        host_bytes = self._fleet.host.learned_bytes.get(cell.name, 0)
        key = model_key(cell.spec, self._fleet.devices[0].kind)
        known = self._fleet.remembered.get(key, LearnedSize(source=cell.spec.source))
        new = LearnedSize(
            source=cell.spec.source,
            vram_bytes=vram_bytes or known.vram_bytes,
            host_bytes=host_bytes or known.host_bytes,
        )
        if _is_close(new.vram_bytes, known.vram_bytes) and _is_close(
            new.host_bytes, known.host_bytes
        ):
            return False
        remembered = self._fleet.remembered
        remembered.pop(key, None)
        remembered[key] = new
        while len(remembered) > MAX_MODELS:
            del remembered[next(iter(remembered))]
        self._is_stale = True
        return not self._is_writing

    async def save(self) -> None:
        """Write until nothing is new; a disk that cannot be written is said once."""
        self._is_writing = True
        try:
            while self._is_stale:
                self._is_stale = False
                await self._store.write(self._fleet.remembered)
        except OSError as error:
            if not self._was_unwritable:
                _log.warning("learned sizes not saved", error=str(error))
            self._was_unwritable = True
        finally:
            self._is_writing = False


def _is_close(one: int, other: int) -> bool:
    return abs(one - other) <= _TOLERANCE * max(one, other)
