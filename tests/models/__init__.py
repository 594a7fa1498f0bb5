"""Small real models with answers that can be asserted word for word, and clips to ask them.

Exists so that tests, the demo and the examples run real inference with no download and no
synthesiser. They call this module only; the scripts beside it made the files under `data`, by hand,
and `data/MANIFEST.json` says how. Imports neither torch nor numpy until samples are read.
"""

from __future__ import annotations

import json
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .speech import Samples

DATA = Path(__file__).parent / "data"
MANIFEST = DATA / "MANIFEST.json"
CLIPS = DATA / "clips"
CLIP_TEXTS = CLIPS / "clips.json"

WHISPER = DATA / "whisper-tiny-words.pt"
"""A stock Whisper checkpoint, fp16, 7.4 MB of weights; for `whisper.load_model`."""

DIGITS = DATA / "spoken-digit.onnx"
"""`audio` FP32 [batch, 16000] -> `probabilities` FP32 [batch, 10], `digit` INT64 [batch]."""


FUNASR = DATA / "funasr-words"
"""A folder that stock `funasr.AutoModel` reads: a CTC model of the same sixteen words."""


@dataclass(frozen=True)
class Clip:
    """A recording, 16 kHz mono 16-bit WAV, and what Whisper must make of it."""

    path: Path
    text: str
    """Words with single spaces between them, none around; empty for silence."""


@dataclass(frozen=True)
class DigitClip:
    """A recording of exactly one second, and the digit that the classifier must find in it."""

    path: Path
    digit: int


def clips() -> list[Clip]:
    """The clips for `WHISPER`."""
    texts = json.loads(CLIP_TEXTS.read_text())["speech"]
    return [Clip(CLIPS / name, text) for name, text in texts.items()]


def digit_clips() -> list[DigitClip]:
    """The clips for `DIGITS`."""
    digits = json.loads(CLIP_TEXTS.read_text())["digits"]
    return [DigitClip(CLIPS / name, digit) for name, digit in digits.items()]


def read_samples(path: Path) -> Samples:
    """The samples of a clip as `whisper.load_audio` gives them, without ffmpeg: float32, -1…1.

    Raises `ValueError` for a WAV file that is not 16 kHz mono 16-bit.
    """
    import numpy as np  # noqa: PLC0415 - most callers want paths only

    with wave.open(str(path), "rb") as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (16_000, 1, 2):
            raise ValueError(
                f"{path}: rate, channels and sample width are {form}, not (16000, 1, 2). "
                "Convert it: ffmpeg -i IN -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav"
            )
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return pcm.astype(np.float32) / np.float32(32768)
