"""Tiny models in the layout that Step-Audio-EditX reads, and recordings; the same each time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import soundfile  # type: ignore[import-untyped]
import torch
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

FUNASR = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
RATE_HERTZ = 16_000
STREAMING_BYTES = 4 * ((16 << 20) + (1 << 20))
"""Of the stand-in's buffers that only streams use."""


def make_model_folder(folder: Path) -> None:
    """Write Step-Audio-EditX, Step-Audio-Tokenizer, whisper-large-v3 and two voices."""
    random = np.random.default_rng(26)
    editx, tokenizer = folder / "Step-Audio-EditX", folder / "Step-Audio-Tokenizer"
    cosy = editx / "CosyVoice-300M-25Hz"
    words = random.normal(size=(512, 64))
    _save(
        editx / "llm.pt",
        {
            "embed_tokens.weight": words,
            "lm_head.weight": words,
            "mix.weight": random.normal(size=(64, 64)),
            "mix.bias": random.normal(size=64),
        },
    )
    _save(
        cosy / "flow.pt",
        {
            "input_embedding.weight": random.normal(size=(512, 64)),
            "decoder.estimator.weight": random.normal(size=(64, 64)) / 8,
            "decoder.estimator.bias": random.normal(size=64),
        },
    )
    _save(
        cosy / "hift.pt",
        {
            "conv.bias": random.normal(size=240),
            "conv.parametrizations.weight.original0": random.normal(size=(240, 1)),
            "conv.parametrizations.weight.original1": random.normal(size=(240, 64)),
        },
    )
    _save(
        tokenizer / FUNASR / "model.pt",
        {
            "encoder.self_attn.linear.weight": random.normal(size=(8, 8)),
            "encoder.self_attn.linear.bias": random.normal(size=8),
        },
    )
    _save(
        folder / "whisper-large-v3" / "model.pt",
        {"weight": random.normal(size=(4, 8)), "bias": random.normal(size=4)},
    )
    np.save(tokenizer / "linguistic_tokenizer.npy", random.normal(size=(64, 8)).astype(np.float32))
    _write_onnx(
        tokenizer / "speech_tokenizer_v1.onnx",
        [
            make_node("MatMul", ["feats", "w"], ["m"]),
            make_node("Abs", ["m"], ["a"]),
            make_node("Cast", ["a"], ["codes"], to=TensorProto.INT64),
        ],
        (random.normal(size=(8, 1)) * 40, TensorProto.INT64, [1, "t", 1]),
    )
    _write_onnx(
        cosy / "campplus.onnx",
        [
            make_node("MatMul", ["feats", "w"], ["m"]),
            make_node("ReduceMean", ["m", "axis"], ["codes"], keepdims=0),
        ],
        (random.normal(size=(8, 64)), TensorProto.FLOAT, [1, 64]),
    )
    for pitch, name in ((220, "anna"), (330, "ben")):
        write_tone(folder / "voices" / f"{name}.wav", pitch)
        (folder / "voices" / f"{name}.txt").write_text(f"I am {name}.\n")


def write_tone(path: Path, pitch_hertz: int, seconds: float = 0.5) -> None:
    """A tone that swells, so that its frames differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * RATE_HERTZ)) / RATE_HERTZ
    soundfile.write(path, np.sin(2 * np.pi * pitch_hertz * time) * time / seconds, RATE_HERTZ)


def _save(path: Path, state: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {name: torch.tensor(value, dtype=torch.float32) for name, value in state.items()}, path
    )


def _write_onnx(path: Path, nodes: list[Any], output: tuple[Any, int, list[Any]]) -> None:
    weight, datatype, shape = output
    # As upstream's tokenizer: a second input with the length. campplus has one alone.
    inputs = [make_tensor_value_info("feats", TensorProto.FLOAT, [1, "t", 8])]
    if datatype == TensorProto.INT64:
        inputs.append(make_tensor_value_info("feats_length", TensorProto.INT32, [1]))
    graph = make_graph(
        nodes,
        path.stem,
        inputs,
        [make_tensor_value_info("codes", datatype, shape)],
        [
            numpy_helper.from_array(weight.astype(np.float32), "w"),
            numpy_helper.from_array(np.array([1]), "axis"),
        ],
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
