"""The tiny Whisper of the tests: its sizes, its first weights, and how it is run while it trains.

Exists apart from `make_whisper`, which alone calls it, so that what departs from stock Whisper is
in one place. Nothing here draws from anything but torch's generator; nothing knows the loss.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn
from whisper.audio import mel_filters
from whisper.model import ModelDimensions, MultiHeadAttention, Whisper
from whisper.tokenizer import get_tokenizer

from .speech import WORDS, Samples

DIMENSIONS = {
    "n_mels": 80,
    "n_audio_ctx": 1500,  # the stock encoder asserts it
    "n_audio_state": 64,
    "n_audio_head": 4,
    "n_audio_layer": 2,
    "n_vocab": 51865,
    "n_text_ctx": 64,
    "n_text_state": 64,
    "n_text_head": 4,
    "n_text_layer": 2,
}
STATE = DIMENSIONS["n_audio_state"]
AUDIO_POSITIONS = DIMENSIONS["n_audio_ctx"]
WINDOW_FRAMES = 2 * AUDIO_POSITIONS
HOP_SAMPLES = 160
FFT_SAMPLES = 400
PADDING_SAMPLE = 48
HEAD_OFFSETS = ((-6, -2, 2, 6), (-12, -4, 4, 12))
"""Positions away that each head of each encoder block looks at to begin with."""
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class Vocabulary:
    """The tokens in use, under consecutive ids, plus the row `other` for all the rest."""

    def __init__(self) -> None:
        tokenizer = get_tokenizer(
            multilingual=True, num_languages=99, language="en", task="transcribe"
        )
        encoded = {word: tokenizer.encode(f" {word}") for word in WORDS}
        if any(len(tokens) != 1 for tokens in encoded.values()):
            message = f"every word of speech.WORDS must be one Whisper token; got {encoded}"
            raise ValueError(message)
        self.word_id = {word: tokens[0] for word, tokens in encoded.items()}
        # <|0.00|> … <|7.00|> in steps of 0.1 s; Whisper's own step is 0.02 s.
        self.stamps = [tokenizer.timestamp_begin + 5 * tenth for tenth in range(71)]
        self.end = tokenizer.eot
        self.start = list(tokenizer.sot_sequence)
        self.no_speech = tokenizer.no_speech
        self.previous = tokenizer.sot_prev
        self.no_timestamps = tokenizer.no_timestamps
        special = (self.end, *self.start, self.no_speech, self.previous, self.no_timestamps)
        self.used = sorted({*self.word_id.values(), *special, *self.stamps})
        self.reduced = {token: row for row, token in enumerate(self.used)}
        self.other = len(self.used)

    def stamp(self, seconds: float) -> int:
        """The timestamp token nearest to `seconds`."""
        token: int = self.stamps[min(len(self.stamps) - 1, round(seconds * 10))]
        return token

    def spread(self, logits: Tensor) -> Tensor:
        """Let the one row of the other tokens weigh as the many it stands for."""
        weight = math.log(DIMENSIONS["n_vocab"] - self.other)
        known, other = logits[..., : self.other], logits[..., self.other :]
        return torch.cat([known, other + weight], -1)

    def expand(self, table: Tensor) -> Tensor:
        """The embedding table of the full vocabulary."""
        full = table[self.other].repeat(DIMENSIONS["n_vocab"], 1)
        full[self.used] = table[: self.other]
        return full


class TrainingWindow:
    """The encoder over a clip's own frames plus a few of the padding positions up to 1,500.

    Each of those keys weighs as the many it stands for (`bias`), so attention behaves as over the
    full window at a sixth of the cost. `attend` stands in for `MultiHeadAttention.qkv_attention`
    while training; it takes whichever attention has as many keys as the window for one over audio.
    """

    def __init__(self) -> None:
        self.bias = torch.zeros(0)

    def encode(self, net: Whisper, mel: Tensor) -> Tensor:
        """Whisper's encoder over `mel` (batch, 80, frames) to (batch, positions, state)."""
        encoder = net.encoder
        hidden, length = _stem(net, mel), mel.shape[-1] // 2
        bias, at = torch.zeros(length), torch.arange(length)
        missing = AUDIO_POSITIONS - length
        if missing > 0:
            sampled = length + torch.randperm(missing)[:PADDING_SAMPLE]
            silence = _stem(net, torch.zeros(1, 80, 12))[:, 3:4]
            silence = silence.expand(len(hidden), PADDING_SAMPLE, -1)
            hidden = torch.cat([hidden, silence], 1)
            weight = math.log(missing / PADDING_SAMPLE)
            bias = torch.cat([bias, torch.full([PADDING_SAMPLE], weight)])
            at = torch.cat([at, sampled])
        self.bias = bias
        hidden = hidden + encoder.positional_embedding[at]
        for block in encoder.blocks:
            hidden = block(hidden)
        encoded: Tensor = encoder.ln_post(hidden)
        return encoded

    def attend(
        self, heads: int, query: Tensor, key: Tensor, value: Tensor, *, causal: bool
    ) -> tuple[Tensor, None]:
        """Multi-head attention of (batch, positions, state), biased where the keys are audio."""
        q, k, v = (_split_heads(t, heads) for t in (query, key, value))
        audio = self.bias[None] if k.shape[2] == len(self.bias) else None
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, attn_mask=audio)
        return out.transpose(1, 2).flatten(2), None

    def installed(self) -> AbstractContextManager[Any]:
        """A context manager in which every Whisper of this process attends through `attend`."""

        def qkv_attention(
            attention: MultiHeadAttention,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None = None,
        ) -> tuple[Tensor, None]:
            return self.attend(attention.n_head, q, k, v, causal=mask is not None)

        return mock.patch.object(MultiHeadAttention, "qkv_attention", qkv_attention)


def _split_heads(positions: Tensor, heads: int) -> Tensor:
    batch, length, _ = positions.shape
    return positions.view(batch, length, heads, -1).transpose(1, 2)


def _stem(net: Whisper, mel: Tensor) -> Tensor:
    encoder = net.encoder
    return F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).permute(0, 2, 1)


def _point_heads(net: Whisper) -> None:
    """Start each encoder head as "look d positions away" on the sinusoidal positions.

    q(t)·k(u) = 2.25 Σ_j cos(w_j (t + d - u)); `sinusoids()` has sin in 0…31 and cos in 32…63.
    """
    gain, half = 1.5, STATE // 2
    for block, offsets in zip(net.encoder.blocks, HEAD_OFFSETS, strict=True):
        q, k = block.attn.query.weight, block.attn.key.weight
        q.zero_()
        k.zero_()
        block.attn.query.bias.zero_()
        for head, offset in enumerate(offsets):
            for j in range(8):
                f, row = j + 2, 16 * head + 2 * j
                angle = 10000 ** (-f / 31) * offset
                k[row, f] = k[row + 1, half + f] = gain
                q[row, f] = q[row + 1, half + f] = gain * math.cos(angle)
                q[row, half + f] = gain * math.sin(angle)
                q[row + 1, f] = -gain * math.sin(angle)


def build_network(vocabulary: Vocabulary) -> Whisper:
    """A Whisper with the reduced vocabulary and the weights that training starts from."""
    net = Whisper(ModelDimensions(**{**DIMENSIONS, "n_vocab": vocabulary.other + 1}))
    nn.init.normal_(net.decoder.token_embedding.weight, std=0.05)
    nn.init.normal_(net.decoder.positional_embedding, std=0.02)
    with torch.no_grad():
        _point_heads(net)
    return net


def log_mels(batch: Sequence[Samples]) -> tuple[Tensor, list[int]]:
    """Whisper's log-mel spectrogram, a row per clip, and the lengths.

    Rows are zero (not silent) after the end of their clip.
    """
    lengths = [len(samples) // HOP_SAMPLES for samples in batch]
    audio = torch.zeros(len(batch), max(map(len, batch)) + FFT_SAMPLES)
    for row, samples in zip(audio, batch, strict=True):
        row[: len(samples)] = torch.from_numpy(samples)
    window = torch.hann_window(FFT_SAMPLES)
    spectrum = torch.stft(audio, FFT_SAMPLES, HOP_SAMPLES, window=window, return_complex=True)
    mel = mel_filters("cpu", 80) @ (spectrum.abs() ** 2)
    mel = mel.clamp(min=1e-10).log10()[..., : max(lengths)]
    mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8)
    keep = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return ((mel + 4) / 4) * keep[:, None], lengths


def save_deflated(checkpoint: dict[str, Any], path: Path) -> None:
    """`torch.save`, re-zipped with deflate: torch.load reads it, at a tenth of the size.

    Names and times inside are fixed, so that the same weights give the same bytes.
    """
    raw = io.BytesIO()
    torch.save(checkpoint, raw)
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            member = zipfile.ZipInfo(name, date_time=ZIP_EPOCH)
            target.writestr(member, source.read(name), zipfile.ZIP_DEFLATED, 9)
