"""Finds ffmpeg and runs it from one file to another, or between two streams.

Why it exists: decoding and encoding share how ffmpeg is found, timed and ended, and what of its
complaints a client may read. Called by ``audio.py`` and ``encoder.py``. It knows no formats.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import BinaryIO

from vram_agent.serving.scratch import ScratchFullError

TIMEOUT_SECONDS = 300.0
_STDERR_TAIL_BYTES = 4096
_PIECE_BYTES = 64 * 1024


class FfmpegError(Exception):
    """ffmpeg gave up; the message is its last line, without this machine's paths."""


def find_ffmpeg() -> str | None:
    """Return the path of an ffmpeg: from PATH, else the one of imageio-ffmpeg, else None.

    Blocks: the package tries its binary out.
    """
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    with contextlib.suppress(ImportError, RuntimeError):
        import imageio_ffmpeg  # noqa: PLC0415 - only where PATH has none; keeps the start short

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    return None


class Ffmpeg:
    """The ffmpeg of this machine, looked for until there is one."""

    def __init__(self, find: Callable[[], str | None]) -> None:
        self._find = find
        self._path: str | None = None

    async def is_there(self) -> bool:
        """Whether there is an ffmpeg to run."""
        if self._path is None:
            self._path = await asyncio.to_thread(self._find)
        return self._path is not None

    async def run(
        self,
        arguments: Sequence[str],
        source: BinaryIO,
        target: BinaryIO,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """Run with ``source`` as standard input and ``target`` as standard output.

        Raises FfmpegError, TimeoutError and ScratchFullError. A cancelled call ends ffmpeg.
        """
        process = await asyncio.create_subprocess_exec(
            self._path or "ffmpeg",
            *("-nostdin", "-hide_banner", "-loglevel", "error", "-threads", "1"),
            *arguments,
            stdin=source.fileno(),
            stdout=target.fileno(),
            stderr=PIPE,
        )
        try:
            async with asyncio.timeout(timeout_seconds):
                tail = await _read_tail(process)
                code = await process.wait()
        finally:
            await _ensure_ended(process)
        if code != 0:
            if os.strerror(errno.ENOSPC).encode() in tail:
                raise ScratchFullError
            raise FfmpegError(_last_line(tail))

    async def pump(
        self, arguments: Sequence[str], source: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """Yield what ffmpeg makes of a source while that still comes, without a limit of time.

        Raises FfmpegError, and what the source raises. Closing it ends ffmpeg, and the source.
        """
        process = await asyncio.create_subprocess_exec(
            self._path or "ffmpeg",
            *("-hide_banner", "-loglevel", "error", "-threads", "1"),
            *("-probesize", "32", "-analyzeduration", "0"),  # the format is said, not found out
            *arguments[:-1],
            *("-flush_packets", "1", arguments[-1]),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
        )
        feeding = asyncio.create_task(_feed(process, source))
        complaining = asyncio.create_task(_read_tail(process))
        try:
            assert process.stdout is not None  # noqa: S101 - it was asked for
            while piece := await process.stdout.read(_PIECE_BYTES):
                yield piece
            await feeding
            if await process.wait() != 0:
                raise FfmpegError(_last_line(await complaining))
        finally:
            feeding.cancel()
            await _ensure_ended(process)
            await asyncio.gather(feeding, complaining, return_exceptions=True)


async def _feed(process: Process, source: AsyncGenerator[bytes, None]) -> None:
    """Give ffmpeg the source, no faster than it reads. Raises what the source raises."""
    assert process.stdin is not None  # noqa: S101 - it was asked for
    try:
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                process.stdin.write(piece)
                await process.stdin.drain()
    except ConnectionError:  # it has ended, and its status says why
        pass
    finally:
        process.stdin.close()


async def _read_tail(process: Process) -> bytes:
    """Read all that ffmpeg complains of and keep the end: a broken file makes it talk for long."""
    tail = b""
    stream = process.stderr
    while stream is not None and (chunk := await stream.read(_STDERR_TAIL_BYTES)):
        tail = (tail + chunk)[-_STDERR_TAIL_BYTES:]
    return tail


async def _ensure_ended(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _last_line(tail: bytes) -> str:
    """Return ffmpeg's last line without what only concerns this machine."""
    lines = [line for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
    line = lines[-1] if lines else "ffmpeg gave no reason"
    line = re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\]\s*", "", line)
    line = re.sub(r"(file:)?/(proc|dev)/\S*?fd/0", "the upload", line)
    line = "".join(character if character.isprintable() else " " for character in line)
    return line.strip()[:200]
