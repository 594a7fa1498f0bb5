"""Train a tiny real Whisper checkpoint that knows sixteen words.

    python -m tests.models.make_whisper OUT.pt [--steps 1700] [--clips 4000] [--seed 0]

Exists because tests must assert a transcription word for word and no weights can be downloaded
where they run. The architecture is stock, so stock `whisper.load_model` and `transcribe` read the
file. Run by hand, minutes of two cores; tests use the committed result.

Stock training does not converge in that time. What makes it converge:

1. a CTC head on the encoder with half the weight of the loss, thrown away afterwards (`ctc_loss`);
2. encoder heads that start as "look d frames away" (`tiny_whisper.build_network`);
3. the clip's own frames plus 48 padding positions instead of all 1,500 (`TrainingWindow`), and
   every 20th step the real window (`train`);
4. a vocabulary of the tokens in use plus one row for all the others (`Vocabulary`).

The budget is in steps, not seconds, and every draw comes from the seed: the same seed, thread count
and library versions give the same file.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from .command import read_command
from .speech import (
    SAMPLE_RATE_HZ,
    WORDS,
    Dressed,
    Samples,
    Utterance,
    build_corpus,
    draw_phrase,
    dress,
    warp,
)
from .tiny_whisper import (
    DIMENSIONS,
    STATE,
    WINDOW_FRAMES,
    TrainingWindow,
    Vocabulary,
    build_network,
    log_mels,
    save_deflated,
)

log = logging.getLogger(__name__)

BATCH_CLIPS = 32
WINDOW_BATCH_CLIPS = 8
PEAK_LEARNING_RATE = 2e-3
CTC_WEIGHT = 0.5


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on besides library versions."""

    steps: int = 1700
    clips: int = 4000
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True)
class Example:
    """One row of a batch: what is heard, and what the decoder is to say."""

    samples: Samples
    words: Sequence[str]
    tokens: Sequence[int]
    """Reduced ids: prompt, start sequence, text, end."""
    prompt_length: int
    """Tokens at the front that carry no loss."""


class Trainer:
    """Owns the network and every source of randomness of one training run."""

    def __init__(self, recipe: Recipe) -> None:
        torch.set_num_threads(recipe.threads)
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.rng = Random(recipe.seed)
        self.noise = np.random.default_rng(recipe.seed)
        self.vocabulary = Vocabulary()
        self.window = TrainingWindow()
        self.net = build_network(self.vocabulary)
        self.ctc_head = nn.Linear(STATE, len(WORDS) + 1)
        self.parameters = [*self.net.parameters(), *self.ctc_head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.98), weight_decay=0.01)

    def train(self, corpus: Sequence[Utterance]) -> None:
        """Run all the steps. Blocks for minutes."""
        batches: list[list[Utterance]] = []
        began, steps = time.monotonic(), self.recipe.steps
        for step in range(1, steps + 1):
            batches = batches or self._draw_batches(corpus)
            items = batches.pop()
            decay = 0.505 + 0.495 * math.cos(math.pi * step / steps)
            rate = PEAK_LEARNING_RATE * min(1, step / 100) * decay
            self.optimizer.param_groups[0]["lr"] = rate
            if step < 300 or step % 20:
                text, ctc = self.losses([self._draw_example(item) for item in items])
            else:
                text, ctc = self._losses_on_full_window(items)
            self.optimizer.zero_grad()
            torch.autograd.backward(text + CTC_WEIGHT * ctc)
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            if step % 50 == 0:
                spent = time.monotonic() - began
                log.info("%4.0f s step %d text %.3f ctc %.3f", spent, step, text.item(), ctc.item())

    def _draw_batches(self, corpus: Sequence[Utterance]) -> list[list[Utterance]]:
        """Batches of clips of about the same length, in random order."""
        order = sorted(corpus, key=lambda item: len(item.samples) * self.rng.uniform(0.9, 1.1))
        starts = range(0, len(order), BATCH_CLIPS)
        batches = [order[start : start + BATCH_CLIPS] for start in starts]
        self.rng.shuffle(batches)
        return batches

    def _losses_on_full_window(self, items: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
        """As `losses`, over 30 s, also with real silence after the words."""
        some = self.rng.sample(items, min(WINDOW_BATCH_CLIPS, len(items)))
        tail = self.rng.choice([0.5, 3, 20])
        examples = [self._draw_example(item, tail_seconds=tail) for item in some]
        return self.losses(examples, frames=WINDOW_FRAMES)

    def _draw_example(self, item: Utterance, tail_seconds: float = 0.5) -> Example:
        words, samples = item.words, item.samples
        if self.rng.random() < 0.06:
            words, samples = (), self._draw_no_speech(len(samples))
        heard = dress(warp(samples, self.rng), self.rng, tail_seconds=tail_seconds)
        prompt = self._draw_prompt() if self.rng.random() < 0.25 else []
        tokens = [*prompt, *self.vocabulary.start, *self._body(words, heard), self.vocabulary.end]
        reduced = [self.vocabulary.reduced[token] for token in tokens]
        return Example(heard.samples, words, reduced, len(prompt))

    def _draw_no_speech(self, length: int) -> Samples:
        silence: Samples = np.zeros(length, np.float32)
        if self.rng.random() < 0.5:
            return silence
        return (1e-3 * self.noise.standard_normal(length)).astype(np.float32)

    def _draw_prompt(self) -> list[int]:
        """Earlier text, as `condition_on_previous_text` puts it before the start sequence."""
        rng, vocabulary = self.rng, self.vocabulary
        prompt: list[int] = []
        while len(prompt) < 31 and (not prompt or rng.random() < 0.6):
            second = rng.random()
            words = [vocabulary.word_id[word] for word in draw_phrase(rng)]
            end = vocabulary.stamp(second + rng.uniform(0.5, 5))
            prompt += [vocabulary.stamp(second), *words, end]
        return [vocabulary.previous, *prompt[-31:]]

    def _body(self, words: Sequence[str], heard: Dressed) -> list[int]:
        vocabulary = self.vocabulary
        body = [vocabulary.word_id[word] for word in words]
        if self.rng.random() < 0.15:
            return [vocabulary.no_timestamps, *body]
        ended = [vocabulary.stamp(heard.end_seconds)] if words else []
        return [vocabulary.stamp(heard.start_seconds), *body, *ended]

    def losses(
        self, examples: Sequence[Example], frames: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(cross entropy of the decoder, CTC loss of the encoder), over `frames` mel frames."""
        mel, lengths = log_mels([example.samples for example in examples])
        wanted = frames or mel.shape[-1] + self.rng.randrange(0, 60)
        mel = F.pad(mel, (0, wanted + wanted % 2 - mel.shape[-1]))
        encoded = self.window.encode(self.net, mel)
        ctc = self.ctc_loss(encoded, lengths, [example.words for example in examples])
        return self.text_loss(encoded, examples), ctc

    def ctc_loss(
        self, encoded: Tensor, lengths: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> Tensor:
        """How badly the helper head reads the words off the encoder alone."""
        labels = [[WORDS.index(word) + 1 for word in words] for words in texts]
        spoken = encoded[:, : max(lengths) // 2 + 6].transpose(1, 2)
        scores = self.ctc_head(F.avg_pool1d(spoken, 3).transpose(1, 2))
        return F.ctc_loss(
            F.log_softmax(scores, -1).transpose(0, 1),
            torch.tensor([label for row in labels for label in row], dtype=torch.long),
            torch.tensor([length // 6 for length in lengths]),
            torch.tensor([len(row) for row in labels]),
            zero_infinity=True,
        )

    def text_loss(self, encoded: Tensor, examples: Sequence[Example]) -> Tensor:
        """Cross entropy of the next token after the prompt; and of no-speech where none is."""
        vocabulary = self.vocabulary
        end, no_speech = (vocabulary.reduced[t] for t in (vocabulary.end, vocabulary.no_speech))
        shape = (len(examples), max(len(example.tokens) for example in examples))
        said, target = torch.full(shape, end), torch.full(shape, -100)
        for row, example in enumerate(examples):
            tokens, prompt = torch.tensor(example.tokens), example.prompt_length
            said[row, : len(tokens)] = tokens
            target[row, prompt : len(tokens) - 1] = tokens[prompt + 1 :]
            if not example.words:
                target[row, prompt] = no_speech  # where Whisper reads P(no speech)
        logits = vocabulary.spread(self.net.decoder(said, encoded))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)

    def checkpoint(self) -> dict[str, Any]:
        """What `whisper.load_model` reads: dims and an fp16 state with the full vocabulary."""
        state = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        name = "decoder.token_embedding.weight"
        state[name] = self.vocabulary.expand(state[name])
        halved = {name: tensor.half() for name, tensor in state.items()}
        return {"dims": DIMENSIONS, "model_state_dict": halved}


def make_whisper(path: Path, recipe: Recipe) -> None:
    """Train by `recipe` and write the checkpoint to `path`. Blocks for minutes."""
    trainer = Trainer(recipe)
    corpus = build_corpus(recipe.clips, seed=recipe.seed + 1)
    minutes = sum(len(item.samples) for item in corpus) / SAMPLE_RATE_HZ / 60
    log.info("%d clips, %.0f minutes of speech", recipe.clips, minutes)
    with trainer.window.installed():
        trainer.train(corpus)
    save_deflated(trainer.checkpoint(), path)
    log.info("wrote %s, %d bytes", path, path.stat().st_size)


def main() -> None:
    """The command line."""
    make_whisper(*read_command(Recipe(), "Train the tiny Whisper of the tests.", "OUT.pt"))


if __name__ == "__main__":
    main()
