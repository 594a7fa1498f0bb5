"""Tiny models in the form of transformers: folders with config, weights, tokenizer.

Exists so that the runtime Transformers runs real pipelines without a download. The Whisper is the
committed checkpoint of openai-whisper under its other names, so that its words are known; the
others have random weights of a fixed seed, and what they must answer comes from the stock pipeline.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as stock_transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from vram_agent.backend import Task, TaskResult, Tensor

from . import WHISPER
from .speech import WORDS

# Much of it is without types.
transformers: Any = stock_transformers
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
# openai-whisper's names, and those of transformers, in the order of replacement.
NAMES = (
    ("blocks", "layers"),
    ("mlp.0", "fc1"),
    ("mlp.2", "fc2"),
    ("mlp_ln", "final_layer_norm"),
    ("cross_attn_ln", "encoder_attn_layer_norm"),
    ("cross_attn", "encoder_attn"),
    ("attn_ln", "self_attn_layer_norm"),
    (".attn.", ".self_attn."),
    (".query.", ".q_proj."),
    (".key.", ".k_proj."),
    (".value.", ".v_proj."),
    (".out.", ".out_proj."),
    ("decoder.ln.", "decoder.layer_norm."),
    ("ln_post", "layer_norm"),
    ("token_embedding", "embed_tokens"),
    ("encoder.positional_embedding", "encoder.embed_positions.weight"),
    ("decoder.positional_embedding", "decoder.embed_positions.weight"),
)


def save_whisper(folder: Path) -> None:
    """The committed Whisper: 64 wide, with ``proj_out`` tied to ``embed_tokens``."""
    ranks, special = _whisper_tokens()
    checkpoint = torch.load(WHISPER, weights_only=True)
    dims = checkpoint["dims"]
    languages = {token: number for token, number in special.items() if len(token) in {6, 7}}
    end, start = special["<|endoftext|>"], special["<|startoftranscript|>"]
    config = transformers.WhisperConfig(
        vocab_size=dims["n_vocab"],
        num_mel_bins=dims["n_mels"],
        max_source_positions=dims["n_audio_ctx"],
        max_target_positions=dims["n_text_ctx"],
        d_model=dims["n_audio_state"],
        encoder_layers=dims["n_audio_layer"],
        encoder_attention_heads=dims["n_audio_head"],
        decoder_layers=dims["n_text_layer"],
        decoder_attention_heads=dims["n_text_head"],
        encoder_ffn_dim=4 * dims["n_audio_state"],
        decoder_ffn_dim=4 * dims["n_text_state"],
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    model.model.load_state_dict(
        {_renamed(name): value.float() for name, value in checkpoint["model_state_dict"].items()}
    )
    model.generation_config = transformers.GenerationConfig(
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id={"transcribe": special["<|transcribe|>"], "translate": special["<|translate|>"]},
        no_timestamps_token_id=special["<|notimestamps|>"],
        prev_sot_token_id=special["<|startofprev|>"],
        max_initial_timestamp_index=50,
        max_length=dims["n_text_ctx"],
        alignment_heads=[[0, 0], [1, 1]],
        num_beams=1,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=[],
        begin_suppress_tokens=[end],
    )
    model.save_pretrained(folder)
    # Only the tokens that occur; words start with the byte that stands for a space.
    words = {f"Ġ{word}": ranks[f" {word}"] for word in WORDS}
    tokenizer = transformers.WhisperTokenizer(vocab={**words, **special}, merges=[])
    named = [token for token in special if "." not in token]
    tokenizer.add_special_tokens({"additional_special_tokens": named})
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=dims["n_mels"]).save_pretrained(folder)


def _whisper_tokens() -> tuple[dict[str, int], dict[str, int]]:
    """The texts of openai-whisper's vocabulary, and its special tokens, which follow them."""
    (folder,) = importlib.util.find_spec("whisper").submodule_search_locations  # type: ignore[union-attr,misc]
    lines = (Path(folder) / "assets" / "multilingual.tiktoken").read_text().splitlines()
    pairs = (line.split() for line in lines)
    ranks = {base64.b64decode(token).decode(errors="replace"): int(rank) for token, rank in pairs}
    names = ["endoftext", "startoftranscript", *list(LANGUAGES)[:99], "translate", "transcribe"]
    names += ["startoflm", "startofprev", "nospeech", "notimestamps"]
    names += [f"{step * 0.02:.2f}" for step in range(1501)]
    return ranks, {f"<|{name}|>": len(lines) + index for index, name in enumerate(names)}


def _renamed(name: str) -> str:
    for old, new in NAMES:
        name = name.replace(old, new)
    return name


def _save_words(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))  # noqa: S106 - no secret
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pad, unknown, start, end = SPECIAL
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
    ).save_pretrained(folder)


def _bert(**more: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
        **more,
    )


def save_classifier(folder: Path) -> None:
    """A BERT with three classes."""
    torch.manual_seed(0)
    labels = {0: "low", 1: "middle", 2: "high"}
    transformers.BertForSequenceClassification(_bert(id2label=labels)).save_pretrained(folder)
    _save_words(folder)


def save_tagger(folder: Path) -> None:
    """A BERT that gives each word one of two classes."""
    torch.manual_seed(0)
    labels = {0: "FIRST", 1: "SECOND"}
    transformers.BertForTokenClassification(_bert(id2label=labels)).save_pretrained(folder)
    _save_words(folder)


def save_encoder(folder: Path) -> None:
    """A BERT without a head."""
    torch.manual_seed(0)
    transformers.BertModel(_bert()).save_pretrained(folder)
    _save_words(folder)


def save_generator(folder: Path, width: int = 32) -> None:
    """A GPT-2, its ``lm_head`` tied to its embedding."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=VOCABULARY["[CLS]"],
        eos_token_id=VOCABULARY["[SEP]"],
        pad_token_id=VOCABULARY["[PAD]"],
        initializer_range=0.5,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    _save_words(folder)


Answer = tuple[list[str], list[float]]
"""The words of an answer, which must be the same, and its numbers, which another alignment of the
weights in memory changes in their last digits."""


def answer(folder: str, task: Task) -> Answer:
    """What the stock pipeline says of a task."""
    name = {
        "classifier": "text-classification",
        "tagger": "token-classification",
        "encoder": "feature-extraction",
        "generator": "text-generation",
        "speaker": "text-to-speech",
    }[Path(folder).name]
    pipeline = transformers.pipeline(name, model=folder, device="cpu")
    if name == "text-to-speech":
        torch.manual_seed(task.parameters["seed"])
        spoken = pipeline(task.parameters["input"])
        return [str(spoken["sampling_rate"])], spoken["audio"].ravel().tolist()
    items = _split(task.tensors[0])
    if name == "text-classification":
        rows = pipeline(items, top_k=task.parameters["top_k"])
        return [one["label"] for row in rows for one in row], [
            one["score"] for row in rows for one in row
        ]
    if name == "text-generation":
        count = task.parameters["max_tokens"]
        rows = pipeline(items, max_new_tokens=count, do_sample=False, return_full_text=False)
        return [row[0]["generated_text"] for row in rows], []
    if name == "feature-extraction":
        return [], np.ravel(pipeline(items)[0][0]).tolist()
    return _tags(pipeline(items))


def plain(result: TaskResult) -> Answer:
    """The answer of a task, as ``answer`` has it."""
    found = {tensor.name: tensor for tensor in result.tensors}
    numbers = {
        name: np.frombuffer(tensor.data, "<f4").tolist()
        for name, tensor in found.items()
        if tensor.datatype == "FP32"
    }
    if "rate" in result.values:
        return [str(result.values["rate"])], numbers["audio"]
    if "label" in found:
        return _split(found["label"]), numbers["score"]
    if "features" in found:
        return [], numbers["features"]
    if "json" in found:
        return _tags([json.loads(item) for item in _split(found["json"])])
    return _split(found["generated_text"]), []


def _tags(rows: list[list[dict[str, Any]]]) -> Answer:
    tags = [tag for row in rows for tag in row]
    words = [f"{tag['word']} {tag['entity']} {tag['start']}" for tag in tags]
    return words, [float(tag["score"]) for tag in tags]


def _split(tensor: Tensor) -> list[str]:
    data, items = bytes(tensor.data), []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        items.append(data[4:end].decode())
        data = data[end:]
    return items


def save_speaker(folder: Path) -> None:
    """A VITS that reads letters, at 16 kHz."""
    torch.manual_seed(0)
    config = transformers.VitsConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=16,
        spectrogram_bins=9,
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        upsample_initial_channel=32,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        duration_predictor_num_flows=1,
        duration_predictor_filter_channels=16,
        depth_separable_num_layers=1,
    )
    transformers.VitsModel(config).save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate("_abcdefghijklmnopqrstuvwxyz '")}
    path = folder / "letters.json"
    path.write_text(json.dumps(letters))
    transformers.VitsTokenizer(
        str(path),
        pad_token="_",  # noqa: S106 - no secret
        unk_token="_",  # noqa: S106 - no secret
        is_uroman=False,
        phonemize=False,
    ).save_pretrained(folder)
