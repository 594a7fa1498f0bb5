"""A first load holds the weights once: what the file held is mapped, what the model holds moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vram_agent.processes.group import ProcessGroup
from vram_agent.protocol import ModelSpec, Runtime

from tests.conformance.cases import python_spec
from tests.models.shapes import make_whisper_shape, whisper_shape_near

MIB = 1 << 20
SIZE_MIB = 300
SAMPLE_SECONDS = 0.002


def whisper_spec(folder: Path) -> ModelSpec:
    """Single precision in the file too, so that a second copy would be a whole one."""
    shape = whisper_shape_near(SIZE_MIB * MIB, torch.float32)
    make_whisper_shape(folder / "large.pt", shape)
    return ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(folder / "large.pt"))


def funasr_spec(folder: Path) -> ModelSpec:
    from tests.models.tiny_funasr import make_large  # noqa: PLC0415 - takes seconds

    make_large(folder / "large", SIZE_MIB)
    return ModelSpec(name="m", runtime=Runtime.FUNASR, source=str(folder / "large"))


def read_held_bytes(pid: int) -> int:
    """Memory of a process without a file behind it, and of the arena: what it costs to have."""
    held = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            held += int(line.split()[1]) * 1024
    return held


async def watch_peak(pid: int) -> int:
    """The most that a process holds until the watcher is cancelled; samples, so a lower bound."""
    peak = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            peak = max(peak, read_held_bytes(pid))
            await asyncio.sleep(SAMPLE_SECONDS)
    return peak


@pytest.mark.parametrize("make", [whisper_spec, funasr_spec])
async def test_the_weights_are_in_memory_once_while_they_are_loaded(
    group: ProcessGroup, tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    spec = make(tmp_path)
    # So that the template is there, and its libraries are.
    await group.load(python_spec("make_linear", name="first", rows=1, columns=1))
    small = ModelSpec(name="small", runtime=spec.runtime, source=f"{tmp_path}/none")
    with contextlib.suppress(Exception):
        await group.load(small)
    pid = group.template_pid
    assert pid is not None
    before_bytes = read_held_bytes(pid)
    watching = asyncio.ensure_future(watch_peak(pid))
    model = await group.load(spec)
    watching.cancel()
    peak_bytes = await watching - before_bytes
    assert model.weight_bytes > 0.9 * SIZE_MIB * MIB
    print(f"{peak_bytes / MIB:.0f} MiB for {model.weight_bytes / MIB:.0f} MiB of weights")
    # Twice at any time would be 2; the largest tensor is in both places for a moment.
    assert 0.9 * model.weight_bytes < peak_bytes < 1.7 * model.weight_bytes
