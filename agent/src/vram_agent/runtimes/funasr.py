"""The runtime FunASR: models of `funasr.AutoModel`, with voice detection, punctuation and speakers.

Why it exists: FunASR rewrites its settings before each call from a copy that it made while it
loaded, device and threads included, so that copy is what must be told where the weights are. It
takes seconds to import, so this module is imported by templates only.

Line numbers are of funasr 1.4.16, funasr/auto/auto_model.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import funasr
import numpy as np
import torch
import yaml
from funasr.train_utils import load_pretrained_model as checkpoints
from funasr.utils.postprocess_utils import rich_transcription_postprocess

from vram_agent.backend import Task, TaskKind, TaskResult, TensorSpec
from vram_agent.engine.arena import Arena
from vram_agent.engine.rules import read_rules
from vram_agent.engine.torch import TorchWeights
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import ModelSpec
from vram_agent.runtimes.arrays import read_audio
from vram_agent.runtimes.base import (
    FLAG,
    NUMBER,
    TENSORS,
    TEXT,
    Option,
    Reference,
    check_options,
    check_parameters,
    is_number,
    one_of,
)
from vram_agent.runtimes.checkpoints import can_map
from vram_agent.runtimes.funasr_answers import read_transcript
from vram_agent.runtimes.torch_tensors import find_device
from vram_agent.runtimes.torch_weights import BROKEN_FILE

# What FunASR imports sets the root logger to INFO, and its own log_level then changes nothing.
logging.getLogger().setLevel(logging.WARNING)

_PARTS = ("model", "vad_model", "punc_model", "spk_model")
_FRAME_SAMPLES = 400
"""25 ms: what a frontend takes at least."""
_SUB_MODELS = {"vadModel": "vad_model", "puncModel": "punc_model", "spkModel": "spk_model"}
_SUB_OPTIONS = {
    "vadOptions": "vad_kwargs",
    "puncOptions": "punc_kwargs",
    "spkOptions": "spk_kwargs",
}
_ARGUMENT_NAMES = {
    "spkMode": "spk_mode",
    "hub": "hub",
    "revision": "model_revision",
    "trustRemoteCode": "trust_remote_code",
}
_OWN = ("device", "disable_pbar", "disable_update", "model", "ncpu", "ngpu", "trust_remote_code")
_WITHOUT = f"an object without {', '.join(_OWN)}"
_PART_OPTIONS = Option(
    lambda value: isinstance(value, dict) and not value.keys() & {*_OWN}, _WITHOUT
)
_ARGUMENTS = Option(
    lambda value: (
        isinstance(value, dict)
        and not value.keys()
        & {*_OWN, *_ARGUMENT_NAMES.values(), *_SUB_MODELS.values(), *_SUB_OPTIONS.values()}
    ),
    f"{_WITHOUT}, and without what has an option",
)
_OPTIONAL_TEXT = Option(lambda value: value is None or isinstance(value, str), "a text")
_OPTIONS = {
    "vadModel": TEXT.means(
        "folder or name of a model that finds speech in long recordings; without one a recording "
        "is recognised whole",
        "none",
    ),
    "vadOptions": _PART_OPTIONS.means(
        "its settings, such as `max_single_segment_time` (milliseconds)", "the model's"
    ),
    "puncModel": TEXT.means("folder or name of a model that sets punctuation", "none"),
    "puncOptions": _PART_OPTIONS.means("its settings", "the model's"),
    "spkModel": TEXT.means(
        "folder or name of a model that tells speakers apart; needs `vadModel`", "none"
    ),
    "spkOptions": _PART_OPTIONS.means("its settings", "the model's"),
    "spkMode": one_of("punc_segment", "vad_segment").means(
        "speakers change between sentences, which needs `puncModel`, or between stretches of "
        "speech",
        "punc_segment",
    ),
    "hub": one_of("ms", "hf").means("where names are looked up: ModelScope or Hugging Face", "ms"),
    "revision": TEXT.means("branch, tag or commit of a hub name", "master"),
    "trustRemoteCode": FLAG.means(
        "run the code that comes with the model: **it is not looked at**", "false"
    ),
    "language": TEXT.means("the language when a request names none", "the model's"),
    "hotword": TEXT.means("words to listen for, when a request names none", "none"),
    "useItn": FLAG.means("write numbers as digits, where the model can", "the model's"),
    "batchSizeSeconds": Option(
        lambda value: is_number(value) and value >= 0, "a number of seconds, or 0"
    ).means(
        "with `vadModel`: how much speech goes through the model at once, on a GPU; 0: one stretch "
        "after the other, for models that take no batches",
        "300",
    ),
    "arguments": _ARGUMENTS.means("further keyword arguments of `AutoModel`", "none"),
    "tensors": TENSORS,
}
_PARAMETERS = {
    "language": _OPTIONAL_TEXT.means("the language of the audio", "the option's"),
    "prompt": _OPTIONAL_TEXT.means("words to listen for", "the option `hotword`"),
    "word_timestamps": FLAG.means("times of each word too, where the model gives them", "false"),
    "use_itn": FLAG.means("write numbers as digits, where the model can", "the option's"),
    "temperature": NUMBER.means("accepted for clients that always send it; nothing is sampled"),
}


class FunasrRuntime:
    """Loads FunASR models on the CPU."""

    reference = Reference(
        library="FunASR on torch",
        extra="funasr",
        sources=(
            "a path to a folder with `config.yaml`, `model.pt` …; a hub is not asked",
            "a name on a hub (`paraformer-zh`, `iic/SenseVoiceSmall` …), downloaded on first use",
        ),
        tasks={TaskKind.TRANSCRIBE: "text, language, and segments where the model gives times"},
        options=_OPTIONS,
        parameters=_PARAMETERS,
    )

    def load(self, spec: ModelSpec, arena: Arena) -> FunasrModel:
        """Make an ``AutoModel`` and its sub-models. Raises ModelFailedError."""
        check_options(spec, _OPTIONS)
        for source in (spec.source, *_sub_models(spec.options).values()):
            _ensure_there(spec, source)
        if "spkModel" in spec.options and "vadModel" not in spec.options:
            raise ModelFailedError(
                f"model {spec.name}: option spkModel needs vadModel: speakers are told apart "
                f"between stretches of speech"
            )
        try:
            with _hold_once():
                auto = funasr.AutoModel(**_arguments(spec))
        except (*BROKEN_FILE, yaml.YAMLError, ImportError, AttributeError) as error:
            first = next(iter(str(error).strip().splitlines()), "")[:300]
            raise ModelFailedError(
                f"model {spec.name}: FunASR cannot load {spec.source} ({type(error).__name__}: "
                f"{first}); copy the folder again, and check the options"
            ) from error
        rules = read_rules(spec.options.get("tensors", {}))
        return FunasrModel(spec, auto, TorchWeights(_roots_of(auto), arena, rules))


def _sub_models(options: Mapping[str, Any]) -> dict[str, str]:
    return {own: options[name] for name, own in _SUB_MODELS.items() if name in options}


def _ensure_there(spec: ModelSpec, source: str) -> None:
    # A path that is missing must not become a question to a hub.
    if source.startswith(("/", "./", "../")) and not Path(source, "config.yaml").is_file():
        raise ModelFailedError(
            f"model {spec.name}: there is no {source}/config.yaml; mount the model's folder there, "
            f"or use a name on a hub, such as paraformer-zh"
        )


def _arguments(spec: ModelSpec) -> dict[str, Any]:
    options = spec.options
    # All of these are named for each part: what is not, a model's own config.yaml decides.
    fixed = {
        # On the CPU, always: where CUDA is named and hidden, FunASR fixes its batches for ever.
        "device": "cpu",
        "ncpu": 1,
        "trust_remote_code": options.get("trustRemoteCode", False),
    }
    return {
        "log_level": "ERROR",
        **options.get("arguments", {}),
        **{own: options[name] for name, own in _ARGUMENT_NAMES.items() if name in options},
        **_sub_models(options),
        **{own: {**options.get(name, {}), **fixed} for name, own in _SUB_OPTIONS.items()},
        **fixed,
        "model": spec.source,
        "disable_update": True,
        "disable_pbar": True,
    }


@contextlib.contextmanager
def _hold_once() -> Iterator[None]:
    """Have checkpoints mapped instead of read and copied (funasr/train_utils, lines 38 to 44).

    The function reads a file, deep-copies what it read and copies that into the module: three times
    the weights. Its module gets a ``torch`` that maps, and a ``copy`` that does not.
    """
    mapped = SimpleNamespace(**{**vars(torch), "load": _load_mapped})
    before = checkpoints.torch, checkpoints.copy
    checkpoints.torch, checkpoints.copy = mapped, SimpleNamespace(deepcopy=lambda value: value)
    try:
        yield
    finally:
        checkpoints.torch, checkpoints.copy = before


def _load_mapped(path: str, map_location: Any) -> Any:
    return torch.load(path, map_location=map_location, mmap=can_map(path), weights_only=True)


def _roots_of(auto: Any) -> dict[str, Any]:
    """Return the modules that the library itself would put onto a device.

    Frontends are none of them: they sit in the settings, work on the recording, which is on the
    CPU, and each call has a copy of them (lines 1351 and 1370).
    """
    roots = {name: getattr(auto, name, None) for name in _PARTS}
    return {name: root for name, root in roots.items() if isinstance(root, torch.nn.Module)}


def _settings_of(auto: Any) -> dict[str, dict[str, Any]]:
    names = ("kwargs", "vad_kwargs", "punc_kwargs", "spk_kwargs")
    found = {name: getattr(auto, name, None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


class FunasrModel:
    """A loaded FunASR model."""

    tasks = frozenset({TaskKind.TRANSCRIBE})
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, spec: ModelSpec, auto: Any, weights: TorchWeights) -> None:
        self._spec = spec
        self._auto = auto
        self.weights = weights

    def run(self, task: Task) -> TaskResult:
        """Recognise the tensor ``audio``. Raises BadInputError."""
        check_parameters(task, _PARAMETERS)
        audio = read_audio(task.tensors)
        if not len(audio):
            raise BadInputError("the audio is empty", param="audio")
        self._tell_device()
        heard = np.pad(audio, (0, max(0, _FRAME_SAMPLES - len(audio))))
        found = self._auto.generate(input=heard, **self._choices(task.parameters))
        values = read_transcript(
            found, len(audio), clean=rich_transcription_postprocess, parameters=task.parameters
        )
        return TaskResult(values=values)

    def _tell_device(self) -> None:
        """Have inputs sent to where the weights are, and the process keep its threads.

        FunASR resets its settings from this map at each call, and sets torch's threads for the
        whole process from it (lines 1360 to 1384).
        """
        device = str(find_device(self._auto.model.parameters()))
        for settings in self._auto._base_kwargs_map.values():  # noqa: SLF001 - see above
            settings["device"] = device
            settings["ncpu"] = torch.get_num_threads()

    def _choices(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        options = self._spec.options
        chosen = {
            "language": parameters.get("language") or options.get("language"),
            "hotword": parameters.get("prompt") or options.get("hotword"),
            "use_itn": parameters.get("use_itn", options.get("useItn")),
            "batch_size_s": options.get("batchSizeSeconds"),
        }
        if parameters.get("word_timestamps"):
            # Where it is not asked for, SenseVoice gives none.
            chosen["output_timestamp"] = True
        if self._auto.vad_model is not None:
            chosen["sentence_timestamp"] = True
        return {name: value for name, value in chosen.items() if value is not None}

    def forget(self) -> None:
        """Drop the caches of the last call, and the attention maps that modules keep of it."""
        for settings in _settings_of(self._auto).values():
            settings.pop("cache", None)
        for root in _roots_of(self._auto).values():
            for module in root.modules():
                if isinstance(getattr(module, "attn", None), torch.Tensor):
                    module.attn = None
