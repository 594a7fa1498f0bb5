"""The runtime Transformers: pipelines of Hugging Face transformers.

Why it exists: a pipeline remembers the device it was made for and sends its inputs there, wherever
its weights are, so it is told before each task. Imported by templates: transformers takes seconds.
Audio comes in as samples, so that no pipeline decodes a file or opens an address of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import constants as hub
from safetensors import SafetensorError

from vram_agent.backend import Task, TaskKind, TaskResult
from vram_agent.engine.arena import Arena
from vram_agent.engine.rules import read_rules
from vram_agent.engine.torch import TorchWeights
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import ModelSpec
from vram_agent.runtimes.arrays import SAMPLE_RATE_HERTZ, as_tensor, read_audio
from vram_agent.runtimes.base import Reference, check_options, check_parameters
from vram_agent.runtimes.torch_tensors import find_device
from vram_agent.runtimes.torch_weights import BROKEN_FILE
from vram_agent.runtimes.transformers_answers import (
    TEXT_INPUT,
    as_json,
    as_objects,
    read_texts,
    read_transcript,
)
from vram_agent.runtimes.transformers_options import (
    ALIASES,
    ARCHITECTURES,
    OPTIONS,
    OUTPUTS,
    PARAMETERS,
    PIPELINES,
    PROTOCOL_PARAMETERS,
    SPEECH_RECOGNITION,
    TEXT_TO_AUDIO,
)

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class TransformersRuntime:
    """Makes pipelines on the CPU."""

    reference = Reference(
        library="transformers on torch",
        extra="transformers",
        sources=(
            "a path to a folder with `config.json`, weights and tokenizer; the hub is not asked",
            "a name on the Hugging Face hub (`openai/whisper-large-v3`), downloaded into "  # noqa: ISC004 - one form
            "`$HF_HOME` on first use",
        ),
        tasks={
            TaskKind.TRANSCRIBE: f"`{SPEECH_RECOGNITION}`: text, language, segments with times",
            TaskKind.TRANSLATE: f"`{SPEECH_RECOGNITION}` with a multilingual Whisper",
            TaskKind.SPEECH: f"`{TEXT_TO_AUDIO}`, also named `text-to-speech`: samples, their rate",
            TaskKind.INFER: "`text-classification`, `token-classification`, `text-generation`, "
            "`feature-extraction`: the input `text` BYTES [n]",
        },
        options=OPTIONS,
        parameters={
            name: option for options in PARAMETERS.values() for name, option in options.items()
        },
    )

    def load(self, spec: ModelSpec, arena: Arena) -> TransformersModel:
        """Make the pipeline. Raises ModelFailedError."""
        check_options(spec, OPTIONS)
        is_local = Path(spec.source).is_dir()
        if not is_local and not _HUB_NAME.fullmatch(spec.source):
            raise ModelFailedError(
                f"model {spec.name}: there is no folder {spec.source}; mount it there, or use a "
                f"name on the hub, such as openai/whisper-tiny"
            )
        # Each worker of its pool would be one thread more at the fork, were it to outlive the load.
        os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        with _offline() if is_local else contextlib.nullcontext():
            task, pipeline = _make_pipeline(spec)
        rules = read_rules(spec.options.get("tensors", {}))
        weights = TorchWeights(_modules_of(pipeline), arena, rules)
        return TransformersModel(spec, task, pipeline, weights)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from asking the hub about a folder."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _make_pipeline(spec: ModelSpec) -> tuple[str, Any]:
    choices = {
        "trust_remote_code": bool(spec.options.get("trustRemoteCode", False)),
        "revision": spec.options.get("revision"),
    }
    make: Any = transformers.pipeline
    try:
        task = spec.options.get("task") or _derive_task(spec, choices)
        task = ALIASES.get(task, task)
        return task, make(
            task,
            model=spec.source,
            # Always: a pipeline takes the first accelerator it sees, when it is not told.
            device="cpu",
            dtype=spec.options.get("dtype", "auto"),
            **choices,
            **spec.options.get("arguments", {}),
        )
    except (*BROKEN_FILE, SafetensorError, ImportError, AttributeError) as error:
        first = next(iter(str(error).strip().splitlines()), "")[:300]
        raise ModelFailedError(
            f"model {spec.name}: transformers cannot make a pipeline of {spec.source} "
            f"({type(error).__name__}: {first}); check that the folder is whole, and options.task"
        ) from error


def _derive_task(spec: ModelSpec, choices: Mapping[str, Any]) -> str:
    config = transformers.AutoConfig.from_pretrained(spec.source, **choices)
    for name in getattr(config, "architectures", None) or ():
        for ending, task in ARCHITECTURES.items():
            if name.endswith(ending):
                return task
    raise ModelFailedError(
        f"model {spec.name}: {spec.source} does not tell what it is for; set options.task to one "
        f"of {', '.join(PIPELINES)}"
    )


def _modules_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Return the model, and a vocoder or an assistant; what prepares inputs stays on the CPU."""
    return {
        name: value for name, value in vars(pipeline).items() if isinstance(value, torch.nn.Module)
    }


class TransformersModel:
    """A loaded pipeline."""

    def __init__(self, spec: ModelSpec, task: str, pipeline: Any, weights: TorchWeights) -> None:
        self._spec = spec
        self._task = task
        self._pipeline = pipeline
        self._is_whisper = pipeline.model.config.model_type == "whisper"
        self.weights = weights
        self.outputs = OUTPUTS.get(task, ())
        self.inputs = (TEXT_INPUT,) if self.outputs else ()
        self.tasks = frozenset({TaskKind.INFER})
        if task == TEXT_TO_AUDIO:
            self.tasks = frozenset({TaskKind.SPEECH})
        elif task == SPEECH_RECOGNITION:
            can_translate = self._is_whisper and getattr(
                pipeline.model.generation_config, "is_multilingual", False
            )
            self.tasks = frozenset(
                {TaskKind.TRANSCRIBE, *([TaskKind.TRANSLATE] if can_translate else [])}
            )

    def run(self, task: Task) -> TaskResult:
        """Run the pipeline where its weights are. Raises BadInputError."""
        parameters = {
            name: value
            for name, value in task.parameters.items()
            if name not in PROTOCOL_PARAMETERS
        }
        check_parameters(Task(kind=task.kind, parameters=parameters), dict(PARAMETERS[self._task]))
        self._pipeline.device = find_device(self._pipeline.model.parameters())
        if "seed" in parameters:
            torch.manual_seed(int(parameters["seed"]))
        if self._task == SPEECH_RECOGNITION:
            return self._recognise(task, parameters)
        if self._task == TEXT_TO_AUDIO:
            return self._speak(parameters)
        texts = read_texts(self._spec.name, task.tensors)
        infer: Callable[[list[str], Mapping[str, Any]], dict[str, Any]] = {
            "text-classification": self._classify,
            "token-classification": self._tag,
            "text-generation": self._generate,
            "feature-extraction": self._extract,
        }[self._task]
        outputs = infer(texts, parameters)
        return TaskResult(tensors=[as_tensor(one.name, outputs[one.name]) for one in self.outputs])

    def _generation(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        chosen = dict(self._spec.options.get("generate", {}))
        if "max_tokens" in parameters:
            chosen["max_new_tokens"] = int(parameters["max_tokens"])
        if "top_p" in parameters:
            chosen |= {"do_sample": True, "top_p": float(parameters["top_p"])}
        if "temperature" in parameters:
            chosen["do_sample"] = parameters["temperature"] > 0
            if chosen["do_sample"]:
                chosen["temperature"] = float(parameters["temperature"])
        return chosen

    def _recognise(self, task: Task, parameters: Mapping[str, Any]) -> TaskResult:
        audio = read_audio(task.tensors)
        words = bool(parameters.get("word_timestamps"))
        arguments: dict[str, Any] = {}
        generate = self._generation(parameters)
        if self._is_whisper:
            # Beyond 30 s, Whisper in transformers goes on only with timestamps.
            arguments = {"return_timestamps": "word" if words else True, "return_language": True}
            generate |= self._whisper_choices(task.kind, parameters)
        elif words:
            arguments["return_timestamps"] = "word"
        if self._pipeline.model.can_generate() and generate:
            arguments["generate_kwargs"] = generate
        found = self._pipeline(
            {"raw": audio.copy(), "sampling_rate": SAMPLE_RATE_HERTZ}, **arguments
        )
        return TaskResult(values=read_transcript(found, parameters, len(audio), words=words))

    def _whisper_choices(self, kind: TaskKind, parameters: Mapping[str, Any]) -> dict[str, Any]:
        model, tokenizer = self._pipeline.model, self._pipeline.tokenizer
        choices: dict[str, Any] = {}
        if getattr(model.generation_config, "is_multilingual", False):
            choices["task"] = kind.value
            if parameters.get("language"):
                choices["language"] = self._whisper_language(str(parameters["language"]).lower())
        if parameters.get("prompt"):
            prompt = tokenizer.get_prompt_ids(parameters["prompt"], return_tensors="pt")
            choices["prompt_ids"] = prompt.to(self._pipeline.device)
        return choices

    def _whisper_language(self, language: str) -> str:
        from transformers.models.whisper.tokenization_whisper import (  # noqa: PLC0415 - slow
            TO_LANGUAGE_CODE,
        )

        code = TO_LANGUAGE_CODE.get(language, language)
        if f"<|{code}|>" not in self._pipeline.model.generation_config.lang_to_id:
            raise BadInputError(
                f"parameter language of model {self._spec.name}: {language!r} is no language that "
                f"it knows, as ISO 639-1 code or English name",
                param="language",
            )
        return str(code)

    def _speak(self, parameters: Mapping[str, Any]) -> TaskResult:
        text = str(parameters.get("input", ""))
        if not text.strip():
            raise BadInputError("there is no text to speak: parameter input", param="input")
        arguments: dict[str, Any] = {}
        generate = self._spec.options.get("generate", {})
        if self._pipeline.model.can_generate() and generate:
            arguments["generate_kwargs"] = generate
        self._set_speed(float(parameters.get("speed", 1)))
        speakers = getattr(self._pipeline.model.config, "num_speakers", 1)
        if speakers > 1 and "voice" in parameters:
            voice = parameters["voice"]
            if not voice.isdecimal() or int(voice) >= speakers:
                raise BadInputError(
                    f"voice {voice!r} of model {self._spec.name}: it has the speakers 0 to "
                    f"{speakers - 1}",
                    param="voice",
                )
            arguments["forward_params"] = {"speaker_id": int(voice)}
        found = self._pipeline(text, **arguments)
        samples = np.atleast_1d(np.squeeze(np.asarray(found["audio"], np.float32)))
        if samples.ndim > 1:
            samples = samples.mean(axis=0, dtype=np.float32)
        return TaskResult(
            values={"rate": int(found["sampling_rate"])}, tensors=[as_tensor("audio", samples)]
        )

    def _set_speed(self, speed: float) -> None:
        model = self._pipeline.model
        if hasattr(model, "speaking_rate") and speed > 0:
            model.speaking_rate = model.config.speaking_rate * speed
        elif speed != 1:
            raise BadInputError(
                f"speed {speed} of model {self._spec.name}: it speaks at its own; leave it out",
                param="speed",
            )

    def _classify(self, texts: list[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
        found = self._pipeline(texts, top_k=int(parameters.get("top_k", 1)))
        return {
            "label": np.array([[one["label"] for one in row] for row in found], dtype=object),
            "score": np.array([[one["score"] for one in row] for row in found], np.float32),
        }

    def _tag(self, texts: list[str], parameters: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - the same for all
        return {"json": as_objects([as_json(row) for row in self._pipeline(texts)])}

    def _generate(self, texts: list[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
        generate = {"do_sample": False, **self._generation(parameters)}
        found = self._pipeline(texts, return_full_text=False, **generate)
        return {"generated_text": as_objects([row[0]["generated_text"] for row in found])}

    def _extract(self, texts: list[str], parameters: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - the same for all
        if len(texts) != 1:
            raise BadInputError(
                f"input text of model {self._spec.name} must be BYTES [1], not {[len(texts)]}: "
                f"texts have as many rows of features as they have tokens",
                param="text",
            )
        return {"features": np.array(self._pipeline(texts)[0], np.float32)[0]}

    def forget(self) -> None:
        """Drop the caches that generate() may leave on a model."""
        for module in _modules_of(self._pipeline).values():
            for part in module.modules():
                for name in ("_cache", "_past_key_values"):
                    part.__dict__.pop(name, None)
