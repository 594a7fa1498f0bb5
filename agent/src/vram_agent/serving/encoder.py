"""Turns what a model spoke into the format that a client wants.

Why it exists: models give floats at a rate of their own, players want MP3 or WAV. Called by
``speech.py``. It knows no HTTP and no model, and no numpy: the supervisor stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from vram_agent.backend import TaskPart, TaskResult, Tensor
from vram_agent.errors import BadInputError, TaskFailedError
from vram_agent.serving import wav
from vram_agent.serving.ffmpeg import TIMEOUT_SECONDS, Ffmpeg, FfmpegError, find_ffmpeg
from vram_agent.serving.scratch import map_scratch, open_scratch, write_scratch

PCM_RATE_HZ = 24_000
"""What clients of the OpenAI API play headerless samples at."""

_MAX_CONCURRENT_ENCODES = 4
_RATES_HZ = range(1_000, 384_001)
_BLOCK_SAMPLES = 64 * 1024
_UNKNOWN_COUNT = 1 << 32
"""More samples than a WAV can say: its header then means all that follows."""


class SpeechFormat(StrEnum):
    """Values of ``response_format`` of a speech request."""

    MP3 = "mp3"
    OPUS = "opus"
    AAC = "aac"
    FLAC = "flac"
    WAV = "wav"
    PCM = "pcm"


CONTENT_TYPES = {
    SpeechFormat.MP3: "audio/mpeg",
    SpeechFormat.OPUS: "audio/opus",
    SpeechFormat.AAC: "audio/aac",
    SpeechFormat.FLAC: "audio/flac",
    SpeechFormat.WAV: "audio/wav",
    SpeechFormat.PCM: "audio/pcm",
}
# ffmpeg's codec and container, as the OpenAI API has them: Opus in Ogg, AAC in ADTS.
_CODECS = {
    SpeechFormat.MP3: ("libmp3lame", "mp3"),
    SpeechFormat.OPUS: ("libopus", "ogg"),
    SpeechFormat.AAC: ("aac", "adts"),
    SpeechFormat.FLAC: ("flac", "flac"),
    SpeechFormat.PCM: ("pcm_s16le", "s16le"),
}
# Datatype: struct's code, and what makes a sample of the range -1 to 1 one of 16 bits.
_SAMPLES = {"FP16": ("e", 32_767), "FP32": ("f", 32_767), "FP64": ("d", 32_767), "INT16": ("h", 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """What a model spoke, mono: little-endian samples of ``datatype``, floats from -1 to 1."""

    samples: memoryview
    datatype: str
    rate_hz: int

    @property
    def count(self) -> int:
        """How many samples there are."""
        return self.samples.nbytes // struct.calcsize(_SAMPLES[self.datatype][0])


def read_speech(model: str, result: TaskResult | TaskPart) -> Speech:
    """Return what a speech task gave. Raises TaskFailedError where that is no mono audio."""
    audio = next((tensor for tensor in result.tensors if tensor.name == "audio"), None)
    rate_hz = result.values.get("rate")
    if audio is None or not isinstance(rate_hz, int) or rate_hz not in _RATES_HZ:
        raise TaskFailedError(
            f"model {model} gave no speech: it must return samples, and their rate in hertz from "
            f"{_RATES_HZ[0]} to {_RATES_HZ[-1]}"
        )
    if audio.datatype not in _SAMPLES or not _is_mono(audio):
        raise TaskFailedError(
            f"model {model} spoke {audio.datatype} of shape {list(audio.shape)[:8]}; speech is one "
            f"channel of {', '.join(_SAMPLES)}, at least one sample"
        )
    return Speech(
        samples=memoryview(audio.data).cast("B"), datatype=audio.datatype, rate_hz=rate_hz
    )


class SpeechEncoder:
    """Encodes speech, a few pieces at a time."""

    def __init__(
        self,
        *,
        find: Callable[[], str | None] = find_ffmpeg,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._ffmpeg = Ffmpeg(find)
        self._timeout_seconds = timeout_seconds
        self._slots = asyncio.Semaphore(min(_MAX_CONCURRENT_ENCODES, os.cpu_count() or 1))

    async def ensure_offered(self, response_format: SpeechFormat) -> None:
        """Raise BadInputError for a format that needs ffmpeg where there is none."""
        if response_format in {SpeechFormat.WAV, SpeechFormat.PCM}:
            return
        if not await self._ffmpeg.is_there():
            raise BadInputError(
                f"this agent has no ffmpeg and writes wav and pcm only, not {response_format}; ask "
                "for one of those, or install ffmpeg (or the Python package imageio-ffmpeg) in "
                "the agent's image",
                param="response_format",
            )

    async def encode(self, speech: Speech, response_format: SpeechFormat) -> memoryview:
        """Return the whole file, mapped from an unlinked one.

        1. WAV, at the model's own rate: written here.
        2. PCM of a model that speaks at 24 kHz: written here.
        3. Else ffmpeg resamples and encodes.

        Raises BadInputError where ffmpeg is needed and missing, TaskFailedError where it fails, and
        ScratchFullError. A cancelled call ends ffmpeg.
        """
        async with self._slots:
            with open_scratch() as target:
                # 1.
                if response_format is SpeechFormat.WAV:
                    head = wav.header(speech.count, speech.rate_hz)
                    await asyncio.to_thread(_write_pcm16, speech, target, head)
                # 2.
                elif response_format is SpeechFormat.PCM and speech.rate_hz == PCM_RATE_HZ:
                    await asyncio.to_thread(_write_pcm16, speech, target, b"")
                # 3.
                else:
                    await self._encode_by_ffmpeg(speech, response_format, target)
                return map_scratch(target)

    async def encode_stream(
        self, speech: AsyncIterator[Speech], response_format: SpeechFormat
    ) -> AsyncGenerator[bytes, None]:
        """Yield the file as the speech comes; a WAV says that it goes on to the end.

        The same three ways as ``encode``, and the same errors. Closing it ends ffmpeg.
        """
        first = await anext(aiter(speech))
        samples = _samples(first, speech)
        if response_format is SpeechFormat.WAV:
            yield wav.header(_UNKNOWN_COUNT, first.rate_hz)
        elif response_format is not SpeechFormat.PCM or first.rate_hz != PCM_RATE_HZ:
            await self._ensure_resampler(first.rate_hz)
            samples = self._ffmpeg.pump(_arguments(first.rate_hz, response_format), samples)
        async with contextlib.aclosing(samples) as encoded:
            try:
                async for piece in encoded:
                    yield piece
            except FfmpegError as error:
                raise TaskFailedError(
                    f"the speech could not be encoded as {response_format}: {error}"
                ) from error

    async def _ensure_resampler(self, rate_hz: int) -> None:
        if not await self._ffmpeg.is_there():
            raise BadInputError(
                f"the model speaks at {rate_hz} Hz, pcm is {PCM_RATE_HZ} Hz, and this agent "
                "has no ffmpeg to resample; ask for wav, or install ffmpeg in the agent's image",
                param="response_format",
            )

    async def _encode_by_ffmpeg(
        self, speech: Speech, response_format: SpeechFormat, target: BinaryIO
    ) -> None:
        await self._ensure_resampler(speech.rate_hz)
        with open_scratch() as source:
            await asyncio.to_thread(_write_pcm16, speech, source, b"")
            source.seek(0)
            arguments = _arguments(speech.rate_hz, response_format)
            try:
                await self._ffmpeg.run(arguments, source, target, self._timeout_seconds)
            except (FfmpegError, TimeoutError) as error:
                raise TaskFailedError(
                    f"the speech could not be encoded as {response_format}: "
                    f"{str(error) or 'it took too long'}"
                ) from error


def _arguments(rate_hz: int, response_format: SpeechFormat) -> Sequence[str]:
    codec, container = _CODECS[response_format]
    resampled = ("-ar", str(PCM_RATE_HZ)) if response_format is SpeechFormat.PCM else ()
    return (
        *("-f", "s16le", "-ar", str(rate_hz), "-ac", "1", "-i", "pipe:0"),
        *("-c:a", codec, *resampled, "-f", container, "pipe:1"),
    )


async def _samples(first: Speech, rest: AsyncIterator[Speech]) -> AsyncGenerator[bytes, None]:
    """Yield the samples with 16 bits. Raises TaskFailedError where the rate changes midway."""
    yield await asyncio.to_thread(_all_pcm16, first)
    async for speech in rest:
        if speech.rate_hz != first.rate_hz:
            raise TaskFailedError(
                f"the model spoke at {first.rate_hz} Hz and went on at {speech.rate_hz} Hz"
            )
        yield await asyncio.to_thread(_all_pcm16, speech)


def _all_pcm16(speech: Speech) -> bytes:
    code, scale = _SAMPLES[speech.datatype]
    if scale == 1:
        return bytes(speech.samples)
    return _to_pcm16(speech.samples, code, scale)


def _write_pcm16(speech: Speech, target: BinaryIO, head: bytes) -> None:
    """Write ``head`` and the samples with 16 bits. Blocks. Raises ScratchFullError."""
    write_scratch(target, head)
    code, scale = _SAMPLES[speech.datatype]
    block_bytes = _BLOCK_SAMPLES * struct.calcsize(code)
    for offset in range(0, speech.samples.nbytes, block_bytes):
        block = speech.samples[offset : offset + block_bytes]
        write_scratch(target, block if scale == 1 else _to_pcm16(block, code, scale))


def _to_pcm16(block: memoryview, code: str, scale: int) -> bytes:
    samples = struct.unpack(f"<{block.nbytes // struct.calcsize(code)}{code}", block)
    return struct.pack(
        f"<{len(samples)}h",
        *[round(s * scale) if -1 <= s <= 1 else _clipped(s, scale) for s in samples],
    )


def _clipped(sample: float, scale: int) -> int:
    """Return the loudest sample of that sign; what is no number is silence."""
    return 0 if math.isnan(sample) else int(math.copysign(scale, sample))


def _is_mono(audio: Tensor) -> bool:
    """Whether all dimensions but one are 1, and the data are as long as they say."""
    count = math.prod(audio.shape)
    item_bytes = struct.calcsize(_SAMPLES[audio.datatype][0])
    return 0 < count == max(audio.shape, default=0) == memoryview(audio.data).nbytes // item_bytes
