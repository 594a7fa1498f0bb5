"""Reads and begins WAV files with 16-bit PCM without ffmpeg.

Why it exists: it is what voice clients send most, short and ready to use, and starting a process
for it takes longer than reading it. Also the fallback of an image without ffmpeg. Called by
``audio.py`` and ``encoder.py`` only.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import BinaryIO

_RATE_HZ = 16_000
_PCM = 1
_EXTENSIBLE = 0xFFFE
_MAX_CHUNKS = 64
_MAX_CHANNELS = 64
_HEAD_BYTES = 44
_MAX_DATA_BYTES = 0xFFFF_FFFF - _HEAD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class WavHeader:
    """Where the samples of a 16-bit PCM WAV file are, and how they are laid out."""

    channels: int
    rate_hz: int
    data_offset: int
    data_bytes: int

    @property
    def is_exact(self) -> bool:
        """Whether the samples need no mixing and no resampling."""
        return self.channels == 1 and self.rate_hz == _RATE_HZ

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return self.data_bytes / (2 * self.channels * self.rate_hz)


def read_header(file: BinaryIO) -> WavHeader | None:
    """Return the layout of a 16-bit PCM WAV file, None for anything else. Reads headers only."""
    descriptor = file.fileno()
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, 12, 0)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    layout: tuple[int, int] | None = None
    offset = 12
    for _ in range(_MAX_CHUNKS):
        chunk = os.pread(descriptor, 8, offset)
        if len(chunk) < 8:
            return None
        name, length = struct.unpack("<4sI", chunk)
        offset += 8
        if name == b"fmt ":
            layout = _layout(os.pread(descriptor, min(length, 40), offset))
        elif name == b"data":
            return _header(layout, offset, min(length, size - offset))
        offset += length + length % 2
    return None


def header(count: int, rate_hz: int) -> bytes:
    """Return what stands before ``count`` mono samples; too many for the format: to the end."""
    data_bytes = min(2 * count, _MAX_DATA_BYTES)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", data_bytes + _HEAD_BYTES - 8, b"WAVE"),
        *(b"fmt ", 16, _PCM, 1, rate_hz, 2 * rate_hz, 2, 16),
        *(b"data", data_bytes),
    )


def read_samples(descriptor: int, header: WavHeader) -> bytes:
    """Return the samples as little-endian FP32, 16 kHz, mono, -1…1. Blocks; thread-safe.

    Channels are averaged. Other rates are interpolated linearly, which is good enough for speech
    where there is no ffmpeg to do better.
    """
    samples = array("h", os.pread(descriptor, header.data_bytes, header.data_offset))
    if sys.byteorder == "big":
        samples.byteswap()
    if header.channels == 1:
        mono = array("f", (sample / 32768 for sample in samples))
    else:
        lanes = [samples[lane :: header.channels] for lane in range(header.channels)]
        scale = 1 / (32768 * header.channels)
        mono = array("f", (sum(frame) * scale for frame in zip(*lanes, strict=True)))
    if header.rate_hz != _RATE_HZ:
        mono = _resample(mono, header.rate_hz)
    if sys.byteorder == "big":
        mono.byteswap()
    return mono.tobytes()


def _layout(fmt: bytes) -> tuple[int, int] | None:
    """Return channels and rate of a ``fmt`` chunk of 16-bit PCM."""
    if len(fmt) < 16:
        return None
    code, channels, rate_hz, _, _, bits = struct.unpack("<HHIIHH", fmt[:16])
    if code == _EXTENSIBLE and len(fmt) >= 26:
        code = struct.unpack("<H", fmt[24:26])[0]
    if code != _PCM or bits != 16 or not 1 <= channels <= _MAX_CHANNELS or rate_hz == 0:
        return None
    return channels, rate_hz


def _header(layout: tuple[int, int] | None, offset: int, data_bytes: int) -> WavHeader | None:
    """A length beyond the file, as recorders that stream write it, means: to the end."""
    if layout is None:
        return None
    channels, rate_hz = layout
    whole_frames = data_bytes - data_bytes % (2 * channels)
    return WavHeader(
        channels=channels, rate_hz=rate_hz, data_offset=offset, data_bytes=whole_frames
    )


def _resample(samples: array[float], rate_hz: int) -> array[float]:
    if len(samples) < 2:
        return samples
    count = len(samples) * _RATE_HZ // rate_hz
    step = rate_hz / _RATE_HZ
    last = len(samples) - 2
    resampled = array("f", bytes(4 * count))
    for index in range(count):
        position = index * step
        left = min(int(position), last)
        share = min(position - left, 1.0)
        resampled[index] = samples[left] + (samples[left + 1] - samples[left]) * share
    return resampled
