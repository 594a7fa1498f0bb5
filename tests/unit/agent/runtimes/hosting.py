"""A model loaded, brought onto the CPU's device memory and asked, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vram_agent.backend import Task, TaskKind, TaskResult, Tensor
from vram_agent.devices.base import Placement
from vram_agent.devices.cpu import CPU_UUID, AnonymousMemory
from vram_agent.engine.arena import Arena
from vram_agent.protocol import DeviceKind, ModelSpec, Runtime
from vram_agent.runtimes.base import HostedModel
from vram_agent.runtimes.registry import find_runtime

DATATYPES = {"float32": "FP32", "float64": "FP64", "int64": "INT64"}


def open_memory() -> AnonymousMemory:
    placement = Placement(kind=DeviceKind.CPU, index=0, uuid=CPU_UUID, total_bytes=64 << 30)
    return AnonymousMemory(placement)


@contextmanager
def hosted(runtime: Runtime, source: str, **options: Any) -> Iterator[HostedModel]:
    """A model, loaded and resident. Its arena goes at the end."""
    spec = ModelSpec(name="m", runtime=runtime, source=source, options=options)
    arena = Arena("t")
    try:
        model = find_runtime(spec).load(spec, arena)
        model.weights.restore(open_memory(), 1)
        yield model
        model.weights.offload()
        model.weights.release()
    finally:
        arena.close()


def load_only(runtime: Runtime, source: str, **options: Any) -> None:
    with hosted(runtime, source, **options):
        pass


def move_away_and_back(model: HostedModel) -> None:
    """Into the arena, which is then the only place of the weights, and into new device memory."""
    assert model.weights.offload().held_bytes == 0
    model.forget()
    assert model.weights.restore(open_memory(), 1) == model.weights.weight_bytes


def tensor(name: str, value: Any, dtype: str = "float32") -> Tensor:
    array = np.asarray(value, dtype)
    return Tensor(name=name, datatype=DATATYPES[dtype], shape=array.shape, data=array.tobytes())


def infer(model: HostedModel, *tensors: Tensor, **parameters: Any) -> TaskResult:
    return model.run(Task(kind=TaskKind.INFER, tensors=tensors, parameters=parameters))


def texts(*items: str) -> Tensor:
    data = b"".join(len(item.encode()).to_bytes(4, "little") + item.encode() for item in items)
    return Tensor(name="text", datatype="BYTES", shape=(len(items),), data=data)
