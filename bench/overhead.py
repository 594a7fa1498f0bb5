"""What a request costs over calling the model in process, and where that goes.

Layer by layer, each around the one before, side by side in every round: ONNX Runtime in this
process; the same in a GPU process (channel, memory of its own); the supervisor's queue before that;
HTTP with JSON and with binary tensors around all. An HTTP call that asks for no model stands beside
them. Called by ``python -m bench overhead``.

The time that supervisor and GPU process had on a CPU is kept too: on a machine that other work
shares, waiting for a core is most of a request's time, and no fault of the path.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from vram_agent import __version__
from vram_agent.backend import Task, TaskKind, Tensor
from vram_agent.devices import select_device
from vram_agent.metrics import AgentMetrics
from vram_agent.processes.group import ProcessBackend
from vram_agent.protocol import (
    ActionReport,
    AfterTask,
    AgentConfig,
    DevicePreference,
    ModelSpec,
    Residency,
    Runtime,
)
from vram_agent.supervision.ports import LoopClock, Surroundings
from vram_agent.supervisor import Supervisor

from bench.matmul import write_matmul
from bench.record import Record, Row, write
from bench.served import Connection, Served, cpu_seconds, make_post, serve
from tests.models import DIGITS, digit_clips, read_samples

ROUNDS = 6
CALLS = 50
"""Of each layer in a round; a sample is their median."""
CROWDS = (16, 128)
CROWD_ROUNDS = 2
CROWD_CALLS = 512
"""Of all clients together in a round; a sample is the round's time by them."""
WANTED_SECONDS = 0.001
TINY_ROWS = 16
IN_PROCESS = "onnxruntime in process"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: agent\r\n\r\n"
Call = Callable[[], Awaitable[Any]]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and one input for it."""

    name: str
    path: Path
    input: str
    array: Array

    @property
    def spec(self) -> ModelSpec:
        """As the agent's config has it; it stays in VRAM."""
        return ModelSpec(
            name=self.name,
            runtime=Runtime.ONNX,
            source=str(self.path),
            residency=Residency(after_task=AfterTask.KEEP),
        )

    @property
    def task(self) -> Task:
        """The input as a task."""
        shape, data = self.array.shape, self.array.tobytes()
        tensor = Tensor(name=self.input, datatype="FP32", shape=shape, data=data)
        return Task(kind=TaskKind.INFER, tensors=[tensor])

    def as_json(self) -> bytes:
        """The input as a request of JSON."""
        head = {"name": self.input, "datatype": "FP32", "shape": self.array.shape}
        body = {"inputs": [{**head, "data": self.array.ravel().tolist()}]}
        return make_post(self._path, json.dumps(body).encode())

    def as_binary(self) -> bytes:
        """The input as a request with a binary tensor."""
        data = self.array.tobytes()
        head = {"name": self.input, "datatype": "FP32", "shape": self.array.shape}
        inputs = [{**head, "parameters": {"binary_data_size": len(data)}}]
        text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        return make_post(
            self._path, text + data, {"Inference-Header-Content-Length": str(len(text))}
        )

    @property
    def _path(self) -> str:
        return f"/v2/models/{self.name}/infer"


@dataclass(kw_only=True)
class Samples:
    """Seconds by model and layer; CPU seconds of a request by model, layer and role."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    cpu: dict[tuple[str, str], dict[str, list[float]]] = field(default_factory=dict)

    def median(self, model: str, layer: str) -> float:
        """The median of the samples."""
        return statistics.median(self.seconds[model, layer])


class NoJournal:
    """A supervisor without actions."""

    def read(self) -> ActionReport | None:
        """Return nothing."""
        return None

    async def write(self, action: ActionReport) -> None:
        """Never called."""
        raise NotImplementedError


def main() -> None:
    """Measure, and write overhead.json."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = _make_models(folder)
        with serve(folder, [as_served(model) for model in models]) as served:
            samples = asyncio.run(_measure(models, served))
    record = Record()
    for model in models:
        _describe(record, samples, model)
    record.claim_at_most(
        "median seconds of a request, JSON, one at a time",
        samples.median("tiny", "HTTP, JSON"),
        WANTED_SECONDS,
    )
    print(f"written to {write('overhead', record)}")


def make_tiny(folder: Path) -> Model:
    """Return a model of one small matrix of ones, written to the folder."""
    path = folder / "tiny.onnx"
    write_matmul(path, TINY_ROWS * TINY_ROWS * 4, TINY_ROWS)
    return Model(name="tiny", path=path, input="input", array=np.ones((1, TINY_ROWS), np.float32))


def as_served(model: Model) -> dict[str, Any]:
    """Return a model as an agent's config has it; it stays in VRAM."""
    residency = {"afterTask": "Keep"}
    return {
        "name": model.name,
        "runtime": "ONNX",
        "source": str(model.path),
        "residency": residency,
    }


def _make_models(folder: Path) -> list[Model]:
    second = read_samples(digit_clips()[0].path).reshape(1, -1)
    digits = Model(name="digits", path=DIGITS, input="audio", array=second)
    return [make_tiny(folder), digits]


async def _measure(models: list[Model], served: Served) -> Samples:
    samples = Samples()
    config = AgentConfig(models=[model.spec for model in models])
    surroundings = Surroundings(
        clock=LoopClock(), observer=AgentMetrics(__version__), journal=NoJournal()
    )
    supervisor = Supervisor(config, surroundings)
    backend = ProcessBackend(select_device(DevicePreference.CPU))
    supervisor.attach(backend)
    group = backend.open_group("bench", lambda exit_: print(f"unexpected: {exit_}"))
    connection = await Connection.open(served.serving)
    try:
        for model in models:
            await group.load(model.spec)
        for model in models:
            await group.restore(model.name)
        layers = {
            model.name: _layers_of(model, group.run, supervisor.submit, connection)
            for model in models
        }
        for calls in layers.values():
            for call in calls.values():
                await _time(call, CALLS // 5)
        for _ in range(ROUNDS):
            for model in models:
                await _take_round(samples, model.name, layers[model.name], served)
        for crowd in CROWDS:
            await _take_crowd(samples, models[0], served, crowd)
    finally:
        await connection.close()
        await group.close()
        await supervisor.close()
    return samples


def _layers_of(
    model: Model,
    run: Callable[[str, Task], Awaitable[Any]],
    submit: Callable[[str, Task], Awaitable[Any]],
    connection: Connection,
) -> dict[str, Call]:
    """Return what calls the model once, by layer."""
    import onnxruntime  # noqa: PLC0415 - may be missing

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(model.path), options, providers=["CPUExecutionProvider"]
    )
    task, feeds = model.task, {model.input: model.array}

    async def in_process() -> None:
        session.run(None, feeds)

    async def ask(request: bytes) -> None:
        status, body = await connection.ask(request)
        assert status == 200, body

    requests = {
        "HTTP, JSON": model.as_json(),
        "HTTP, binary": model.as_binary(),
        "HTTP alone": LIVE,
    }
    return {
        IN_PROCESS: in_process,
        "GPU process": lambda: run(model.name, task),
        "queue": lambda: submit(model.name, task),
        **{name: partial(ask, request) for name, request in requests.items()},
    }


async def _take_round(
    samples: Samples, model: str, layers: dict[str, Call], served: Served
) -> None:
    pids = {role: found for role, found in served.pids().items() if found}
    for layer, call in layers.items():
        before = {role: cpu_seconds(found) for role, found in pids.items()}
        sample = statistics.median(await _time(call, CALLS))
        samples.seconds.setdefault((model, layer), []).append(sample)
        if not layer.startswith("HTTP"):
            continue
        used = samples.cpu.setdefault((model, layer), {})
        for role, found in pids.items():
            used.setdefault(role, []).append((cpu_seconds(found) - before[role]) / CALLS)


async def _time(call: Call, count: int) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        found.append(time.perf_counter() - began)
    return found


async def _take_crowd(samples: Samples, model: Model, served: Served, crowd: int) -> None:
    """Let so many clients ask, each one request at a time, as often as they can."""
    connections = [await Connection.open(served.serving) for _ in range(crowd)]
    requests = {"HTTP, JSON": model.as_json(), "HTTP, binary": model.as_binary()}

    async def ask(connection: Connection, request: bytes) -> None:
        for _ in range(CROWD_CALLS // crowd):
            status, body = await connection.ask(request)
            assert status == 200, body

    try:
        for _ in range(CROWD_ROUNDS):
            for layer, request in requests.items():
                began = time.perf_counter()
                await asyncio.gather(*(ask(one, request) for one in connections))
                seconds = (time.perf_counter() - began) / CROWD_CALLS
                found = samples.seconds.setdefault((model.name, f"{layer}, {crowd} at a time"), [])
                found.append(seconds)
    finally:
        for connection in connections:
            await connection.close()


def _describe(record: Record, samples: Samples, model: Model) -> None:
    reference = samples.seconds[model.name, IN_PROCESS]
    record.rows += [
        Row(
            benchmark=model.name,
            variant=layer,
            size_bytes=0,
            samples=found,
            reference=IN_PROCESS,
            reference_samples=reference,
        )
        for (name, layer), found in samples.seconds.items()
        if name == model.name and layer != IN_PROCESS
    ]
    layers = [IN_PROCESS, "GPU process", "queue", "HTTP, JSON"]
    medians = [samples.median(model.name, layer) for layer in layers]
    shares = {
        "model": medians[0],
        "channel and process": medians[1] - medians[0],
        "queue": medians[2] - medians[1],
        "HTTP": medians[3] - medians[2],
    }
    record.notes.append(
        f"{model.name}, JSON, one at a time, by layer: "
        + ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in shares.items())
    )
    used = {
        layer: {role: round(min(each), 6) for role, each in roles.items()}
        for (name, layer), roles in samples.cpu.items()
        if name == model.name
    }
    record.extra.setdefault("cpuSecondsOfARequest", {})[model.name] = used
    for layer, roles in used.items():
        words = ", ".join(f"{role} {seconds * 1e3:.2f} ms" for role, seconds in roles.items())
        record.notes.append(
            f"{model.name}, {layer}: time on a CPU: {words} (the least of all rounds)"
        )
