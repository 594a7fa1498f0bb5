"""Turns an uploaded recording into the tensor that speech models take.

Why it exists: clients send whatever their recorder writes, models take 16 kHz mono floats. Called
by the OpenAI handlers. It knows no HTTP and no model, and no numpy: the supervisor stays small.

The upload and the samples lie in unlinked temporary files, so neither a 1 GiB upload nor hours of
audio live in this process's private memory, and nothing is left behind when a client goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import re
import shutil
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from typing import BinaryIO, cast

from vram_agent.backend import Tensor
from vram_agent.errors import AgentError, BadInputError, TooLargeError
from vram_agent.serving import wav

SAMPLE_RATE_HZ = 16_000
MAX_AUDIO_SECONDS = 4 * 3600
DECODE_TIMEOUT_SECONDS = 300.0
_BYTES_PER_SECOND = SAMPLE_RATE_HZ * 4
_MAX_CONCURRENT_DECODES = 4
_FAST_PATH_SECONDS = 60  # beyond, ffmpeg is quicker than Python, and leaves the event loop alone
_STDERR_TAIL_BYTES = 4096
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

# Formats of one self-contained file. Playlists and scripts (hls, dash, concat, sdp …) are left out:
# they make ffmpeg open other files and URLs, with this pod's rights.
# https://ffmpeg.org/ffmpeg-formats.html#Format-Options (format_whitelist)
_FORMATS = (
    "3g2,3gp,aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,loas,m4a,"
    "matroska,mj2,mov,mp2,mp3,mp4,mpc,mpc8,mpeg,mpegts,mxf,nut,oga,ogg,opus,rm,tak,tta,voc,w64,"
    "wav,webm,wv,xwma"
)
# Through 16-bit samples, as Whisper's own loader: mixing down floats is not normalised and leaves
# the range -1 to 1. https://ffmpeg.org/ffmpeg-resampler.html (rematrix_maxval)
_TO_MODEL_INPUT = f"aformat=sample_fmts=s16:sample_rates={SAMPLE_RATE_HZ}:channel_layouts=mono"


def open_scratch() -> BinaryIO:
    """Return an unlinked temporary file; anonymous memory where no folder can be written."""
    try:
        return cast("BinaryIO", tempfile.TemporaryFile(prefix="vram-agent-"))
    except OSError:  # a read-only root filesystem without an emptyDir at /tmp
        return os.fdopen(os.memfd_create("vram-agent-scratch"), "w+b")


class ScratchFullError(AgentError):
    """There is no room for an upload where temporary files lie."""

    status = 503
    code = "scratch_full"

    def __init__(
        self, message: str | None = None, *, retry_after_seconds: float | None = 5.0
    ) -> None:
        super().__init__(
            message
            or f"no space left in {tempfile.gettempdir()} for the upload; free some, or mount a "
            "larger emptyDir there",
            retry_after_seconds=retry_after_seconds,
        )


def write_scratch(file: BinaryIO, data: bytes) -> None:
    """Write through to the file. Blocks. Raises ScratchFullError."""
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ScratchFullError from error
        raise


def close_scratch(file: BinaryIO) -> None:
    """Close a file whose content nobody needs any more, whatever could not be written of it."""
    with contextlib.suppress(OSError):
        file.close()


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


class AudioDecoder:
    """Decodes uploads, a few at a time; the others wait without holding samples."""

    def __init__(
        self,
        *,
        find: Callable[[], str | None] = find_ffmpeg,
        timeout_seconds: float = DECODE_TIMEOUT_SECONDS,
        max_audio_seconds: float = MAX_AUDIO_SECONDS,
    ) -> None:
        self._find = find
        self._timeout_seconds = timeout_seconds
        self._max_audio_seconds = max_audio_seconds
        self._slots = asyncio.Semaphore(min(_MAX_CONCURRENT_DECODES, os.cpu_count() or 1))
        self._ffmpeg: str | None = None

    async def decode(self, upload: BinaryIO) -> Tensor:
        """Return the recording as tensor ``audio``: FP32, [samples], 16 kHz, mono.

        1. Short WAV PCM16, 16 kHz, mono: converted here, no process is started.
        2. ffmpeg is there: it reads whatever it can.
        3. Other WAV PCM16: mixed down and resampled here.
        4. Else nothing can read it.

        Raises BadInputError where it is no audio and TooLargeError where it is too long. A
        cancelled call ends ffmpeg.
        """
        async with self._slots:
            header = wav.read_header(upload)
            if header is not None:
                self._ensure_length(header.seconds)
            # 1.
            if header is not None and header.is_exact and header.seconds <= _FAST_PATH_SECONDS:
                return _tensor(await asyncio.to_thread(wav.read_samples, upload.fileno(), header))
            # 2.
            if await self._ensure_ffmpeg() is not None:
                return await self._decode_by_ffmpeg(upload)
            # 3.
            if header is not None:
                return _tensor(await asyncio.to_thread(wav.read_samples, upload.fileno(), header))
        # 4.
        raise BadInputError(
            "this agent has no ffmpeg and reads WAV with 16-bit PCM only; send that, or install "
            "ffmpeg (or the Python package imageio-ffmpeg) in the agent's image",
            param="file",
        )

    def _ensure_length(self, seconds: float) -> None:
        if seconds > self._max_audio_seconds:
            raise TooLargeError(f"the recording is longer than {self._max_audio_seconds:g} seconds")

    async def _ensure_ffmpeg(self) -> str | None:
        if self._ffmpeg is None:
            self._ffmpeg = await asyncio.to_thread(self._find)
        return self._ffmpeg

    async def _decode_by_ffmpeg(self, upload: BinaryIO) -> Tensor:
        with open_scratch() as output:
            await self._run_ffmpeg(upload, output)
            size = os.fstat(output.fileno()).st_size
            self._ensure_length(size / _BYTES_PER_SECOND)
            if size < 4:
                raise BadInputError("the upload holds no sound", param="file")
            samples = mmap.mmap(output.fileno(), size, access=mmap.ACCESS_READ)
        return _tensor(memoryview(samples))

    async def _run_ffmpeg(self, upload: BinaryIO, output: BinaryIO) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command(), stdin=upload.fileno(), stdout=output.fileno(), stderr=PIPE
        )
        try:
            async with asyncio.timeout(self._timeout_seconds):
                tail = await _read_tail(process)
                code = await process.wait()
        except TimeoutError:
            raise BadInputError(
                f"decoding took longer than {self._timeout_seconds:g} seconds; send a shorter "
                "recording or a simpler format",
                param="file",
            ) from None
        finally:
            await _ensure_ended(process)
        if code != 0:
            if os.strerror(errno.ENOSPC).encode() in tail:
                raise ScratchFullError
            raise BadInputError(f"no audio could be read: {_last_line(tail)}", param="file")

    def _command(self) -> list[str]:
        """Have ffmpeg open its standard input anew, as a file: MP4 needs seeking.

        One second more than allowed is written, to tell too long from just right.
        """
        return [
            *(self._ffmpeg or "ffmpeg", "-nostdin", "-hide_banner", "-loglevel", "error"),
            *("-threads", "1", "-format_whitelist", _FORMATS, "-protocol_whitelist", "file"),
            *("-i", "file:/proc/self/fd/0", "-map", "0:a:0"),
            *("-t", str(self._max_audio_seconds + 1), "-af", _TO_MODEL_INPUT),
            *("-f", "f32le", "pipe:1"),
        ]


def _tensor(samples: bytes | memoryview) -> Tensor:
    if len(samples) < 4:
        raise BadInputError("the upload holds no sound", param="file")
    return Tensor(name="audio", datatype="FP32", shape=(len(samples) // 4,), data=samples)


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
