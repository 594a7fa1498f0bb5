"""Stands for upstream's whisper_wrapper.py: a pipeline that remembers its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from utils import cuda, frames_of, note  # type: ignore[import-not-found]

WORDS = ("light", "five", "door", "seven")


class Pipeline:
    """``device`` is where it was made, whatever its weights do."""

    def __init__(self, folder: str) -> None:
        self.model = nn.Linear(8, len(WORDS))
        self.model.load_state_dict(torch.load(Path(folder) / "model.pt"))
        self.device = cuda()
        self.model.to(self.device)
        note("whisper loaded")

    def __call__(self, audio: Any, *, return_timestamps: bool) -> dict[str, str]:
        assert return_timestamps is (len(audio) > 480_000)
        with torch.no_grad():
            scores = self.model(frames_of(torch.from_numpy(audio)[None]).to(self.device))
        best = scores.mean(dim=1).argmax(dim=-1)
        return {"text": f" {WORDS[int(best)]}"}


class WhisperWrapper:
    def __init__(self, model_id: str) -> None:
        self.model = Pipeline(model_id)

    def __call__(self, audio: Any) -> str:
        raise AssertionError("it would turn every error into silence")
