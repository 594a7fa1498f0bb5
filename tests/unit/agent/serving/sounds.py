"""Recordings made on the spot: WAV by hand, everything else by ffmpeg."""

from __future__ import annotations

import itertools
import math
import struct
import subprocess
from array import array
from pathlib import Path

from vram_agent.backend import Tensor
from vram_agent.serving.ffmpeg import find_ffmpeg


def tone(seconds: float, rate_hz: int = 16_000, channels: int = 1) -> array[int]:
    """A 440 Hz tone of half amplitude; the channels have opposite halves above the first."""
    samples = array("h")
    for index in range(int(seconds * rate_hz)):
        value = round(16_384 * math.sin(2 * math.pi * 440 * index / rate_hz))
        samples.extend([value] * channels)
    return samples


def wav(samples: array[int], rate_hz: int = 16_000, channels: int = 1, bits: int = 16) -> bytes:
    data = samples.tobytes()
    frame = channels * bits // 8
    fmt = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * frame, frame, bits)
    body = b"WAVE" + b"fmt " + struct.pack("<I", 16) + fmt
    body += b"junk" + struct.pack("<I", 3) + b"abc\0"  # an odd chunk, padded
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encoded(folder: Path, suffix: str, *options: str) -> bytes:
    """One second of tone, 44.1 kHz stereo, as ffmpeg writes it for the suffix."""
    source, target = folder / "source.wav", folder / f"target.{suffix}"
    source.write_bytes(wav(tone(1.0, 44_100, 2), 44_100, 2))
    ffmpeg = find_ffmpeg()
    assert ffmpeg is not None, "these tests need ffmpeg or imageio-ffmpeg"
    command = [ffmpeg, "-loglevel", "error", "-i", str(source), *options, str(target)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target.read_bytes()


def floats(tensor: Tensor) -> array[float]:
    samples = array("f")
    samples.frombytes(bytes(tensor.data))
    return samples


def crossings(samples: array[float]) -> int:
    """How often a tone passes zero upwards: its frequency, for a recording of one second."""
    return sum(1 for a, b in itertools.pairwise(samples) if a < 0 <= b)
