"""The runtimes under test: a model, a task, and what its answer must be."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
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


@functools.cache
def scratch() -> Path:
    """A folder for the files of models that are made here; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="vram-cases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def saved(name: str, save: Callable[[Path], None]) -> str:
    """The path of a file or folder that is made once."""
    path = scratch() / name
    if not path.exists():
        save(path)
    return str(path)


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


def funasr_case() -> Case:
    clip = next(clip for clip in models.clips() if clip.text)
    samples = models.read_samples(clip.path)

    def check(result: TaskResult) -> None:
        assert result.values["text"] == clip.text
        assert result.values["duration"] == len(samples) / 16_000

    return Case(
        "FunASR",
        ModelSpec(name="m", runtime=Runtime.FUNASR, source=str(models.FUNASR)),
        transcribe(samples),
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


def torch_case(name: str, source: str, **options: Any) -> Case:
    """A module of tests/models/tiny_torch.py: by hand, whatever it was saved as."""
    from tests.models import tiny_torch  # noqa: PLC0415 - takes seconds

    x = np.array(tiny_torch.X, np.float32)

    def check(result: TaskResult) -> None:
        first, second = result.tensors
        assert array_of(result, first.name).tolist() == tiny_torch.Y
        assert array_of(result, second.name).tolist() == tiny_torch.SUMS

    spec = ModelSpec(name="m", runtime=Runtime.TORCH, source=source, options=options)
    bad = tensor("x", x.astype(np.int64))
    return Case(name, spec, infer(x), check, bad_tensors=[bad])


def script_case() -> Case:
    from tests.models import tiny_torch  # noqa: PLC0415 - takes seconds

    declared = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    path = saved("script.pt", tiny_torch.save_scripted)
    return torch_case("TorchScript", path, inputs=declared)


def export_case() -> Case:
    from tests.models import tiny_torch  # noqa: PLC0415 - takes seconds

    return torch_case("TorchExport", saved("program.pt2", tiny_torch.save_exported))


def factory_case() -> Case:
    from tests.models import tiny_torch  # noqa: PLC0415 - takes seconds

    return torch_case(
        "TorchFactory",
        "tests.models.tiny_torch:Affine",
        path=str(Path(__file__).parents[2]),
        weights=saved("affine.safetensors", tiny_torch.save_weights),
        inputs=[{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    )


def transformers_case(name: str, task: Task, bad: Tensor, **options: Any) -> Case:
    """A pipeline of tests/models/tiny_transformers.py, and what the stock one answers."""
    from tests.models import tiny_transformers  # noqa: PLC0415 - takes seconds

    folder = saved(name, getattr(tiny_transformers, f"save_{name}"))
    words, numbers = tiny_transformers.answer(folder, task)

    def check(result: TaskResult) -> None:
        found = tiny_transformers.plain(result)
        assert found[0] == words
        np.testing.assert_allclose(found[1], numbers, rtol=1e-3, atol=1e-5)

    spec = ModelSpec(name="m", runtime=Runtime.TRANSFORMERS, source=folder, options=options)
    return Case(f"Transformers {name}", spec, task, check, bad_tensors=[bad])


def recogniser_case() -> Case:
    """The committed Whisper again, as transformers has it: its words are known."""
    from tests.models import tiny_transformers  # noqa: PLC0415 - takes seconds

    clip = next(clip for clip in models.clips() if clip.text)
    samples = models.read_samples(clip.path)

    def check(result: TaskResult) -> None:
        assert result.values["text"] == clip.text
        assert result.values["language"] == "en"
        assert result.values["duration"] == len(samples) / 16_000
        (segment,) = result.values["segments"]
        assert 0 <= segment["start"] < segment["end"] <= 2

    return Case(
        "Transformers Whisper",
        ModelSpec(
            name="m",
            runtime=Runtime.TRANSFORMERS,
            source=saved("whisper", tiny_transformers.save_whisper),
        ),
        transcribe(samples),
        check,
        bad_tensors=[tensor("audio", np.zeros((2, 3), np.float32))],
    )


def texts(*items: str) -> Tensor:
    data = b"".join(len(item.encode()).to_bytes(4, "little") + item.encode() for item in items)
    return Tensor(name="text", datatype="BYTES", shape=(len(items),), data=data)


def text_case(name: str, *items: str, **parameters: Any) -> Case:
    task = Task(kind=TaskKind.INFER, parameters=parameters, tensors=[texts(*items)])
    return transformers_case(name, task, tensor("text", np.zeros(2, np.float32)))


CASES: dict[str, Callable[[], Case]] = {
    "Whisper": whisper_case,
    "ONNX": onnx_case,
    "Python": python_case,
    "TorchScript": script_case,
}
"""One of each runtime whose library is quick to import."""
FORMS: dict[str, Callable[[], Case]] = {
    "FunASR": funasr_case,
    "TorchExport": export_case,
    "TorchFactory": factory_case,
    "TransformersWhisper": recogniser_case,
    "TransformersGenerator": lambda: text_case("generator", "play music", max_tokens=6),
}
"""Other forms of source and tasks: through the tiers only, since each costs seconds."""
