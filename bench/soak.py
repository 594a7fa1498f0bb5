"""Thousands of loads, offloads and restores: host and device memory must stay where they are.

Two groups of real processes, since leaks hide in either: in ``lasting`` one GPU process lives
through every cycle (restore, run, offload); in ``renewed`` each cycle drops the model, loads it
again, brings it into a new GPU process, runs it, offloads it and ends that process. A small second
model keeps the template of ``renewed`` alive. Where ONNX Runtime is installed, every other cycle is
that of an ONNX model.

Called by ``python -m bench soak`` and, for a few cycles, by tests/conformance/test_soak.py.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vram_agent.backend import Task, TaskKind, Tensor
from vram_agent.devices import select_device
from vram_agent.processes.group import ProcessBackend, ProcessGroup
from vram_agent.protocol import DevicePreference, ModelSpec, Runtime

from bench import apart
from bench.layers import LAYER_BYTES, expect_outputs
from bench.matmul import ROWS, write_matmul
from bench.record import Record, write
from bench.tiers import TASK

LAYERS = 1
ONNX_BYTES = 4 << 20
POINTS = 20
WARM_SHARE = 0.1
"""Of the cycles, that are left out of the growth: allocators and caches find their size."""
FLAT_BYTES = 4 << 20
"""Growth after the warm-up, over all cycles, that is still called flat."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What everything holds after some cycles, as the kernel and the driver count it, in bytes.

    ``device_bytes``: of the lasting GPU process with its models offloaded (PinnedHost);
    ``renewed_device_bytes``: of the renewed group after its GPU process ended (Host tier).
    """

    cycle: int
    device_bytes: int
    renewed_device_bytes: int
    template_bytes: int
    arena_bytes: int
    own_bytes: int
    own_fds: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the soak, a task for it and the answer."""

    spec: ModelSpec
    task: Task
    answer: list[float]


async def soak(
    device: DevicePreference, folder: Path, cycles: int, points: int = POINTS
) -> list[Point]:
    """Go through the cycles; print and return what was measured at the points."""
    chosen = select_device(device)
    backend = ProcessBackend(chosen)
    models = list(_make_models(folder))
    lasting, renewed = (
        backend.open_group(name, lambda exit_: print(f"unexpected: {exit_}"))
        for name in ("lasting", "renewed")
    )
    found: list[Point] = []
    try:
        for group in (lasting, renewed):
            for model in models:
                await group.load(model.spec)
        await renewed.load(_keeper())
        for cycle in range(1, cycles + 1):
            model = models[cycle % len(models)]
            await _come_and_go(lasting, model)
            await _begin_anew(renewed, model)
            if cycle % max(1, cycles // points) == 0:
                found.append(_measure(cycle, lasting, renewed))
                print(", ".join(f"{k} {v}" for k, v in vars(found[-1]).items()), flush=True)
    finally:
        await lasting.close()
        await renewed.close()
    return found


def _make_models(folder: Path) -> Iterator[Model]:
    checkpoint = folder / "layers.pt"
    apart.run(
        "bench.layers",
        select_device(DevicePreference.CPU),
        path=str(checkpoint),
        size_bytes=LAYERS * LAYER_BYTES,
    )
    options = {"path": str(apart.ROOT), "arguments": {"path": str(checkpoint)}}
    yield Model(
        spec=ModelSpec(
            name="layers", runtime=Runtime.PYTHON, source="bench.layers:load", options=options
        ),
        task=TASK,
        answer=expect_outputs(LAYERS),
    )
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return
    graph = folder / "matmul.onnx"
    write_matmul(graph, ONNX_BYTES)
    data = struct.pack("<f", 1.0) * ROWS
    columns = ONNX_BYTES // ROWS // 4
    yield Model(
        spec=ModelSpec(name="matmul", runtime=Runtime.ONNX, source=str(graph)),
        task=Task(
            kind=TaskKind.INFER,
            tensors=[Tensor(name="input", datatype="FP32", shape=(1, ROWS), data=data)],
        ),
        answer=[float(ROWS)] * columns,
    )


def _keeper() -> ModelSpec:
    options = {"path": str(apart.ROOT)}
    return ModelSpec(
        name="keeper", runtime=Runtime.PYTHON, source="bench.layers:make_nothing", options=options
    )


async def _come_and_go(group: ProcessGroup, model: Model) -> None:
    await group.restore(model.spec.name)
    await _run(group, model)
    await group.offload(model.spec.name)


async def _begin_anew(group: ProcessGroup, model: Model) -> None:
    await group.unload(model.spec.name)
    await group.load(model.spec)
    await _come_and_go(group, model)
    await group.end_gpu()


async def _run(group: ProcessGroup, model: Model) -> None:
    (tensor,) = (await group.run(model.spec.name, model.task)).tensors
    assert list(struct.unpack(f"<{len(model.answer)}f", tensor.data)) == model.answer


def _measure(cycle: int, lasting: ProcessGroup, renewed: ProcessGroup) -> Point:
    gc.collect()
    return Point(
        cycle=cycle,
        device_bytes=lasting.memory().device_bytes or 0,
        renewed_device_bytes=renewed.memory().device_bytes or 0,
        template_bytes=sum(
            private_bytes(group.template_pid)
            for group in (lasting, renewed)
            if group.template_pid is not None
        ),
        arena_bytes=sum(arena_bytes(group.template_pid) for group in (lasting, renewed)),
        own_bytes=private_bytes("self"),
        own_fds=len(list(Path("/proc/self/fd").iterdir())),
    )


def private_bytes(pid: int | str) -> int:
    """Return the memory that a process alone holds and has written, from smaps_rollup."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no Private_Dirty")


def arena_bytes(template_pid: int | None) -> int:
    """Return the pages that the arena of a template really has, as its file says."""
    files: dict[int, int] = {}
    for link in Path(f"/proc/{template_pid}/fd").iterdir():
        if str(link.readlink()).startswith("/memfd:vram-arena"):
            # Each mapping holds a descriptor of its own to the one file.
            status = link.stat()
            files[status.st_ino] = status.st_blocks * 512
    return sum(files.values())


def growth_bytes(points: Sequence[Point], name: str) -> int:
    """Return how much a figure grew after the warm-up: the medians of the last and first thirds."""
    warm = [getattr(point, name) for point in points]
    warm = warm[int(len(warm) * WARM_SHARE) :]
    third = max(1, len(warm) // 3)
    return int(statistics.median(warm[-third:]) - statistics.median(warm[:third]))


GROWING = ("device_bytes", "template_bytes", "arena_bytes", "own_bytes")


def main(device: DevicePreference, cycles: int) -> None:
    """Soak, and write soak.json (soak-cuda.json)."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        points = asyncio.run(soak(device, Path(folder), cycles))
    record = Record(machine={"device": device.value})
    seconds = time.monotonic() - began
    record.notes.append(f"{cycles} cycles in {seconds:.0f} s")
    for name in GROWING:
        record.claim_at_most(
            f"{name.replace('_', ' ')}: growth after the warm-up",
            growth_bytes(points, name),
            FLAT_BYTES,
        )
    record.claim_at_most(
        "bytes on the device whenever no GPU process lives",
        max(point.renewed_device_bytes for point in points),
        0,
    )
    record.extra = {"cycles": cycles, "points": [_as_json(point) for point in points]}
    name = "soak" if device is DevicePreference.CPU else f"soak-{device.value.lower()}"
    print(f"written to {write(name, record)}")


def _as_json(point: Point) -> dict[str, Any]:
    return {
        "cycle": point.cycle,
        "deviceBytes": point.device_bytes,
        "renewedDeviceBytes": point.renewed_device_bytes,
        "templateBytes": point.template_bytes,
        "arenaBytes": point.arena_bytes,
        "ownBytes": point.own_bytes,
        "ownFds": point.own_fds,
    }
