"""What the stand-in's parts share: the device that upstream's ``"cuda"`` means here, and a diary.

The parts name the device, move themselves to it and remember it as upstream does; only where
upstream writes ``"cuda"`` they ask ``cuda()``, since a machine without one would refuse.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import soundfile  # type: ignore[import-untyped]
import torch
from torch import nn


def cuda() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def note(words: str) -> None:
    """Write what was called, for the test to read: it runs in another process."""
    with Path(os.environ["STAND_IN_DIARY"]).open("a", encoding="utf-8") as diary:
        diary.write(f"{words}\n")


def wait_at_gate() -> None:
    """Wait until the test has opened the gate, a FIFO, where it has set one up."""
    gate = Path(os.environ["STAND_IN_GATE"])
    if gate.exists():
        gate.read_bytes()


class MovesItself(nn.Module):
    """A module whose ``.cuda()`` goes where upstream's would."""

    def cuda(self, device: Any = None) -> Any:
        note(f"Module.cuda({device})")
        return self.to(cuda())


def load_sound(path: str) -> tuple[torch.Tensor, int]:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


def frames_of(audio: torch.Tensor) -> torch.Tensor:
    """Eight figures for each 50th of a second of 16 kHz; [1, T, 8]."""
    mono = audio.mean(dim=0)
    whole = mono[: mono.numel() // 320 * 320].reshape(1, -1, 8, 40)
    return whole.abs().mean(dim=3) * 8
