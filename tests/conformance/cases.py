"""The runtimes under test: a model, a task, and what its answer must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vram_agent.backend import Task, TaskKind, TaskResult, Tensor
from vram_agent.protocol import ModelSpec, Runtime

from tests import models

HERE = str(Path(__file__).parent)
DATATYPES = {"float32": "FP32", "int64": "INT64"}


def tensor(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    return Tensor(
        name=name, datatype=DATATYPES[array.dtype.name], shape=array.shape, data=array.tobytes()
    )


def array_of(result: TaskResult, name: str) -> np.ndarray[Any, Any]:
    found = next(tensor for tensor in result.tensors if tensor.name == name)
    dtype = {"FP32": "<f4", "INT64": "<i8"}[found.datatype]
    return np.frombuffer(found.data, dtype=dtype).reshape(found.shape)


def bits_of(result: TaskResult) -> tuple[Any, ...]:
    """Everything in a result, comparable bit by bit."""
    tensors = [(t.name, t.datatype, t.shape, bytes(t.data)) for t in result.tensors]
    return (tensors, repr(sorted(result.values.items())))


@dataclass(frozen=True)
class Case:
    name: str
    spec: ModelSpec
    task: Task
    check: Callable[[TaskResult], None]
    bad_tensors: Sequence[Tensor] = field(default=())


def python_spec(factory: str, name: str = "m", **arguments: Any) -> ModelSpec:
    options = {"path": HERE, "arguments": arguments}
    return ModelSpec(name=name, runtime=Runtime.PYTHON, source=f"hosted:{factory}", options=options)


def infer(x: np.ndarray[Any, Any], **parameters: Any) -> Task:
    return Task(kind=TaskKind.INFER, parameters=parameters, tensors=[tensor("x", x)])


def transcribe(samples: np.ndarray[Any, Any], **parameters: Any) -> Task:
    return Task(
        kind=TaskKind.TRANSCRIBE,
        parameters={"language": "en", **parameters},
        tensors=[tensor("audio", samples)],
    )


def whisper_case() -> Case:
    clip = next(clip for clip in models.clips() if clip.text)
    samples = models.read_samples(clip.path)

    def check(result: TaskResult) -> None:
        assert result.values["text"].strip() == clip.text
        assert result.values["language"] == "en"
        assert result.values["duration"] == len(samples) / 16_000

    return Case(
        "Whisper",
        ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(models.WHISPER)),
        transcribe(samples, temperature=0),
        check,
        bad_tensors=[tensor("audio", np.zeros((2, 3), np.float32))],
    )


def onnx_case() -> Case:
    clips = models.digit_clips()[:3]
    samples = np.stack([models.read_samples(clip.path) for clip in clips])

    def check(result: TaskResult) -> None:
        assert array_of(result, "digit").tolist() == [clip.digit for clip in clips]
        assert array_of(result, "probabilities").shape == (3, 10)

    return Case(
        "ONNX",
        ModelSpec(name="m", runtime=Runtime.ONNX, source=str(models.DIGITS)),
        Task(kind=TaskKind.INFER, tensors=[tensor("audio", samples)]),
        check,
        bad_tensors=[tensor("audio", samples[:, :-1])],
    )


def python_case() -> Case:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)

    def check(result: TaskResult) -> None:
        # By hand: the weight is [[0 1], [2 3], [4 5]].
        assert array_of(result, "y").tolist() == [[10.0, 13.0], [28.0, 40.0]]

    return Case(
        "Python",
        python_spec("make_linear", rows=3, columns=2),
        infer(x),
        check,
        bad_tensors=[Tensor(name="x", datatype="FP33", shape=(1,), data=b"")],
    )


CASES = {"Whisper": whisper_case, "ONNX": onnx_case, "Python": python_case}
