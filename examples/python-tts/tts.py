"""A voice of your own code: vowels as resonances over a buzz, consonants as noise.

It is small, so that all of it can be read, and it is a real one: the tables are torch buffers,
which the agent moves between VRAM and host memory as it does with the weights of any other model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from vram_agent.errors import BadInputError

RATE_HERTZ = 24_000
LETTER_SECONDS = 0.12
VOICES = {"low": 110.0, "high": 220.0}  # hertz
VOWELS = "aeiou"
# The first three resonances of each vowel, in hertz, and how wide they are.
RESONANCES = [
    [730.0, 1090.0, 2440.0],
    [530.0, 1840.0, 2480.0],
    [270.0, 2290.0, 3010.0],
    [570.0, 840.0, 2410.0],
    [300.0, 870.0, 2240.0],
]
WIDTHS = [60.0, 90.0, 150.0]


class Tts(nn.Module):
    """Speaks letter by letter. The method ``speech`` is what makes it a model that speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("resonances", torch.tensor(RESONANCES))
        self.register_buffer("widths", torch.tensor(WIDTHS))
        self.register_buffer("fade", torch.hann_window(480))

    @torch.inference_mode()
    def speech(self, text: str, parameters: dict[str, Any]) -> tuple[np.ndarray[Any, Any], int]:
        """Return floats from -1 to 1, and their rate; parameters are those that the client gave."""
        voice = parameters.get("voice") or "low"
        if voice not in VOICES:
            raise BadInputError(f"voice {voice!r} is not one of {', '.join(VOICES)}")
        count = int(LETTER_SECONDS * RATE_HERTZ / float(parameters.get("speed", 1.0)))
        noise = torch.Generator().manual_seed(0)  # the same text sounds the same
        parts = [self._sound(letter, VOICES[voice], count, noise) for letter in text.lower()]
        return torch.cat(parts).cpu().numpy(), RATE_HERTZ

    def _sound(self, letter: str, hertz: float, count: int, noise: torch.Generator) -> torch.Tensor:
        where = self.resonances.device
        if letter in VOWELS:
            sound = self._vowel(VOWELS.index(letter), hertz, count)
        elif letter.isalnum():
            sound = 0.1 * torch.randn(count, generator=noise).clamp(-3, 3).to(where)
        else:
            return torch.zeros(count, device=where)
        edge = self.fade[: min(240, count // 2)]
        sound[: len(edge)] *= edge
        sound[count - len(edge) :] *= edge.flip(0)
        return sound

    def _vowel(self, number: int, hertz: float, count: int) -> torch.Tensor:
        """All harmonics below 4 kHz, each as loud as the resonances let it through."""
        where = self.resonances.device
        harmonics = hertz * torch.arange(1, int(4000 / hertz), device=where)
        away = (harmonics[:, None] - self.resonances[number]) / self.widths
        loudness = (1 / (1 + away.square())).sum(dim=1)
        seconds = torch.arange(count, device=where) / RATE_HERTZ
        waves = torch.sin(2 * torch.pi * harmonics[:, None] * seconds)
        return 0.9 * (loudness[:, None] * waves).sum(dim=0) / loudness.sum()


def load() -> Tts:
    """The factory that the workload names: ``source: tts:load``."""
    return Tts().eval()
