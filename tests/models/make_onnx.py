"""Train a spoken-digit classifier and write it as ONNX, node by node.

    python -m tests.models.make_onnx OUT.onnx [--steps 500] [--clips 1500] [--seed 0] [--threads 2]

Exists because tests of the ONNX runtime must assert an answer, and no weights can be downloaded
where they run. The log-mel spectrogram is inside the graph, so a client sends plain audio:

    audio FP32 [batch, 16000], one second -> probabilities FP32 [batch, 10], digit INT64 [batch]

Run by hand, about a minute of two cores; tests use the committed result. The graph is written by
hand because torch's exporter needs packages that nothing else here needs.
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
import numpy.typing as npt
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)
from torch import Tensor, nn

from .command import read_command
from .speech import (
    DIGITS,
    SAMPLE_RATE_HZ,
    TRAINING_POOL,
    Samples,
    draw_voice,
    dress,
    synthesise_all,
)

log = logging.getLogger(__name__)

FFT_SAMPLES = 400
HOP_SAMPLES = 160
MEL_BANDS = 40
BINS = FFT_SAMPLES // 2 + 1
BATCH_CLIPS = 64
PEAK_LEARNING_RATE = 3e-3
OPSET = 18
IR_VERSION = 9
"""Fixed, so that the installed onnx does not decide which ONNX Runtimes read the file."""


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on besides library versions."""

    steps: int = 500
    clips: int = 1500
    seed: int = 0
    threads: int = 2


def fourier_kernels() -> npt.NDArray[np.float32]:
    """A windowed Fourier transform as convolution weights: cosines, then sines; [402, 1, 400]."""
    bins, samples = np.arange(BINS)[:, None], np.arange(FFT_SAMPLES)[None]
    angle = bins * samples * 2 * math.pi / FFT_SAMPLES
    window = np.hanning(FFT_SAMPLES + 1)[:-1]
    kernels = np.concatenate([np.cos(angle), -np.sin(angle)])[:, None] * window
    return kernels.astype(np.float32)


def mel_filters() -> npt.NDArray[np.float32]:
    """Triangular mel filters; [40, 201]."""
    top = 2595 * math.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MEL_BANDS + 2) / 2595) - 1)
    hertz = np.arange(BINS) * SAMPLE_RATE_HZ / FFT_SAMPLES
    bands = [
        np.clip(np.minimum((hertz - low) / (mid - low), (high - hertz) / (high - mid)), 0, None)
        for low, mid, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
    ]
    return np.stack(bands).astype(np.float32)


class DigitNet(nn.Module):
    """The classifier that is trained; `build_onnx` writes the same computation as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(MEL_BANDS, 48, 5, 2, 2)
        self.c2 = nn.Conv1d(48, 64, 5, 2, 2)
        self.c3 = nn.Conv1d(64, 64, 5, 2, 2)
        self.out = nn.Linear(64, len(DIGITS))
        self.fourier = torch.from_numpy(fourier_kernels())
        self.mel = torch.from_numpy(mel_filters())

    def forward(self, audio: Tensor) -> Tensor:
        """`audio` [batch, 16000] to logits [batch, 10]."""
        spectrum = F.conv1d(audio[:, None], self.fourier, stride=HOP_SAMPLES) ** 2
        power = spectrum[:, :BINS] + spectrum[:, BINS:]
        hidden = torch.log(self.mel @ power + 1e-4) / 4
        for convolution in (self.c1, self.c2, self.c3):
            hidden = F.relu(convolution(hidden))
        logits: Tensor = self.out(hidden.amax(-1))
        return logits


def fit_second(samples: Samples, rng: Random) -> Samples:
    """One word somewhere inside one second, with noise and gain."""
    cut = samples[:SAMPLE_RATE_HZ]
    spare_seconds = (SAMPLE_RATE_HZ - len(cut)) / SAMPLE_RATE_HZ
    dressed = dress(cut, rng, lead_seconds=spare_seconds, tail_seconds=0).samples
    return np.pad(dressed, (0, SAMPLE_RATE_HZ - len(dressed)))


def train(recipe: Recipe) -> DigitNet:
    """Train by `recipe`. Blocks for about a minute."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    rng = Random(recipe.seed)
    drawn = [(rng.randrange(10), draw_voice(rng, TRAINING_POOL)) for _ in range(recipe.clips)]
    clips = synthesise_all([(DIGITS[digit], voice) for digit, voice in drawn])
    net, began = DigitNet(), time.monotonic()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LEARNING_RATE)
    plan = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=recipe.steps
    )
    for step in range(1, recipe.steps + 1):
        chosen = rng.sample(range(recipe.clips), BATCH_CLIPS)
        audio = torch.from_numpy(np.stack([fit_second(clips[i], rng) for i in chosen]))
        loss = F.cross_entropy(net(audio), torch.tensor([drawn[i][0] for i in chosen]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        plan.step()
        if step % 50 == 0:
            log.info("%4.0f s step %d loss %.3f", time.monotonic() - began, step, loss.item())
    return net


def build_onnx(net: DigitNet) -> onnx.ModelProto:
    """The network as an ONNX model that `onnx.checker` accepts."""
    rows = "batch"
    inputs = [make_tensor_value_info("audio", TensorProto.FLOAT, [rows, SAMPLE_RATE_HZ])]
    outputs = [
        make_tensor_value_info("probabilities", TensorProto.FLOAT, [rows, len(DIGITS)]),
        make_tensor_value_info("digit", TensorProto.INT64, [rows]),
    ]
    initializers = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in _constants(net).items()
    ]
    nodes = [*_spectrogram_nodes(), *_classifier_nodes()]
    graph = make_graph(nodes, "spoken_digit", inputs, outputs, initializers)
    model = make_model(graph, opset_imports=[make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def _constants(net: DigitNet) -> dict[str, Any]:
    weights = {name: weight.detach().numpy() for name, weight in net.named_parameters()}
    return {
        "fourier": net.fourier.numpy(),
        "mel": net.mel.numpy(),
        "floor": np.float32(1e-4),
        "quarter": np.float32(0.25),
        "two": np.float32(2),
        "channel_axis": np.array([1]),
        "last_axis": np.array([-1]),
        "halves": np.array([BINS, BINS]),
        **weights,
    }


def _spectrogram_nodes() -> Sequence[NodeProto]:
    """From `audio` to `x0`, the log-mel spectrogram [batch, 40, frames]."""
    return [
        make_node("Unsqueeze", ["audio", "channel_axis"], ["channel"]),
        make_node("Conv", ["channel", "fourier"], ["spectrum"], strides=[HOP_SAMPLES]),
        make_node("Pow", ["spectrum", "two"], ["squared"]),
        make_node("Split", ["squared", "halves"], ["real", "imaginary"], axis=1),
        make_node("Add", ["real", "imaginary"], ["power"]),
        make_node("MatMul", ["mel", "power"], ["bands"]),
        make_node("Add", ["bands", "floor"], ["floored"]),
        make_node("Log", ["floored"], ["logarithm"]),
        make_node("Mul", ["logarithm", "quarter"], ["x0"]),
    ]


def _classifier_nodes() -> Sequence[NodeProto]:
    """From `x0` to the outputs."""
    convolutions = [
        node
        for i in (1, 2, 3)
        for node in (
            make_node(
                "Conv",
                [f"x{i - 1}", f"c{i}.weight", f"c{i}.bias"],
                [f"y{i}"],
                strides=[2],
                pads=[2, 2],
            ),
            make_node("Relu", [f"y{i}"], [f"x{i}"]),
        )
    ]
    return [
        *convolutions,
        make_node("ReduceMax", ["x3", "last_axis"], ["loudest"], keepdims=0),
        make_node("Gemm", ["loudest", "out.weight", "out.bias"], ["logits"], transB=1),
        make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        make_node("ArgMax", ["logits"], ["digit"], axis=-1, keepdims=0),
    ]


def make_onnx(path: Path, recipe: Recipe) -> None:
    """Train by `recipe` and write the model to `path`. Blocks for about a minute."""
    onnx.save(build_onnx(train(recipe)), path)
    log.info("wrote %s, %d bytes", path, path.stat().st_size)


def main() -> None:
    """The command line."""
    make_onnx(*read_command(Recipe(), "Train the digit classifier of the tests.", "OUT.onnx"))


if __name__ == "__main__":
    main()
