"""What an ONNX model leaves on the device: with the options of ONNX Runtime, with the agent's.

Each figure is that of the whole process which runs the model, interpreter and libraries included.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np
from vram_agent.backend import Task, TaskKind, Tensor
from vram_agent.devices.base import Device
from vram_agent.processes.group import ProcessBackend
from vram_agent.protocol import ModelSpec, Runtime

from bench import apart
from bench.matmul import BATCHES, ROWS, write_matmul

SIZE_BYTES = 128 << 20


def measure(device: Device, name: str, samples: int) -> dict[str, list[int]]:
    """Return the samples in bytes, by what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matmul.onnx"
        write_matmul(path, SIZE_BYTES)
        found: dict[str, list[int]] = {}
        for _ in range(samples):
            plain = apart.run("bench.onnx_default", device, device=name, path=str(path))
            found.setdefault("default options, loaded", []).append(plain["loadedBytes"])
            found.setdefault("default options, session dropped", []).append(plain["droppedBytes"])
        asyncio.run(_measure_ours(device, path, samples, found))
    return found


async def _measure_ours(
    device: Device, path: Path, samples: int, found: dict[str, list[int]]
) -> None:
    backend = ProcessBackend(device)
    group = backend.open_group("bench", lambda exit_: print(f"unexpected: {exit_}"))

    def note(name: str) -> None:
        used_bytes = sum(one.used_bytes for one in backend.devices())
        found.setdefault(name, []).append(used_bytes - backend.device_baseline_bytes())

    try:
        await group.load(ModelSpec(name="matmul", runtime=Runtime.ONNX, source=str(path)))
        for _ in range(samples):
            await group.restore("matmul")
            for batch in BATCHES:
                x = np.ones((batch, ROWS), np.float32)
                tensor = Tensor(
                    name="input", datatype="FP32", shape=(batch, ROWS), data=x.tobytes()
                )
                await group.run("matmul", Task(kind=TaskKind.INFER, tensors=[tensor]))
            note("the agent's options, loaded")
            await group.offload("matmul")
            note("the agent's options, PinnedHost tier")
            await group.end_gpu()
            note("Host tier")
    finally:
        await group.close()
