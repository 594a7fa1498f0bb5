"""The way back from each tier to the first result, and what stays on the device meanwhile.

Real processes, as the supervisor drives them, beside a plain process that imports torch, loads the
checkpoint onto the device and answers once.
"""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vram_agent.backend import Task, TaskKind, TaskResult, Tensor
from vram_agent.devices.base import Device
from vram_agent.processes.group import ProcessBackend, ProcessGroup
from vram_agent.protocol import ModelSpec, Runtime

from bench import apart
from bench.layers import LAYER_BYTES, WIDTH, expect_outputs

SAMPLES = 3
ONES = struct.pack("<f", 1.0) * WIDTH
TASK = Task(
    kind=TaskKind.INFER,
    tensors=[Tensor(name="x", datatype="FP32", shape=(1, WIDTH), data=ONES)],
)


class Tiers:
    """Samples by name, in seconds and in bytes on the device."""

    def __init__(self, device: Device) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.held: dict[str, list[int]] = {}
        self.weight_bytes = 0
        self.backend = ProcessBackend(device)

    def note_time(self, name: str, began: float) -> None:
        """Keep the time since ``began``."""
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def note_held(self, name: str, model_bytes: int = 0) -> None:
        """Keep what the device says is in use beyond the baseline and the model."""
        used_bytes = sum(one.used_bytes for one in self.backend.devices())
        held_bytes = used_bytes - self.backend.device_baseline_bytes() - model_bytes
        self.held.setdefault(name, []).append(max(0, held_bytes))


def measure(device: Device, torch_device: str, size_bytes: int) -> Tiers:
    """Return what the tiers cost and hold."""
    tiers = Tiers(device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "layers.pt"
        apart.run("bench.layers", device, path=str(checkpoint), size_bytes=size_bytes)
        expected = expect_outputs(checkpoint.stat().st_size // LAYER_BYTES)
        asyncio.run(_measure(tiers, checkpoint, torch_device, expected))
    return tiers


async def _measure(
    tiers: Tiers, checkpoint: Path, torch_device: str, expected: list[float]
) -> None:
    spec = ModelSpec(
        name="layers",
        runtime=Runtime.PYTHON,
        source="bench.layers:load",
        options={"path": str(apart.ROOT), "arguments": {"path": str(checkpoint)}},
    )
    for _ in range(SAMPLES):
        began = time.perf_counter()
        _run_plainly(checkpoint, torch_device, expected)
        tiers.note_time("plain", began)
    group = tiers.backend.open_group("bench", lambda exit_: print(f"unexpected: {exit_}"))
    try:
        for _ in range(SAMPLES):
            began = time.perf_counter()
            tiers.weight_bytes = (await group.load(spec)).weight_bytes
            await _bring_back(group, expected)
            tiers.note_time("Disk", began)
            # The first run makes libraries set up what stays for good; tiers are told from it.
            await _go_through(tiers, group, expected)
            await group.unload("layers")
            tiers.note_held("Disk")
    finally:
        await group.close()


async def _go_through(tiers: Tiers, group: ProcessGroup, expected: list[float]) -> None:
    tiers.note_held("VRAM", (await group.restore("layers")).vram_bytes)
    await group.offload("layers")
    tiers.note_held("PinnedHost")
    began = time.perf_counter()
    await _bring_back(group, expected)
    tiers.note_time("PinnedHost", began)
    await group.end_gpu()
    tiers.note_held("Host")
    began = time.perf_counter()
    await _bring_back(group, expected)
    tiers.note_time("Host", began)


async def _bring_back(group: ProcessGroup, expected: list[float]) -> None:
    await group.restore("layers")
    _check(await group.run("layers", TASK), expected)


def _check(result: TaskResult, expected: list[float]) -> None:
    (y,) = result.tensors
    assert list(struct.unpack(f"<{len(expected)}f", y.data)) == expected


def _run_plainly(checkpoint: Path, torch_device: str, expected: list[float]) -> None:
    command = [sys.executable, "-m", "bench.layers", str(checkpoint), torch_device]
    done = subprocess.run(command, check=True, capture_output=True, cwd=apart.ROOT, text=True)
    assert done.stdout.strip() == str(expected)
