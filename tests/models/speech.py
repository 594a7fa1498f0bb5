"""Spoken words for the small models, synthesised by espeak-ng.

Exists because no recording can be downloaded where the models are made, and because a synthesiser
gives the exact text, start and end of every clip for nothing. Called by `make_whisper`,
`make_onnx`, `make_clips` and `measure`; tests read the committed clips instead and never come here.
Knows nothing about any model.

Everything random is drawn from a `random.Random` that the caller seeds, in a fixed order: the order
of the draws is part of what "the same seed" means, so a changed order is a new model.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from scipy.signal import resample_poly

Samples = npt.NDArray[np.float32]
"""Mono audio at `SAMPLE_RATE_HZ`, within -1…1."""

SAMPLE_RATE_HZ = 16_000
WAV_HEADER_BYTES = 44
AUDIBLE = 0.01
"""Amplitude below which the ends of a synthesised clip are trimmed off."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*DIGITS, "yes", "stop", "play", "open", "music", "light")
"""Each one is a single Whisper token with a leading space."""

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp")
HELD_OUT_ACCENTS = ("en-gb-x-gbclan", "en-gb-scotland")
# fmt: off
TRAINING_VARIANTS = (
    "m1", "m2", "m3", "m5", "m6", "m7", "m8", "f1", "f2", "f4", "f5", "Andrea", "Andy", "anika",
    "belinda", "boris", "david", "Denis", "Diogo", "ed", "Gene", "grandma", "gustave", "Jacky",
    "john", "klatt", "Lee", "linda", "max", "Michael", "michel", "miguel", "norbert", "pablo",
    "paul", "quincy", "rob", "sandro", "shelby", "travis", "victor", "zac",
)
# fmt: on
HELD_OUT_VARIANTS = (
    "m4",
    "f3",
    "Annie",
    "Alex",
    "Alicia",
    "Mike",
    "steph",
    "Mario",
    "Henrique",
    "marcelo",
    "aunty",
    "grandpa",
)
"""Never trained on, so that what is measured with them is not memory."""


class EspeakMissingError(RuntimeError):
    """The machine has no espeak-ng. Not worth a retry: somebody has to install it."""

    def __init__(self) -> None:
        super().__init__(
            "espeak-ng is not on PATH, and tests.models.speech needs it to synthesise the corpus. "
            "Install it (Debian, Ubuntu: apt-get install espeak-ng), or use the committed models "
            "and clips under tests/models/data, which need no synthesiser."
        )


@dataclass(frozen=True)
class Voice:
    """How espeak-ng is asked to speak."""

    name: str
    """Accent and variant, as in `en-us+m4`."""
    words_per_minute: int = 155
    pitch: int = 51
    """espeak-ng's own scale, 0…99."""


@dataclass(frozen=True)
class VoicePool:
    """Which voices a corpus is drawn from."""

    variants: Sequence[str] = TRAINING_VARIANTS
    accents: Sequence[str] = ACCENTS
    odd: bool = False
    """Odd speeds and pitches; training takes only the even ones."""


TRAINING_POOL = VoicePool()
HELD_OUT_POOL = VoicePool(variants=HELD_OUT_VARIANTS, odd=True)
HELD_OUT_ACCENTS_POOL = VoicePool(HELD_OUT_VARIANTS, HELD_OUT_ACCENTS, odd=True)


@dataclass(frozen=True)
class Utterance:
    """A spoken phrase and what was said in it."""

    words: tuple[str, ...]
    samples: Samples
    voice: Voice

    @property
    def text(self) -> str:
        """The words, joined by single spaces."""
        return " ".join(self.words)


@dataclass(frozen=True)
class Dressed:
    """An utterance after `dress`, with where the speech lies in it."""

    samples: Samples
    start_seconds: float
    end_seconds: float


def find_synthesiser() -> str:
    """The path of espeak-ng. Raises `EspeakMissingError`."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise EspeakMissingError
    return program


def synthesiser_version() -> str:
    """The version of espeak-ng, as in `1.51`. Blocks; raises `EspeakMissingError`."""
    said = subprocess.run(
        [find_synthesiser(), "--version"], capture_output=True, check=True, text=True
    ).stdout
    return said.split(":", 1)[1].split()[0]


def synthesise(text: str, voice: Voice) -> Samples:
    """Speak `text`, resampled to `SAMPLE_RATE_HZ` and trimmed to what is audible. Blocks.

    Trimming makes the start and end times of a phrase exact once silence is put around it.

    Raises `EspeakMissingError`, and `subprocess.CalledProcessError` for an unknown voice.
    """
    command = [
        *(find_synthesiser(), "-v", voice.name, "-s", str(voice.words_per_minute)),
        *("-p", str(voice.pitch), "--stdout", text),
    ]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    # espeak-ng writes to a pipe, so the length in its WAV header is wrong; the data is not.
    pcm = np.frombuffer(raw[WAV_HEADER_BYTES : len(raw) - len(raw) % 2], np.int16)
    speech = pcm.astype(np.float32) / 32768
    speech = resample_poly(speech, 320, 441).astype(np.float32)  # from 22,050 Hz
    loud = np.flatnonzero(np.abs(speech) > AUDIBLE)
    trimmed: Samples = speech[loud[0] : loud[-1] + 1]
    return trimmed


def synthesise_all(requests: Sequence[tuple[str, Voice]]) -> list[Samples]:
    """`synthesise` for each (text, voice), in order, two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda request: synthesise(*request), requests))


def draw_voice(rng: Random, pool: VoicePool) -> Voice:
    """One voice of `pool`."""
    return Voice(
        f"{rng.choice(pool.accents)}+{rng.choice(pool.variants)}",
        2 * rng.randint(58, 105) + pool.odd,
        2 * rng.randint(15, 38) + pool.odd,
    )


def draw_phrase(rng: Random, most_words: int = 6) -> tuple[str, ...]:
    """One to `most_words` words; half of the phrases are digits only."""
    population = DIGITS if rng.random() < 0.5 else WORDS
    return tuple(rng.choices(population, k=rng.randint(1, most_words)))


def build_corpus(
    count: int, seed: int, pool: VoicePool = TRAINING_POOL, most_words: int = 6
) -> list[Utterance]:
    """`count` connected phrases; the same arguments give the same samples. Blocks for minutes."""
    rng = Random(seed)
    drawn = [(draw_phrase(rng, most_words), draw_voice(rng, pool)) for _ in range(count)]
    spoken = synthesise_all([(" ".join(words), voice) for words, voice in drawn])
    return [
        Utterance(words, samples, voice)
        for (words, voice), samples in zip(drawn, spoken, strict=True)
    ]


def warp(samples: Samples, rng: Random, by: float = 0.13) -> Samples:
    """Play faster or slower by up to `by`.

    Moves tempo, pitch and formants together, which stands for more voices than there are.
    """
    step = rng.uniform(1 - by, 1 + by)
    at = np.arange(0, len(samples) - 1, step)
    warped: Samples = np.interp(at, np.arange(len(samples)), samples).astype(np.float32)
    return warped


def dress(
    samples: Samples, rng: Random, lead_seconds: float = 0.6, tail_seconds: float = 0.5
) -> Dressed:
    """Put up to so much silence around the clip, a gain of -20…+4 dB, and noise at 8…45 dB."""
    lead = int(rng.uniform(0, lead_seconds) * SAMPLE_RATE_HZ)
    tail = int(rng.uniform(0, tail_seconds) * SAMPLE_RATE_HZ)
    gain = 10 ** rng.uniform(-1, 0.2)
    dressed = np.pad(samples * np.float32(gain), (lead, tail))
    if rng.random() < 0.7:
        dressed = dressed + _draw_noise(dressed, rng)
    end = (lead + len(samples)) / SAMPLE_RATE_HZ
    return Dressed(np.clip(dressed, -1, 1).astype(np.float32), lead / SAMPLE_RATE_HZ, end)


def _draw_noise(under: Samples, rng: Random) -> Samples:
    """White or duller noise as long as `under`, 8…45 dB below its mean power."""
    generator = np.random.default_rng(rng.getrandbits(32))
    noise = generator.standard_normal(len(under)).astype(np.float32)
    if rng.random() < 0.5:
        noise = np.convolve(noise, np.ones(8, np.float32) / 8, "same").astype(np.float32)
    rms = np.sqrt((under**2).mean()) + 1e-4
    levelled: Samples = noise * rms / (noise.std() + 1e-9) * 10 ** (-rng.uniform(8, 45) / 20)
    return levelled
