"""FunASR with sub-models: all of it moves, and its settings say where the weights are."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vram_agent.backend import Task, TaskKind
from vram_agent.devices.base import Placement
from vram_agent.devices.cpu import CPU_UUID, AnonymousMemory
from vram_agent.engine.arena import Arena
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import DeviceKind, ModelSpec, Runtime
from vram_agent.runtimes.funasr_answers import read_transcript

from tests import models
from tests.conformance.cases import tensor

# FunASR and what it imports (jieba, distutils, pkg_resources) warn of their own sources.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("t")
    yield made
    made.close()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from tests.models import tiny_funasr  # noqa: PLC0415 - takes seconds

    folder = tmp_path_factory.mktemp("funasr")
    return {
        "vadModel": str(tiny_funasr.make_vad(folder / "vad")),
        "puncModel": str(tiny_funasr.make_punctuation(folder / "punctuation")),
        "spkModel": str(tiny_funasr.make_speakers(folder / "speakers")),
    }


def load(arena: Arena, options: dict[str, Any], source: Path = models.FUNASR) -> Any:
    from vram_agent.runtimes.funasr import FunasrRuntime  # noqa: PLC0415 - takes seconds

    spec = ModelSpec(name="m", runtime=Runtime.FUNASR, source=str(source), options=options)
    return FunasrRuntime().load(spec, arena)


def task_of(text: str, **parameters: Any) -> tuple[Task, float]:
    clip = next(clip for clip in models.clips() if clip.text == text)
    samples = models.read_samples(clip.path)
    task = Task(kind=TaskKind.TRANSCRIBE, parameters=parameters, tensors=[tensor("audio", samples)])
    return task, len(samples) / 16_000


def test_every_part_is_heard_of_and_moves(arena: Arena, parts: dict[str, str]) -> None:
    # The committed model takes no batches.
    model = load(arena, {**parts, "batchSizeSeconds": 0})
    auto = model._auto
    modules = [auto.model, auto.vad_model, auto.punc_model, auto.spk_model]
    parameters = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    region = model.weights._region
    inside = range(region.address, region.address + region.reserved_bytes)
    assert all(one.data_ptr() in inside for one in parameters if one.numel())
    assert model.weights.notes == ""
    memory = AnonymousMemory(
        Placement(kind=DeviceKind.CPU, index=0, uuid=CPU_UUID, total_bytes=1 << 40)
    )
    task, duration = task_of("stop nine zero", prompt="zero", temperature=0)
    answers = []
    for _ in range(2):
        model.weights.restore(memory, 1)
        assert not any(one.data_ptr() in inside for one in parameters if one.numel())
        answers.append(model.run(task).values)
        model.forget()
        assert model.weights.offload().message == ""
        assert all(one.data_ptr() in inside for one in parameters if one.numel())
    # The words of the recogniser, the stops of the punctuation, the stretch of the voice detector,
    # and the one speaker.
    assert answers[0] == {
        "text": "Stop. Nine. Zero.",
        "language": "",
        "duration": duration,
        "segments": [
            {
                "id": 0,
                "start": 0.0,
                "end": pytest.approx(duration, abs=0.1),
                "text": "stop nine zero",
                "speaker": "0",
            }
        ],
    }
    assert answers[1] == answers[0]


def test_the_process_keeps_its_threads_and_each_part_is_told_the_device(
    arena: Arena, parts: dict[str, str]
) -> None:
    threads = torch.get_num_threads()
    model = load(arena, {"vadModel": parts["vadModel"], "batchSizeSeconds": 0})
    try:
        torch.set_num_threads(threads + 1)
        model.run(task_of("seven")[0])
        assert torch.get_num_threads() == threads + 1
        told = [model._auto.kwargs, model._auto.vad_kwargs]
        assert [(one["device"], one["ncpu"]) for one in told] == [("cpu", threads + 1)] * 2
    finally:
        torch.set_num_threads(threads)


def test_what_the_library_would_hold_three_times_is_mapped(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    stock = torch.load

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return stock(*args, **options)

    monkeypatch.setattr(torch, "load", watched)
    load(arena, {})
    assert [(one["mmap"], one["weights_only"]) for one in seen] == [(True, True)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"vadModel": "/none"}, "no /none/config.yaml; mount", id="missing sub-model"),
        pytest.param({"spkModel": str(models.FUNASR)}, "needs vadModel", id="speakers alone"),
        pytest.param({"arguments": {"device": "cuda"}}, "an object without", id="device named"),
        pytest.param({"hub": "github"}, "must be ms or hf", id="another hub"),
        pytest.param({"vad": "x"}, "did you mean vadModel", id="misspelt"),
    ],
)
def test_a_bad_option_says_what_to_do(arena: Arena, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFailedError, match=words):
        load(arena, options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"vadOptions": {"device": "cuda"}}, "an object without", id="voices on CUDA"),
        pytest.param({"puncOptions": {"ncpu": 8}}, "an object without", id="threads of its own"),
        pytest.param({"arguments": {"vad_kwargs": {}}}, "an object without", id="by another way"),
    ],
)
def test_what_the_runtime_decides_cannot_be_set_around_it(
    arena: Arena, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelFailedError, match=words):
        load(arena, options)


@pytest.mark.parametrize("part", ["model", "vadModel"])
def test_a_folder_cannot_allow_its_own_code_to_run(
    arena: Arena,
    parts: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    shutil.copytree(models.FUNASR if part == "model" else parts["vadModel"], folder)
    code = tmp_path / f"code_of_{part}.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with (folder / "config.yaml").open("a") as config:
        config.write(f"trust_remote_code: true\nremote_code: {code}\n")
    source, options = (folder, {}) if part == "model" else (models.FUNASR, {part: str(folder)})
    load(arena, options, source)
    assert not (tmp_path / "ran").exists()
    # It is the option that keeps the code from running: with it, it runs.
    load(arena, {**options, "trustRemoteCode": True}, source)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("samples", [1, 160, 399, 401])
def test_a_recording_shorter_than_a_frame_has_no_words(
    arena: Arena, parts: dict[str, str], samples: int
) -> None:
    tensors = [tensor("audio", np.full(samples, 0.1, np.float32))]
    task = Task(kind=TaskKind.TRANSCRIBE, tensors=tensors)
    for options in ({}, {"vadModel": parts["vadModel"], "batchSizeSeconds": 0}):
        values = load(arena, options).run(task).values
        assert (values["text"], values["duration"]) == ("", samples / 16_000)


@pytest.mark.parametrize("is_wanted", [True, False])
def test_times_are_asked_of_the_model_where_the_request_asks_for_them(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, is_wanted: bool
) -> None:
    model = load(arena, {})
    stock, seen = model._auto.model.inference, []

    def watched(*args: Any, **settings: Any) -> Any:
        seen.append(settings.get("output_timestamp", False))
        return stock(*args, **settings)

    monkeypatch.setattr(model._auto.model, "inference", watched)
    model.run(task_of("seven", word_timestamps=is_wanted)[0])
    assert seen == [is_wanted]


def test_a_compressed_checkpoint_loads_too(arena: Arena, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.FUNASR, folder)
    with (
        zipfile.ZipFile(models.FUNASR / "model.pt") as source,
        zipfile.ZipFile(folder / "model.pt", "w") as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED)
    assert load(arena, {}, folder).run(task_of("seven")[0]).values["text"] == "seven"


def test_frontends_stay_with_the_recordings(arena: Arena, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.FUNASR, folder)
    # Mean and scale of each of 560 features that change nothing, in Kaldi's text form.
    rows = {"<AddShift>": "0", "<Rescale>": "1"}
    lines = [
        f"{name} 560 560\n<LearnRateCoef> 0 [ {' '.join([value] * 560)} ]\n"
        for name, value in rows.items()
    ]
    (folder / "am.mvn").write_text("<Nnet>\n" + "".join(lines) + "</Nnet>\n")
    plain, normalised = load(arena, {}), load(arena, {}, folder)
    assert normalised.run(task_of("seven")[0]).values["text"] == "seven"
    assert normalised._auto.kwargs["frontend"].cmvn.shape == (2, 560)
    assert normalised.weights.weight_bytes == plain.weights.weight_bytes


def test_a_config_that_is_none_is_the_models_fault(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: [no\n")
    with pytest.raises(ModelFailedError, match="FunASR cannot load"):
        load(arena, {}, tmp_path)


def test_a_bad_parameter_is_the_callers_fault(arena: Arena) -> None:
    model = load(arena, {})
    with pytest.raises(BadInputError, match="did you mean language"):
        model.run(task_of("seven", langage="en")[0])


def strip(text: str) -> str:
    return text.rpartition("|>")[2]


@pytest.mark.parametrize(
    ("answer", "parameters", "expected"),
    [
        pytest.param(
            {"text": "<|zh|><|NEUTRAL|><|Speech|><|woitn|>ni hao"},
            {},
            {"text": "ni hao", "language": "zh", "segments": []},
            id="the tags of SenseVoice name the language",
        ),
        pytest.param(
            {"text": "a b", "timestamp": [[100, 300], [400, 700]]},
            {"language": "en", "word_timestamps": True},
            {
                "text": "a b",
                "language": "en",
                "segments": [
                    {
                        "id": 0,
                        "start": 0.1,
                        "end": 0.7,
                        "text": "a b",
                        "words": [
                            {"word": "a", "start": 0.1, "end": 0.3},
                            {"word": "b", "start": 0.4, "end": 0.7},
                        ],
                    }
                ],
            },
            id="times of words make one segment",
        ),
        pytest.param(
            {"text": "ab c", "timestamp": [[0, 1], [1, 2], [2, 3]]},
            {"word_timestamps": True},
            {
                "text": "ab c",
                "language": "",
                "segments": [{"id": 0, "start": 0.0, "end": 0.003, "text": "ab c"}],
            },
            id="times of other units are nobody's",
        ),
        pytest.param({}, {}, {"text": "", "language": "", "segments": []}, id="nothing heard"),
    ],
)
def test_answers_in_the_words_of_a_transcription(
    answer: dict[str, Any], parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = read_transcript([answer] if answer else [], 8_000, clean=strip, parameters=parameters)
    assert found == {**expected, "duration": 0.5}
