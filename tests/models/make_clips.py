"""Speak the committed clips, in voices that no model was trained on.

    python -m tests.models.make_clips

Exists so that tests and the demo need no espeak-ng. Writes `data/clips/*.wav` and the texts in
`clips.json`; the texts are what was asked of the synthesiser, never what a model made of it, and
`test_models` holds the models to them. Voices and phrase lengths are those that the Whisper knows
best, so that a change of rounding between library versions turns no test.
"""

from __future__ import annotations

import json
import logging
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import CLIP_TEXTS, CLIPS
from .speech import DIGITS, SAMPLE_RATE_HZ, Samples, Voice, synthesise

log = logging.getLogger(__name__)

PADDING_SAMPLES = SAMPLE_RATE_HZ // 5
DIGIT_LEAD_SAMPLES = SAMPLE_RATE_HZ // 10
SILENCE_SECONDS = 2


@dataclass(frozen=True)
class Request:
    """One clip to speak; the speed and pitch are odd, which training never uses."""

    variant: str
    text: str
    accent: str = "en-us"
    words_per_minute: int = 151
    pitch: int = 51

    @property
    def voice(self) -> Voice:
        """The voice to ask espeak-ng for."""
        return Voice(f"{self.accent}+{self.variant}", self.words_per_minute, self.pitch)

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return f"{self.variant.lower()}-{self.text.replace(' ', '-')}"


PHRASES = (
    Request("m4", "play music"),
    Request("m4", "one two three four", words_per_minute=171),
    Request("f3", "seven"),
    Request("f3", "open light", accent="en-gb", pitch=57),
    Request("f3", "stop nine zero", words_per_minute=131),
    Request("Mike", "yes", pitch=43),
    Request("Mike", "eight six two", accent="en-gb"),
    Request("Alex", "light five", accent="en-gb-x-rp", pitch=47),
    Request("Alex", "yes play three open", words_per_minute=161),
)
DIGIT_REQUESTS = (
    Request("m4", "zero"),
    Request("f3", "three"),
    Request("Mike", "seven", accent="en-gb"),
    Request("Alex", "nine", accent="en-gb-x-rp"),
)


def write_wav(path: Path, samples: Samples) -> None:
    """Write 16 kHz mono 16-bit."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def speak_phrase(request: Request) -> Samples:
    """The phrase with a fifth of a second of silence on both sides."""
    return np.pad(synthesise(request.text, request.voice), PADDING_SAMPLES)


def speak_second(request: Request) -> Samples:
    """The word after a tenth of a second of silence, cut or filled to one second."""
    spoken = synthesise(request.text, request.voice)[: SAMPLE_RATE_HZ - DIGIT_LEAD_SAMPLES]
    tail = SAMPLE_RATE_HZ - DIGIT_LEAD_SAMPLES - len(spoken)
    return np.pad(spoken, (DIGIT_LEAD_SAMPLES, tail))


def main() -> None:
    """Write every clip and the texts."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    CLIPS.mkdir(parents=True, exist_ok=True)
    speech, digits = {}, {}
    for request in PHRASES:
        name = f"{request.stem}.wav"
        write_wav(CLIPS / name, speak_phrase(request))
        speech[name] = request.text
    write_wav(CLIPS / "silence.wav", np.zeros(SILENCE_SECONDS * SAMPLE_RATE_HZ, np.float32))
    speech["silence.wav"] = ""
    for request in DIGIT_REQUESTS:
        name = f"digit-{request.stem}.wav"
        write_wav(CLIPS / name, speak_second(request))
        digits[name] = DIGITS.index(request.text)
    CLIP_TEXTS.write_text(json.dumps({"speech": speech, "digits": digits}, indent=2) + "\n")
    log.info("wrote %d clips to %s", len(speech) + len(digits), CLIPS)


if __name__ == "__main__":
    main()
