"""Models with the memory of real ones and random weights.

Exists because tests of memory need hundreds of megabytes that load through the real libraries, and
do not care about answers. Made in seconds, where they are needed, and never committed. Called by
tests only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)
from torch import Tensor
from whisper.model import ModelDimensions

HEAD_WIDTH = 64
AUDIO_POSITIONS = 1500
TEXT_POSITIONS = 448
MEL_BANDS = 80
VOCABULARY = 51865
WEIGHT_STD = 0.02

MATMUL_ROWS = 1024
BYTES_PER_FLOAT = 4
MEBIBYTE = 1024 * 1024
MOST_ONNX_MEGABYTES = 2000
"""protobuf refuses a message of 2 GiB."""


@dataclass(frozen=True)
class WhisperShape:
    """The sizes of a Whisper; the defaults are those of Whisper tiny."""

    n_state: int = 384
    n_layer: int = 4
    """In the encoder, and as many in the decoder."""
    dtype: torch.dtype = torch.float16
    """In the file; `whisper.load_model` makes float32 parameters of either."""

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(math.prod(size) for size in weight_sizes(self).values())

    @property
    def file_bytes(self) -> int:
        """Bytes of weights in the file, which is a few kilobytes larger."""
        return self.parameters * self.dtype.itemsize

    @property
    def loaded_bytes(self) -> int:
        """Bytes of parameters and buffers after `whisper.load_model`, masks aside."""
        return self.parameters * BYTES_PER_FLOAT

    @property
    def dimensions(self) -> ModelDimensions:
        """The same as Whisper takes it."""
        heads = self.n_state // HEAD_WIDTH
        audio = (AUDIO_POSITIONS, self.n_state, heads, self.n_layer)
        text = (TEXT_POSITIONS, self.n_state, heads, self.n_layer)
        return ModelDimensions(MEL_BANDS, *audio, VOCABULARY, *text)


def whisper_shape_near(file_bytes: int, dtype: torch.dtype = torch.float16) -> WhisperShape:
    """The shape whose file is nearest to `file_bytes`, about as deep for its width as real ones."""
    candidates = [
        WhisperShape(n_state, n_layer, dtype)
        for n_state in range(HEAD_WIDTH, 20 * HEAD_WIDTH + 1, HEAD_WIDTH)
        for n_layer in range(1, max(8, n_state // 32) + 1)
    ]
    return min(candidates, key=lambda shape: abs(shape.file_bytes - file_bytes))


def make_whisper_shape(path: Path, shape: WhisperShape, seed: int = 0) -> None:
    """Write a checkpoint of `shape` that `whisper.load_model` loads. A second per 100 MB or so.

    Layers are normalised and weights small, so that inference stays finite; it says nothing. The
    same arguments give the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: _draw_weight(name, size, generator).to(shape.dtype)
        for name, size in weight_sizes(shape).items()
    }
    torch.save({"dims": vars(shape.dimensions), "model_state_dict": state}, path)


def weight_sizes(shape: WhisperShape) -> dict[str, tuple[int, ...]]:
    """The name and size of each tensor of a Whisper checkpoint.

    Spelled out because building the module costs its memory twice over, and building it on torch's
    meta device imports torch's compiler, which takes seconds.
    """
    s = shape.n_state
    return {
        "encoder.conv1.weight": (s, MEL_BANDS, 3),
        "encoder.conv1.bias": (s,),
        "encoder.conv2.weight": (s, s, 3),
        "encoder.conv2.bias": (s,),
        "encoder.positional_embedding": (AUDIO_POSITIONS, s),
        **_block_sizes("encoder", shape, attentions=("attn",)),
        "encoder.ln_post.weight": (s,),
        "encoder.ln_post.bias": (s,),
        "decoder.token_embedding.weight": (VOCABULARY, s),
        "decoder.positional_embedding": (TEXT_POSITIONS, s),
        **_block_sizes("decoder", shape, attentions=("attn", "cross_attn")),
        "decoder.ln.weight": (s,),
        "decoder.ln.bias": (s,),
    }


def _block_sizes(
    half: str, shape: WhisperShape, attentions: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    s = shape.n_state
    linears: dict[str, tuple[int, ...]] = {"mlp.0": (4 * s, s), "mlp.2": (s, 4 * s)}
    for attention in attentions:
        linears |= {f"{attention}.{part}": (s, s) for part in ("query", "key", "value", "out")}
        linears[f"{attention}_ln"] = (s,)
    linears["mlp_ln"] = (s,)
    weights = {f"{name}.weight": size for name, size in linears.items()}
    biases = {f"{n}.bias": size[:1] for n, size in linears.items() if not n.endswith(".key")}
    return {
        f"{half}.blocks.{layer}.{name}": size
        for layer in range(shape.n_layer)
        for name, size in (weights | biases).items()
    }


def _draw_weight(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(size)
    if len(size) == 1:  # the scale of a layer normalisation
        return torch.ones(size)
    return torch.empty(size).normal_(std=WEIGHT_STD, generator=generator)


def make_onnx_matmul(path: Path, megabytes: int, seed: int = 0) -> None:
    """Write `output = input @ weight` with `megabytes` MiB of weight inside the file.

    `input` FP32 [batch, 1024], `output` FP32 [batch, 256 * megabytes]. A one-hot input gives back
    a row of the weight, which is `np.random.default_rng(seed).standard_normal`, float32.

    Raises `ValueError` for a size that one file cannot hold.
    """
    if not 1 <= megabytes <= MOST_ONNX_MEGABYTES:
        raise ValueError(
            f"megabytes is {megabytes}, and an ONNX file holds 1…{MOST_ONNX_MEGABYTES}; "
            "take several files for more"
        )
    columns = megabytes * MEBIBYTE // (MATMUL_ROWS * BYTES_PER_FLOAT)
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((MATMUL_ROWS, columns), np.float32)
    graph = make_graph(
        [make_node("MatMul", ["input", "weight"], ["output"])],
        "matmul",
        [make_tensor_value_info("input", TensorProto.FLOAT, ["batch", MATMUL_ROWS])],
        [make_tensor_value_info("output", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=9), path)
