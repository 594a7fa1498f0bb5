"""FunASR with sub-models: all of it moves, and its settings say where the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
