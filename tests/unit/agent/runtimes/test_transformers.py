"""Pipelines answer as the stock ones do, wherever their weights are, and say what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from vram_agent.backend import Task, TaskKind, Tensor, TensorSpec
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import Runtime
from vram_agent.runtimes.transformers_answers import read_transcript

from tests import models
from tests.models import tiny_transformers
from tests.unit.agent.runtimes.hosting import (
    hosted,
    infer,
    load_only,
    move_away_and_back,
    tensor,
    texts,
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("models")

    def made(name: str) -> str:
        folder = root / name
        if not folder.exists():
            getattr(tiny_transformers, f"save_{name}")(folder)
        return str(folder)

    return made


@pytest.fixture(autouse=True)
def _shows_no_bars() -> Iterator[None]:
    # tqdm's monitor would be a thread that no test ends.
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


# --- answers --------------------------------------------------------------------------------------

TASKS = {
    "classifier": Task(
        kind=TaskKind.INFER, tensors=[texts("play music", "stop")], parameters={"top_k": 2}
    ),
    "tagger": Task(kind=TaskKind.INFER, tensors=[texts("open light", "one")]),
    "encoder": Task(kind=TaskKind.INFER, tensors=[texts("one two three")]),
    "generator": Task(
        kind=TaskKind.INFER, tensors=[texts("play music", "one")], parameters={"max_tokens": 6}
    ),
    # The seed, since this model speaks with noise.
    "speaker": Task(kind=TaskKind.SPEECH, parameters={"input": "open light", "seed": 7}),
}


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_is_that_of_the_stock_pipeline_in_every_place(
    folder_of: Callable[[str], str], name: str
) -> None:
    task, source = TASKS[name], folder_of(name)
    words, numbers = tiny_transformers.answer(source, task)
    assert words or numbers
    options = {"task": "feature-extraction"} if name == "encoder" else {}
    with hosted(Runtime.TRANSFORMERS, source, **options) as model:
        assert model.tasks == {task.kind}
        first = model.run(task)
        found = tiny_transformers.plain(first)
        assert found[0] == words
        np.testing.assert_allclose(found[1], numbers, rtol=1e-3, atol=1e-5)
        for _ in range(2):
            move_away_and_back(model)
            # Each bit.
            assert model.run(task) == first


def test_whisper_transcribes_translates_and_times_its_words(
    folder_of: Callable[[str], str],
) -> None:
    clip = next(clip for clip in models.clips() if len(clip.text.split()) == 3)
    audio = tensor("audio", models.read_samples(clip.path))
    with hosted(Runtime.TRANSFORMERS, folder_of("whisper")) as model:
        assert model.tasks == {TaskKind.TRANSCRIBE, TaskKind.TRANSLATE}

        def ask(kind: TaskKind = TaskKind.TRANSCRIBE, **parameters: Any) -> dict[str, Any]:
            return dict(model.run(Task(kind=kind, tensors=[audio], parameters=parameters)).values)

        for _ in range(2):
            assert ask(language="English")["text"] == clip.text
            move_away_and_back(model)
        timed = ask(language="en", word_timestamps=True)
        (segment,) = timed["segments"]
        assert [word["word"].strip() for word in segment["words"]] == clip.text.split()
        starts = [word["start"] for word in segment["words"]]
        assert starts == sorted(starts)
        assert ask(TaskKind.TRANSLATE, language="en")["language"] == "en"
        assert ask(language="en", prompt="play")["text"]
        with pytest.raises(BadInputError, match="'klingon' is no language") as caught:
            ask(language="klingon")
        assert caught.value.param == "language"
        assert ask(language="en")["text"] == clip.text


def test_tied_weights_are_held_once_and_stay_tied(folder_of: Callable[[str], str]) -> None:
    with hosted(Runtime.TRANSFORMERS, folder_of("whisper")) as model:
        inner: Any = model._pipeline.model  # type: ignore[attr-defined]
        sizes = {
            parameter.untyped_storage()._cdata: parameter.untyped_storage().nbytes()
            for parameter in inner.parameters()
        }
        # All share the block of the device; the embedding of 51,865 x 64 is in it once.
        (device_bytes,) = sizes.values()
        embedding_bytes = 51_865 * 64 * 4
        assert embedding_bytes < device_bytes < 1.5 * embedding_bytes
        for _ in range(2):
            first, second = inner.proj_out.weight, inner.model.decoder.embed_tokens.weight
            assert first.data_ptr() == second.data_ptr()
            model.weights.offload()


def test_inputs_follow_the_weights(folder_of: Callable[[str], str]) -> None:
    with hosted(Runtime.TRANSFORMERS, folder_of("classifier")) as model:
        pipeline: Any = model._pipeline  # type: ignore[attr-defined]
        # Wherever it was left, a task puts it where the weights are.
        pipeline.device = torch.device("meta")
        infer(model, texts("one"))
        assert pipeline.device == torch.device("cpu")


def test_caches_of_generate_are_dropped(folder_of: Callable[[str], str]) -> None:
    with hosted(Runtime.TRANSFORMERS, folder_of("generator")) as model:
        inner: Any = model._pipeline.model  # type: ignore[attr-defined]
        inner.transformer._cache = torch.zeros(8)
        model.forget()
        assert not hasattr(inner.transformer, "_cache")
        assert infer(model, texts("one"), max_tokens=2).tensors


def test_parameters_of_a_generation(folder_of: Callable[[str], str]) -> None:
    def words(model: Any, **parameters: Any) -> list[str]:
        (found,) = infer(model, texts("play music"), **parameters).tensors
        return bytes(found.data)[4:].decode().split()

    with hosted(Runtime.TRANSFORMERS, folder_of("generator"), generate={"max_new_tokens": 3}) as m:
        greedy = words(m)
        assert len(words(m, max_tokens=1)) <= 1
        assert words(m, temperature=0) == greedy
        warm = [words(m, temperature=5.0, seed=seed, max_tokens=8) for seed in (1, 1, 2, 3)]
        assert warm[0] == warm[1]
        assert len({tuple(one) for one in warm}) > 1
        with pytest.raises(BadInputError, match="did you mean max_tokens"):
            words(m, max_token=1)
        # The serving layer's own.
        assert words(m, binary_data_output=False) == greedy


def test_weights_are_loaded_in_the_dtype_that_the_options_name(
    folder_of: Callable[[str], str],
) -> None:
    with hosted(Runtime.TRANSFORMERS, folder_of("classifier"), dtype="bfloat16") as model:
        inner: Any = model._pipeline.model  # type: ignore[attr-defined]
        assert {parameter.dtype for parameter in inner.parameters()} == {torch.bfloat16}
        (label, score) = infer(model, texts("one")).tensors
        assert (label.datatype, score.datatype, score.shape) == ("BYTES", "FP32", (1, 1))


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        pytest.param([], "input text is missing", id="missing"),
        pytest.param([tensor("x", [1.0])], "input x is unknown; it takes text BYTES", id="unknown"),
        pytest.param([tensor("text", [1.0])], r"not FP32 \[1\]", id="numbers"),
        pytest.param([texts()], r"at least one text, not BYTES \[0\]", id="none"),
        pytest.param(
            [Tensor(name="text", datatype="BYTES", shape=(1,), data=b"\x01\0\0\0\xff")],
            "no UTF-8",
            id="no text",
        ),
    ],
)
def test_a_bad_input_is_named(
    folder_of: Callable[[str], str], given: list[Tensor], match: str
) -> None:
    with hosted(Runtime.TRANSFORMERS, folder_of("classifier")) as model:
        assert model.inputs == (TensorSpec(name="text", datatype="BYTES", shape=(-1,)),)
        with pytest.raises(BadInputError, match=match):
            infer(model, *given)


def test_vits_speaks_as_fast_as_it_is_told(folder_of: Callable[[str], str]) -> None:
    with hosted(Runtime.TRANSFORMERS, folder_of("speaker")) as model:

        def length(speed: float) -> int:
            parameters = {"input": "open light and music", "seed": 1, "speed": speed}
            found = model.run(Task(kind=TaskKind.SPEECH, parameters=parameters))
            return found.tensors[0].shape[0]

        assert length(2.0) < length(1.0) < length(0.5)
        with pytest.raises(BadInputError, match="speed 0"):
            length(0)


def test_features_are_of_one_text_and_speech_needs_one(folder_of: Callable[[str], str]) -> None:
    with (
        hosted(Runtime.TRANSFORMERS, folder_of("encoder"), task="feature-extraction") as model,
        pytest.raises(BadInputError, match=r"must be BYTES \[1\], not \[2\]"),
    ):
        infer(model, texts("one", "two"))
    with (
        hosted(Runtime.TRANSFORMERS, folder_of("speaker")) as model,
        pytest.raises(BadInputError, match="no text to speak"),
    ):
        model.run(Task(kind=TaskKind.SPEECH, parameters={"input": " ", "voice": "alloy"}))


@pytest.mark.parametrize(
    ("source", "options", "match"),
    [
        pytest.param("/none", {}, "there is no folder /none", id="missing"),
        pytest.param("{classifier}", {"task": "translation"}, "must be automatic-sp", id="task"),
        pytest.param("{encoder}", {}, "set options.task to one of", id="no task to be derived"),
        pytest.param("{classifier}", {"dtype": "int8"}, "float16, bfloat16 or fl", id="dtype"),
        pytest.param("{classifier}", {"arguments": {"device": 0}}, "without device", id="device"),
        pytest.param("{classifier}", {"trust": 1}, "did you mean trustRemoteCode", id="misspelt"),
        pytest.param("{empty}", {"task": "text-generation"}, "cannot make a pipeline", id="empty"),
        pytest.param("{cut}", {}, "cannot make a pipeline.*SafetensorError", id="cut off"),
    ],
)
def test_what_does_not_load_says_why(
    folder_of: Callable[[str], str],
    tmp_path: Path,
    source: str,
    options: dict[str, Any],
    match: str,
) -> None:
    (tmp_path / "empty").mkdir()
    tiny_transformers.save_classifier(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    places = {name: folder_of(name) for name in ("classifier", "encoder")}
    places |= {name: str(tmp_path / name) for name in ("empty", "cut")}
    with pytest.raises(ModelFailedError, match=match) as caught:
        load_only(Runtime.TRANSFORMERS, source.format(**places), **options)
    assert caught.value.message.startswith("model m: ")


def test_a_chunk_that_ends_with_the_audio_ends_there() -> None:
    found = {"text": " a b", "chunks": [{"text": " a b", "timestamp": (None, None)}]}
    values = read_transcript(found, {}, 32_000, words=False)
    assert values["segments"] == [{"id": 0, "text": " a b", "start": 0.0, "end": 2.0}]
    assert (values["text"], values["language"]) == ("a b", "")
    assert np.isclose(values["duration"], 2.0)
