"""What models were measured to hold, on disk, so that a restarted container plans right at once.

Why it exists: a model that declares no size is planned by its weights until it was in VRAM once; a
boot that knows better evicts once instead of twice. Called by ``learning`` and composed by
``serve``. A file that is missing, corrupt or not ours costs only this. It knows no ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import structlog

from vram_agent.protocol import DeviceKind, ModelSpec

_FILE: Final = "sizes.json"
_MAX_FILE_BYTES: Final = 1 << 20
_log = structlog.get_logger("vram_agent.sizes")


class LearnedSize(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The most that one model was measured to hold; ``source`` is there for a person who reads."""

    source: str
    vram_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    host_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0


class _File(msgspec.Struct, frozen=True, kw_only=True):
    version: Literal["v1"] = "v1"
    sizes: dict[str, LearnedSize]


def model_key(spec: ModelSpec, kind: DeviceKind) -> str:
    """Return what makes two models the same in memory, whatever they are called."""
    what = [spec.runtime, spec.source, spec.options, kind]
    return hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()[:32]


class FileSizes:
    """One JSON file, replaced atomically. The loop never waits for the disk."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _FILE

    async def read(self) -> dict[str, LearnedSize]:
        """Return what an earlier boot wrote; nothing, with a line of log, where that is no use."""
        return await asyncio.to_thread(self._read_now)

    async def write(self, sizes: Mapping[str, LearnedSize]) -> None:
        """Replace the file. Raises OSError and keeps the old content."""
        await asyncio.to_thread(self._write_now, msgspec.json.encode(_File(sizes=dict(sizes))))

    def _read_now(self) -> dict[str, LearnedSize]:
        try:
            with self._path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
            if len(content) > _MAX_FILE_BYTES:
                raise msgspec.DecodeError(f"it is larger than {_MAX_FILE_BYTES} bytes")
            return msgspec.json.decode(content, type=_File).sizes
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.warning("learned sizes ignored", path=str(self._path), error=str(error))
            return {}

    def _write_now(self, content: bytes) -> None:
        draft = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
