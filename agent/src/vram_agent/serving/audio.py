"""Turns an uploaded recording into the tensor that speech models take.

Why it exists: clients send whatever their recorder writes, models take 16 kHz mono floats. Called
by the OpenAI handlers. It knows no HTTP and no model, and no numpy: the supervisor stays small.

The samples lie in an unlinked temporary file, as the upload does: hours of audio never live in this
process's private memory.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import BinaryIO

from vram_agent.backend import Tensor
from vram_agent.errors import BadInputError, TooLargeError
from vram_agent.serving import wav
from vram_agent.serving.ffmpeg import TIMEOUT_SECONDS, Ffmpeg, FfmpegError, find_ffmpeg
from vram_agent.serving.scratch import map_scratch, open_scratch

SAMPLE_RATE_HZ = 16_000
MAX_AUDIO_SECONDS = 4 * 3600
_BYTES_PER_SECOND = SAMPLE_RATE_HZ * 4
_MAX_CONCURRENT_DECODES = 4
_FAST_PATH_SECONDS = 60  # beyond, ffmpeg is quicker than Python, and leaves the event loop alone

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


class AudioDecoder:
    """Decodes uploads, a few at a time; the others wait without holding samples."""

    def __init__(
        self,
        *,
        find: Callable[[], str | None] = find_ffmpeg,
        timeout_seconds: float = TIMEOUT_SECONDS,
        max_audio_seconds: float = MAX_AUDIO_SECONDS,
    ) -> None:
        self._ffmpeg = Ffmpeg(find)
        self._timeout_seconds = timeout_seconds
        self._max_audio_seconds = max_audio_seconds
        self._slots = asyncio.Semaphore(min(_MAX_CONCURRENT_DECODES, os.cpu_count() or 1))

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
            if await self._ffmpeg.is_there():
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

    async def _decode_by_ffmpeg(self, upload: BinaryIO) -> Tensor:
        with open_scratch() as output:
            await self._run_ffmpeg(upload, output)
            samples = map_scratch(output)
        self._ensure_length(samples.nbytes / _BYTES_PER_SECOND)
        return _tensor(samples)

    async def _run_ffmpeg(self, upload: BinaryIO, output: BinaryIO) -> None:
        try:
            await self._ffmpeg.run(self._arguments(), upload, output, self._timeout_seconds)
        except TimeoutError:
            raise BadInputError(
                f"decoding took longer than {self._timeout_seconds:g} seconds; send a shorter "
                "recording or a simpler format",
                param="file",
            ) from None
        except FfmpegError as error:
            raise BadInputError(f"no audio could be read: {error}", param="file") from error

    def _arguments(self) -> list[str]:
        """Have ffmpeg open its standard input anew, as a file: MP4 needs seeking.

        One second more than allowed is written, to tell too long from just right.
        """
        return [
            *("-format_whitelist", _FORMATS, "-protocol_whitelist", "file"),
            *("-i", "file:/proc/self/fd/0", "-map", "0:a:0"),
            *("-t", str(self._max_audio_seconds + 1), "-af", _TO_MODEL_INPUT),
            *("-f", "f32le", "pipe:1"),
        ]


def _tensor(samples: bytes | memoryview) -> Tensor:
    if len(samples) < 4:
        raise BadInputError("the upload holds no sound", param="file")
    return Tensor(name="audio", datatype="FP32", shape=(len(samples) // 4,), data=samples)
