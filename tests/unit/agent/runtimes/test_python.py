"""Any object may be a model; what its methods may return, and what is refused."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from vram_agent.backend import Task, TaskKind, TaskPart
from vram_agent.errors import ModelFailedError, TaskCancelledError
from vram_agent.protocol import Runtime
from vram_agent.runtimes.base import PartialModel

from tests.unit.agent.runtimes.hosting import (
    hosted,
    infer,
    load_only,
    move_away_and_back,
    tensor,
)

AUDIO = tensor("audio", np.zeros(16_000))


class Scattered:
    """Weights in a list, a dict, a closure, a cached property and another object; no Module."""

    def __init__(self) -> None:
        hidden = torch.full((1,), 16.0)
        self.parts: list[Any] = [{"a": torch.full((1,), 1.0)}, SimpleNamespace(b=torch.ones(1) * 2)]
        self.add = lambda x: x + hidden
        self.partial = functools.partial(torch.add, torch.full((1,), 4.0))
        assert self.cached is self.cached

    @functools.cached_property
    def cached(self) -> torch.Tensor:
        return torch.full((1,), 8.0)

    def infer(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> Iterator[Any]:
        x = torch.from_numpy(inputs["x"].copy())
        added: Any = self.add
        total = added(self.partial(x)) + self.cached + self.parts[0]["a"] + self.parts[1].b
        # Pairs, one by one.
        yield "y", total.numpy()
        yield "n", np.array([len(inputs)])


class Speaker:
    def infer(self, inputs: Any, parameters: Any) -> Any:
        return {}

    def transcribe(self, audio: Any, parameters: dict[str, Any]) -> Any:
        if parameters.get("pieces"):
            return (piece for piece in ("a ", "b"))
        return {"text": "a", "segments": ({"id": index} for index in range(2))}

    def speech(self, text: str, parameters: Any) -> Any:
        return (np.full(2, ord(letter), np.float32) for letter in text), 8_000


class Asynchronous:
    async def infer(self, inputs: Any, parameters: Any) -> Any:
        return {}


class Streaming:
    """Yields from generators of both kinds, and notes that they were closed."""

    closed: ClassVar[list[str]] = []

    async def transcribe(self, audio: Any, parameters: Any) -> Any:
        try:
            for piece in ("a ", "b ", "c"):
                await asyncio.sleep(0)
                yield piece
        finally:
            self.closed.append("transcribe")

    def speech(self, text: str, parameters: Any) -> Any:
        try:
            for letter in text:
                yield np.full(2, ord(letter), np.float32), 8_000
        finally:
            self.closed.append("speech")


HERE = f"{__name__}:"


@pytest.fixture(autouse=True)
def _is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Scattered.__module__])


def test_weights_are_found_wherever_they_hang() -> None:
    with hosted(Runtime.PYTHON, f"{HERE}Scattered") as model:
        # Five of four bytes, each in its place of 512.
        assert model.weights.weight_bytes == 5 * 512
        for _ in range(2):
            y, n = infer(model, tensor("x", [100.0])).tensors
            assert np.frombuffer(y.data, "<f4").tolist() == [131.0]
            assert np.frombuffer(n.data, "<i8").tolist() == [1]
            move_away_and_back(model)


def test_texts_segments_and_samples_may_come_one_by_one() -> None:
    with hosted(Runtime.PYTHON, f"{HERE}Speaker") as model:
        assert model.tasks == {TaskKind.INFER, TaskKind.TRANSCRIBE, TaskKind.SPEECH}

        def transcribe(**parameters: Any) -> dict[str, Any]:
            task = Task(kind=TaskKind.TRANSCRIBE, tensors=[AUDIO], parameters=parameters)
            return dict(model.run(task).values)

        assert transcribe()["segments"] == [{"id": 0}, {"id": 1}]
        assert transcribe(pieces=True) == {
            "text": "a b",
            "language": "",
            "duration": 1.0,
            "segments": [],
        }
        spoken = model.run(Task(kind=TaskKind.SPEECH, parameters={"input": "AB"}))
        assert spoken.values == {"rate": 8_000}
        assert np.frombuffer(spoken.tensors[0].data, "<f4").tolist() == [65, 65, 66, 66]


SPEAK = Task(kind=TaskKind.SPEECH, parameters={"input": "AB"})
TRANSCRIBE = Task(kind=TaskKind.TRANSCRIBE, tensors=[AUDIO])


def test_what_a_generator_yields_is_given_away_as_it_comes_and_whole_to_who_wants_no_parts() -> (
    None
):
    with hosted(Runtime.PYTHON, f"{HERE}Streaming") as model:
        assert isinstance(model, PartialModel)
        parts: list[TaskPart] = []
        assert model.run_in_parts(TRANSCRIBE, parts.append).values["text"] == "a b c"
        assert [part.values for part in parts] == [{"text": "a "}, {"text": "b "}, {"text": "c"}]
        assert model.run(TRANSCRIBE).values["text"] == "a b c"

        parts.clear()
        left = model.run_in_parts(SPEAK, parts.append)
        assert (left.values, list(left.tensors)) == ({"rate": 8_000}, [])
        samples = [np.frombuffer(part.tensors[0].data, "<f4").tolist() for part in parts]
        assert samples == [[65, 65], [66, 66]]
        assert [part.values for part in parts] == [{"rate": 8_000}] * 2
        whole = model.run(SPEAK)
        assert np.frombuffer(whole.tensors[0].data, "<f4").tolist() == [65, 65, 66, 66]


@pytest.mark.parametrize("task", [TRANSCRIBE, SPEAK], ids=["an async generator", "a generator"])
def test_a_generator_is_closed_where_nobody_wants_the_rest(task: Task) -> None:
    def refuse(_: TaskPart) -> None:
        raise TaskCancelledError("gone")

    Streaming.closed.clear()
    with hosted(Runtime.PYTHON, f"{HERE}Streaming") as model:
        assert isinstance(model, PartialModel)
        with pytest.raises(TaskCancelledError):
            model.run_in_parts(task, refuse)
        assert Streaming.closed == [task.kind.value]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        pytest.param(f"{HERE}Asynchronous", "method infer is async", id="a coroutine"),
        pytest.param("types:SimpleNamespace", "has none of the methods transcribe", id="no method"),
        pytest.param(f"{HERE}HERE", "no function and no class", id="a text"),
    ],
)
def test_what_cannot_do_a_task_is_refused(source: str, match: str) -> None:
    with pytest.raises(ModelFailedError, match=match):
        load_only(Runtime.PYTHON, source)


def test_it_is_made_at_the_first_restore_where_it_loads_on_the_device() -> None:
    with hosted(Runtime.PYTHON, f"{HERE}Scattered", loadsOn="cuda") as model:
        assert model.weights.weight_bytes == 5 * 512
    with pytest.raises(ModelFailedError, match="method infer is async"):
        load_only(Runtime.PYTHON, f"{HERE}Asynchronous", loadsOn="cuda")
