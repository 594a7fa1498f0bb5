"""A first load holds the weights once: what the file held is mapped, what the model holds moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vram_agent.processes.group import ProcessGroup
from vram_agent.protocol import ModelSpec, Runtime

from tests import models
from tests.models.shapes import make_whisper_shape, whisper_shape_near

MIB = 1 << 20
SIZE_MIB = 300
SAMPLE_SECONDS = 0.002


def half_whisper(folder: Path) -> ModelSpec:
    """Half precision in the file, single in the model, as with the official checkpoints."""
    make_whisper_shape(folder / "large.pt", whisper_shape_near(SIZE_MIB * MIB))
    return ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(folder / "large.pt"))


def single_whisper(folder: Path) -> ModelSpec:
    """Single precision in both: the arena is filled from the mapped file."""
    shape = whisper_shape_near(SIZE_MIB * MIB, torch.float32)
    make_whisper_shape(folder / "large.pt", shape)
    return ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(folder / "large.pt"))


def old_whisper(folder: Path) -> ModelSpec:
    """A file that cannot be mapped, so that the library reads it beside the model."""
    checkpoint = torch.load(single_whisper(folder).source, mmap=True, weights_only=True)
    torch.save(checkpoint, folder / "old.pt", _use_new_zipfile_serialization=False)
    return ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(folder / "old.pt"))


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


@pytest.mark.parametrize(
    ("make", "least", "most"),
    [
        # While the largest tensor is copied into the arena, it is in both places. The file beside
        # the model would make 1.5 of half precision, and 2 of single.
        pytest.param(half_whisper, 0.9, 1.4, id="Whisper in half precision"),
        pytest.param(single_whisper, 0.9, 1.15, id="Whisper in single precision"),
        pytest.param(funasr_spec, 0.9, 1.45, id="FunASR"),
        pytest.param(old_whisper, 1.9, 2.5, id="a file that cannot be mapped"),
    ],
)
async def test_the_weights_are_in_memory_once_while_they_are_loaded(
    group: ProcessGroup,
    tmp_path: Path,
    make: Callable[[Path], ModelSpec],
    least: float,
    most: float,
) -> None:
    spec = make(tmp_path)
    # So that the template is there, and what its libraries keep for good.
    small = models.WHISPER if spec.runtime is Runtime.WHISPER else models.FUNASR
    await group.load(ModelSpec(name="small", runtime=spec.runtime, source=str(small)))
    pid = group.template_pid
    assert pid is not None
    before_bytes = read_held_bytes(pid)
    watching = asyncio.ensure_future(watch_peak(pid))
    model = await group.load(spec)
    watching.cancel()
    peak_bytes = await watching - before_bytes
    assert model.weight_bytes > 0.9 * SIZE_MIB * MIB
    print(f"{peak_bytes / MIB:.0f} MiB for {model.weight_bytes / MIB:.0f} MiB of weights")
    assert least * model.weight_bytes < peak_bytes < most * model.weight_bytes
