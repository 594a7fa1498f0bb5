"""Any object may be a model; what its methods may return, and what is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vram_agent.backend import Task, TaskKind
from vram_agent.errors import ModelFailedError
from vram_agent.protocol import Runtime

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
    async def transcribe(self, audio: Any, parameters: Any) -> Any:
        yield "a"


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


@pytest.mark.parametrize(
    ("source", "match"),
    [
        pytest.param(f"{HERE}Asynchronous", "method infer is async", id="a coroutine"),
        pytest.param(f"{HERE}Streaming", "method transcribe is async", id="async generator"),
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
