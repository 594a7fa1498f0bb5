"""The last action on disk, so that a restarted container knows what it was restarted for.

Why it exists: the operator repeats a restart until a report answers it; the new boot must say that
it is done instead of restarting again. Called by the supervisor's actions. A directory that cannot
be written costs only this: the agent goes on and the action's message says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import msgspec

from vram_agent.protocol import ActionReport

_FILE = "action.json"


class FileJournal:
    """One JSON file, replaced atomically: a crash leaves the old content or the new."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _FILE

    def read(self) -> ActionReport | None:
        """Return the last action; None where the file is missing, unreadable or not ours."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=ActionReport)
        except (OSError, msgspec.MsgspecError):
            return None

    async def write(self, action: ActionReport) -> None:
        """Replace the file, in a thread: a slow disk must not hold up the supervisor."""
        await asyncio.to_thread(self.write_now, action)

    def write_now(self, action: ActionReport) -> None:
        """Write beside, flush to disk, rename. Raises OSError and keeps the old content."""
        draft = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(msgspec.json.encode(action))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
