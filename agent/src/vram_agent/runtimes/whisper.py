"""The runtime Whisper: openai-whisper checkpoints.

Why it exists: openai-whisper keeps mel filters by device and leaves hooks behind, so it needs more
than a factory. It takes seconds to import (numba), so this module is imported by templates only.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import whisper
import whisper.audio
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE, get_tokenizer

from vram_agent.backend import Task, TaskKind, TaskResult, TensorSpec
from vram_agent.engine.arena import Arena
from vram_agent.engine.rules import TensorRule, TensorRules
from vram_agent.engine.torch import TorchWeights
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import ModelSpec
from vram_agent.runtimes.arrays import SAMPLE_RATE_HERTZ, read_audio
from vram_agent.runtimes.base import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    Emit,
    Option,
    Reference,
    check_options,
    check_parameters,
    is_number,
)
from vram_agent.runtimes.checkpoints import Undrawn, can_map, fill
from vram_agent.runtimes.whisper_windows import each_window

_LANGUAGE = Option(
    lambda value: (
        value is None
        or (isinstance(value, str) and value.lower() in {"", *LANGUAGES, *TO_LANGUAGE_CODE})
    ),
    "a language that Whisper knows, as ISO 639-1 code or English name",
)
_OPTIONS = {
    "downloadRoot": TEXT.means(
        "where downloads lie; put a volume there, or each new pod downloads again",
        "`whisper` in `$XDG_CACHE_HOME` or `~/.cache`",
    ),
    "fp16": FLAG.means("compute in half precision; on the CPU always `false`", "`true` on CUDA"),
    "language": _LANGUAGE.means(
        "the language when a request names none", "detected from the audio"
    ),
    "beamSize": COUNT.means("beams of the search at temperature 0", "greedy"),
}
_PARAMETERS = {
    "language": _LANGUAGE.means("the language of the audio", "the option's"),
    "prompt": Option(lambda value: value is None or isinstance(value, str), "a text").means(
        "words that come before the audio"
    ),
    "temperature": Option(
        lambda value: (
            is_number(value)
            or (isinstance(value, (list, tuple)) and bool(value) and all(map(is_number, value)))
        ),
        "a number or a list of numbers",
    ).means(
        "of the sampling; of a list, the next is tried where a window's log-probability or "
        "compression fails. 0 stands for openai-whisper's list, as in OpenAI's API; `[0]` is 0 "
        "alone",
        "openai-whisper's, 0 to 1 in steps of 0.2",
    ),
    "word_timestamps": FLAG.means("times of each word too", "false"),
    "condition_on_previous_text": FLAG.means("each window sees the text before it", "true"),
    "beam_size": COUNT.means("beams of the search at temperature 0", "the option's"),
    "no_speech_threshold": NUMBER.means("above this probability a window is silence", "0.6"),
    "max_tokens": COUNT.means("most tokens of each window of 30 s", "the model's"),
}
_SEGMENT_FIELDS = (
    "id",
    "seek",
    "start",
    "end",
    "text",
    "tokens",
    "temperature",
    "avg_logprob",
    "compression_ratio",
    "no_speech_prob",
)


# Sparse, and read by the host alone (whisper/timing.py:207).
_RULES = TensorRules({"alignment_heads": TensorRule.LEAVE})


class WhisperRuntime:
    """Loads openai-whisper models on the CPU."""

    reference = Reference(
        library="openai-whisper on torch",
        extra="whisper",
        sources=(
            "a path to a checkpoint of openai-whisper (`.pt`)",
            "a name that openai-whisper knows (`tiny`, `large-v3` …), downloaded on first use",
        ),
        tasks={
            TaskKind.TRANSCRIBE: "text, language, and segments with times",
            TaskKind.TRANSLATE: "the same, in English",
        },
        options=_OPTIONS,
        parameters=_PARAMETERS,
    )

    def load(self, spec: ModelSpec, arena: Arena) -> WhisperModel:
        """Load a checkpoint as ``whisper.load_model`` does. Raises ModelFailedError."""
        check_options(spec, _OPTIONS)
        if spec.source not in whisper.available_models() and not os.path.isfile(spec.source):  # noqa: PTH113 - whisper's own test
            raise ModelFailedError(
                f"model {spec.name}: there is no file {spec.source}, and openai-whisper knows no "
                f"model of that name; mount the checkpoint there, or use one of "
                f"{', '.join(whisper.available_models())}"
            )
        try:
            model = _load_model(spec)
        except OSError as error:
            raise ModelFailedError(
                f"model {spec.name}: {spec.source} cannot be read or downloaded: {error}"
            ) from error
        except (
            pickle.UnpicklingError,
            zipfile.BadZipFile,
            RuntimeError,
            KeyError,
            TypeError,
            ValueError,
            EOFError,
        ) as error:
            raise ModelFailedError(
                f"model {spec.name}: {spec.source} is no whole checkpoint of openai-whisper "
                f"({type(error).__name__}: {_first_sentence(error)}); copy the file again, or "
                f"convert it to a dict of dims and model_state_dict"
            ) from error
        model.eval()
        _warm_up(model)
        return WhisperModel(spec, model, TorchWeights(model, arena, _RULES))


def _load_model(spec: ModelSpec) -> whisper.Whisper:
    """Return the model, on the CPU always: on CUDA, checkpoint and model would both lie in VRAM.

    1. A checkpoint that can be mapped is, so that its weights are in memory once. 2. The library
    reads the others: what is compressed, or of torch before 1.6.
    """
    path, alignment_heads = _find_checkpoint(spec)
    # 1
    if can_map(path):
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        with Undrawn():
            model = whisper.Whisper(whisper.ModelDimensions(**checkpoint["dims"]))
        fill(model, checkpoint["model_state_dict"])
        if alignment_heads is not None:
            model.set_alignment_heads(alignment_heads)
        return model
    # 2
    return whisper.load_model(
        spec.source, device="cpu", download_root=spec.options.get("downloadRoot")
    )


def _find_checkpoint(spec: ModelSpec) -> tuple[str, bytes | None]:
    """Return the file, downloaded if need be, and the heads that tell the times of words.

    As in https://github.com/openai/whisper/blob/v20250625/whisper/__init__.py#L130
    """
    if spec.source not in whisper.available_models():
        return spec.source, None
    cache = os.getenv("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118 - as whisper
    root = spec.options.get("downloadRoot") or os.path.join(cache, "whisper")  # noqa: PTH118 - as whisper
    path = whisper._download(whisper._MODELS[spec.source], root, in_memory=False)  # noqa: SLF001 - load_model would read the file it downloads
    return path, whisper._ALIGNMENT_HEADS[spec.source]  # noqa: SLF001 - as above


def _warm_up(model: whisper.Whisper) -> None:
    """Read the vocabulary before the fork: each GPU process would read its own, for tens of MiB."""
    get_tokenizer(model.is_multilingual, num_languages=model.num_languages).encode(" a")


def _first_sentence(error: Exception) -> str:
    """Return what a library says is wrong; torch goes on to advise what must stay switched off."""
    return str(error).split("\n", 1)[0].split(". ", 1)[0][:200]


class WhisperModel:
    """A loaded Whisper."""

    tasks = frozenset({TaskKind.TRANSCRIBE, TaskKind.TRANSLATE})
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, spec: ModelSpec, model: whisper.Whisper, weights: TorchWeights) -> None:
        self._spec = spec
        self._model = model
        self.weights = weights

    def run(self, task: Task) -> TaskResult:
        """Transcribe or translate the tensor ``audio``. Raises BadInputError."""
        return self._run(task, contextlib.nullcontext())

    def run_in_parts(self, task: Task, emit: Emit) -> TaskResult:
        """The same, and give the text of each window of 30 s away as it is decoded."""
        return self._run(task, each_window(emit))

    def _run(self, task: Task, watching: AbstractContextManager[None]) -> TaskResult:
        check_parameters(task, _PARAMETERS)
        if task.kind is TaskKind.TRANSLATE and not self._model.is_multilingual:
            raise BadInputError(f"model {self._spec.name} knows English only: it cannot translate")
        audio = read_audio(task.tensors)
        decoding = self._decoding(task.kind, task.parameters)
        try:
            with watching:
                found = whisper.transcribe(self._model, torch.from_numpy(audio), **decoding)
        except BaseException:
            self._remove_hooks()
            raise
        return TaskResult(
            values={
                "text": found["text"].strip(),
                "language": found["language"],
                "duration": len(audio) / SAMPLE_RATE_HERTZ,
                "segments": [_plain_segment(segment) for segment in found["segments"]],
            }
        )

    def _decoding(self, kind: TaskKind, parameters: Mapping[str, Any]) -> dict[str, Any]:
        options = self._spec.options
        is_on_cpu = self._model.device.type == "cpu"
        language = parameters.get("language") or options.get("language") or None
        if not self._model.is_multilingual:
            language = "en"
        decoding: dict[str, Any] = {
            "verbose": None,
            "task": kind.value,
            "language": language.lower() if language else None,
            "initial_prompt": parameters.get("prompt") or None,
            "word_timestamps": bool(parameters.get("word_timestamps", False)),
            "fp16": not is_on_cpu and bool(options.get("fp16", True)),
        }
        temperature = parameters.get("temperature", 0)
        # OpenAI's API: at 0 the model raises it by itself where a window fails, as by default.
        if temperature != 0:
            decoding["temperature"] = (
                float(temperature) if is_number(temperature) else tuple(map(float, temperature))
            )
        beams = parameters.get("beam_size", options.get("beamSize"))
        if beams is not None:
            decoding["beam_size"] = int(beams)
        if "max_tokens" in parameters:
            decoding["sample_len"] = int(parameters["max_tokens"])
        for name in ("condition_on_previous_text", "no_speech_threshold"):
            if name in parameters:
                decoding[name] = parameters[name]
        return decoding

    def _remove_hooks(self) -> None:
        # timing.find_alignment and the KV cache remove their hooks only when nothing raises.
        for module in self._model.modules():
            module._forward_hooks.clear()  # noqa: SLF001 - handles are lost with the exception
            module._forward_pre_hooks.clear()  # noqa: SLF001 - handles are lost with the exception

    def forget(self) -> None:
        """Drop the mel filters, which whisper keeps on each device it has seen."""
        with contextlib.suppress(AttributeError):
            whisper.audio.mel_filters.cache_clear()
        self._remove_hooks()


def _plain_segment(segment: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: _plain(segment[name]) for name in _SEGMENT_FIELDS if name in segment}
    if "words" in segment:
        plain["words"] = [
            {name: _plain(value) for name, value in word.items()} for word in segment["words"]
        ]
    return plain


def _plain(value: Any) -> Any:
    """Return numbers of numpy and torch as Python's own."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
