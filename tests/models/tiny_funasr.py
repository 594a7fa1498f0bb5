"""Small FunASR models with random weights: sub-models, and a large one for tests of memory.

Exists because the sub-models' answers matter less than that they run and move; the recogniser whose
words are asserted is the committed one. The classes are the library's own. Called by tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from .make_funasr import CONFIG, TOKENS
from .speech import WORDS

FRONTEND = {
    "frontend": "WavFrontendOnline",
    "frontend_conf": {
        "fs": 16_000,
        "window": "hamming",
        "n_mels": 80,
        "frame_length": 25,
        "frame_shift": 10,
        "dither": 0.0,
        "lfr_m": 5,
        "lfr_n": 1,
    },
}
VAD = {
    "model": "FsmnVADStreaming",
    "model_conf": {"sample_rate": 16_000, "max_end_silence_time": 800},
    "encoder": "FSMN",
    "encoder_conf": {
        "input_dim": 400,
        "input_affine_dim": 32,
        "fsmn_layers": 2,
        "linear_dim": 32,
        "proj_dim": 16,
        "lorder": 20,
        "rorder": 0,
        "lstride": 1,
        "rstride": 0,
        "output_affine_dim": 32,
        "output_dim": 8,
    },
    **FRONTEND,
}
PUNCTUATION = {
    "model": "CTTransformer",
    "model_conf": {
        "punc_list": ["<unk>", "_", "，", "。", "？", "、"],  # noqa: RUF001 - the library's own marks
        "embed_unit": 16,
        "att_unit": 16,
        "dropout_rate": 0.0,
    },
    "encoder": "SANMEncoder",
    "encoder_conf": {
        "input_size": 16,
        "output_size": 16,
        "attention_heads": 2,
        "linear_units": 32,
        "num_blocks": 2,
        "dropout_rate": 0.0,
        "positional_dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
        "input_layer": "pe",
        "pos_enc_class": "SinusoidalPositionEncoder",
        "normalize_before": True,
        "kernel_size": 11,
        "sanm_shfit": 0,
        "selfattention_layer_type": "sanm",
        "padding_idx": 0,
    },
    "tokenizer": "CharTokenizer",
    "tokenizer_conf": {"unk_symbol": "<unk>"},
}
SPEAKERS = {
    "model": "CAMPPlus",
    "model_conf": {
        "feat_dim": 80,
        "embedding_size": 16,
        "growth_rate": 4,
        "bn_size": 2,
        "init_channels": 8,
        "config_str": "batchnorm-relu",
        "memory_efficient": True,
        "output_level": "segment",
    },
    "frontend": "WavFrontend",
    "frontend_conf": {
        "fs": 16_000,
        "window": "povey",
        "n_mels": 80,
        "frame_length": 25,
        "frame_shift": 10,
        "dither": 0.0,
    },
}


def make_vad(folder: Path) -> Path:
    """Write a voice detector that hears speech everywhere; return its folder."""
    network = _make(folder, VAD)
    # Class 0 is silence.
    network["encoder.out_linear2.linear.bias"][0] = -50
    torch.save(network, folder / "model.pt")
    return folder


def make_punctuation(folder: Path) -> Path:
    """Write a model that ends each word with a full stop; return its folder."""
    network = _make(folder, PUNCTUATION, tokens=("<blank>", "<s>", "</s>", *WORDS, "<unk>"))
    network["decoder.bias"][3] = 50
    torch.save(network, folder / "model.pt")
    return folder


def make_speakers(folder: Path) -> Path:
    """Write a model of voices; return its folder."""
    torch.save(_make(folder, SPEAKERS), folder / "model.pt")
    return folder


def make_large(folder: Path, megabytes: int) -> Path:
    """Write the committed recogniser, widened to some size in memory; it hears nothing right."""
    blocks = max(1, round(megabytes / 12.6))
    config: dict[str, Any] = {
        **CONFIG,
        "encoder_conf": {
            **CONFIG["encoder_conf"],  # type: ignore[dict-item]
            "output_size": 512,
            "linear_units": 2048,
            "num_blocks": blocks,
        },
    }
    torch.save(_make(folder, config, tokens=TOKENS), folder / "model.pt")
    return folder


def _make(
    folder: Path, config: Mapping[str, Any], tokens: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Write a folder without weights, and return the weights that the library begins with."""
    from funasr import AutoModel  # noqa: PLC0415 - takes seconds

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    if tokens:
        (folder / "tokens.json").write_text(json.dumps(tokens))
    torch.save({}, folder / "model.pt")
    auto = AutoModel(
        model=str(folder),
        device="cpu",
        ncpu=1,
        disable_update=True,
        disable_pbar=True,
        log_level="ERROR",
    )
    state: dict[str, torch.Tensor] = auto.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}
