"""Train a tiny FunASR model folder that knows sixteen words.

    python -m tests.models.make_funasr FOLDER [--steps 900] [--clips 2500] [--seed 0] [--threads 2]

Exists because tests of the runtime FunASR must assert a transcription, and no weights can be
downloaded where they run. The folder (config.yaml, tokens.json, model.pt) is read by stock
`funasr.AutoModel`; the architecture is the library's own: a `CTC` over `SenseVoiceEncoderSmall`,
one of its few encoders that return what that class expects. Run by hand, minutes of two cores;
tests use the committed result.

The budget is in steps, not seconds, and every draw comes from the seed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from .command import read_command
from .speech import SAMPLE_RATE_HZ, WORDS, Utterance, build_corpus, dress, warp

log = logging.getLogger(__name__)

TOKENS = ("<blank>", "<s>", "</s>", *WORDS, "<unk>")
"""The class CTC drops the ids 0, 1 and 2 from its text."""
BATCH_CLIPS = 32
SILENT_SHARE = 0.04
PEAK_LEARNING_RATE = 2e-3
CONFIG = {
    "model": "CTC",
    "encoder": "SenseVoiceEncoderSmall",
    "encoder_conf": {
        "output_size": 64,
        "attention_heads": 4,
        "linear_units": 256,
        "num_blocks": 3,
        "tp_blocks": 0,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
        "kernel_size": 11,
        "sanm_shfit": 0,
    },
    "frontend": "WavFrontend",
    "frontend_conf": {
        "fs": SAMPLE_RATE_HZ,
        "window": "hamming",
        "n_mels": 80,
        "frame_length": 25,
        "frame_shift": 10,
        "lfr_m": 7,
        "lfr_n": 3,
        # Dither is noise: the same clip must give the same features.
        "dither": 0.0,
    },
    "tokenizer": "CharTokenizer",
    "tokenizer_conf": {"unk_symbol": "<unk>"},
}


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on besides library versions."""

    steps: int = 900
    clips: int = 2500
    seed: int = 0
    threads: int = 2


class Trainer:
    """Owns the network and every source of randomness of one training run."""

    def __init__(self, recipe: Recipe, auto: Any) -> None:
        self.recipe = recipe
        self.rng = Random(recipe.seed)
        self.net: nn.Module = auto.model.train()
        self.frontend: Any = auto.kwargs["frontend"]

    def train(self, corpus: Sequence[Utterance]) -> None:
        """Run all the steps. Blocks for minutes."""
        optimizer = torch.optim.AdamW(
            self.net.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        plan = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_LEARNING_RATE, total_steps=self.recipe.steps, pct_start=0.1
        )
        began = time.monotonic()
        for step in range(1, self.recipe.steps + 1):
            loss = self._loss(self.rng.sample(corpus, BATCH_CLIPS))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            optimizer.step()
            plan.step()
            if step % 100 == 0:
                log.info("%4.0f s step %d ctc %.3f", time.monotonic() - began, step, loss.item())

    def _loss(self, items: Sequence[Utterance]) -> Tensor:
        drawn = [self._draw(item) for item in items]
        features = [features for features, _ in drawn]
        labels = [labels for _, labels in drawn]
        pad = torch.nn.utils.rnn.pad_sequence
        loss, _, _ = self.net(
            pad(features, batch_first=True),
            torch.tensor([len(one) for one in features]),
            pad(labels, batch_first=True),
            torch.tensor([len(one) for one in labels]),
        )
        return loss  # type: ignore[no-any-return]

    def _draw(self, item: Utterance) -> tuple[Tensor, Tensor]:
        samples, words = item.samples, item.words
        if self.rng.random() < SILENT_SHARE:
            samples, words = samples * 0, ()
        audio = torch.from_numpy(dress(warp(samples, self.rng), self.rng).samples).float()[None]
        features, _ = self.frontend(audio, torch.tensor([audio.shape[1]]))
        labels = torch.tensor([TOKENS.index(word) for word in words], dtype=torch.long)
        return features[0], labels


def open_model(folder: Path, threads: int) -> Any:
    """Return the folder's model as stock FunASR makes it."""
    from funasr import AutoModel  # noqa: PLC0415 - takes seconds, and most callers want the names

    return AutoModel(
        model=str(folder),
        device="cpu",
        ncpu=threads,
        disable_update=True,
        disable_pbar=True,
        log_level="ERROR",
    )


def make_funasr(folder: Path, recipe: Recipe) -> None:
    """Train by `recipe` and write the model to `folder`. Blocks for minutes."""
    torch.manual_seed(recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").write_text(json.dumps(TOKENS) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    # No weights yet: AutoModel keeps the random ones that the seed gave.
    torch.save({}, folder / "model.pt")
    trainer = Trainer(recipe, open_model(folder, recipe.threads))
    trainer.train(build_corpus(recipe.clips, seed=recipe.seed + 1))
    weights = {name: weight.half() for name, weight in trainer.net.state_dict().items()}
    torch.save(weights, folder / "model.pt")
    log.info("wrote %s, %d bytes", folder, sum(path.stat().st_size for path in folder.iterdir()))


def main() -> None:
    """The command line."""
    make_funasr(*read_command(Recipe(), "Train the FunASR model of the tests.", "FOLDER"))


if __name__ == "__main__":
    main()
