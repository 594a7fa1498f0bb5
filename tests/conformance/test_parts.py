"""Parts of a result come while the task runs, in order and bounded, and end with whoever reads."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vram_agent.backend import Task, TaskKind, TaskPart, TaskResult
from vram_agent.errors import TaskCancelledError, WorkerDiedError
from vram_agent.parts import Parts
from vram_agent.processes.group import ProcessGroup
from vram_agent.processes.inbox import MAX_UNTAKEN_BYTES
from vram_agent.protocol import ModelSpec, Runtime

from tests import models
from tests.conformance.cases import python_spec, tensor, transcribe

CHUNK_SAMPLES = 1 << 20
CHUNKS_IN_WINDOW = MAX_UNTAKEN_BYTES // (4 * CHUNK_SAMPLES)


class Words:
    """A task that says words, each when it may."""

    def __init__(self, folder: Path) -> None:
        self.made = folder / "made"
        self.leave = folder / "leave"
        self.closed = folder / "closed"
        for fifo in (self.leave, self.closed):
            os.mkfifo(fifo)

    def task(self, words: int, **parameters: Any) -> Task:
        paths = {"made": str(self.made), "closed": str(self.closed), "leave": str(self.leave)}
        return transcribe(np.zeros(16, np.float32), words=words, **paths, **parameters)

    async def go_on(self) -> None:
        await asyncio.to_thread(self.leave.write_bytes, b"go on")

    async def wait_closed(self) -> None:
        assert await asyncio.to_thread(self.closed.read_bytes) == b"closed"


@pytest.fixture
async def resident(group: ProcessGroup) -> ProcessGroup:
    await group.load(python_spec("make_streaming"))
    await group.restore("m")
    return group


def run(group: ProcessGroup, task: Task, parts: Parts) -> asyncio.Future[TaskResult]:
    running = asyncio.ensure_future(group.run("m", task, parts))
    running.add_done_callback(lambda _: parts.end())
    return running


async def read_all(parts: Parts) -> list[TaskPart]:
    found: list[TaskPart] = []
    while (part := await parts.take()) is not None:
        found.append(part)
    return found


async def test_a_part_is_there_before_the_next_is_made(
    resident: ProcessGroup, tmp_path: Path
) -> None:
    words = Words(tmp_path)
    parts = Parts()
    running = run(resident, words.task(3), parts)
    for number in range(3):
        part = await parts.take()
        assert part is not None
        assert part.values == {"text": f"{number} "}
        assert not running.done()
        await words.go_on()
    await words.wait_closed()
    assert await parts.take() is None
    assert (await running).values["text"] == "0 1 2 "


async def test_a_task_is_no_further_ahead_of_its_reader_than_allowed(
    resident: ProcessGroup, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    chunks = 3 * CHUNKS_IN_WINDOW
    parameters = {"input": "a", "made": str(made), "chunks": chunks, "samples": CHUNK_SAMPLES}
    parts = Parts()
    running = run(resident, Task(kind=TaskKind.SPEECH, parameters=parameters), parts)
    found: list[float] = []
    while (part := await parts.take()) is not None:
        (audio,) = part.tensors
        # What is made next waits for this one to be taken; its file says how many were made.
        ahead = int(made.read_text() or 0) - len(found) if made.exists() else 0
        assert ahead <= CHUNKS_IN_WINDOW + 1
        found.append(np.frombuffer(audio.data, "<f4", count=1)[0])
    assert found == list(range(chunks))
    assert (await running).values == {"rate": 24_000}


async def test_who_abandons_the_parts_ends_the_task_and_the_next_one_runs(
    resident: ProcessGroup, tmp_path: Path
) -> None:
    words = Words(tmp_path)
    parts = Parts()
    running = run(resident, words.task(1_000), parts)
    await parts.take()
    parts.abandon()
    await words.go_on()
    await words.wait_closed()
    with pytest.raises(TaskCancelledError):
        await running
    later = Parts()
    again = run(resident, words.task(1), later)
    await later.take()
    await words.go_on()
    await words.wait_closed()
    assert (await again).values["text"] == "0 "
    # One that is abandoned before it began never runs.
    words.made.unlink()
    with pytest.raises(TaskCancelledError):
        await resident.run("m", words.task(1), parts)
    assert not words.made.exists()


async def test_a_process_that_dies_midway_leaves_the_parts_and_an_error(
    resident: ProcessGroup, tmp_path: Path
) -> None:
    words = Words(tmp_path)
    parts = Parts()
    running = run(resident, words.task(5, exit_after=1), parts)
    assert await parts.take() is not None
    await words.go_on()
    assert await parts.take() is None
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        await running


async def test_whisper_gives_the_text_of_each_window_as_it_is_decoded(group: ProcessGroup) -> None:
    clip = next(clip for clip in models.clips() if clip.text)
    samples = models.read_samples(clip.path)
    quiet = np.zeros(30 * 16_000 - len(samples), np.float32)
    recording = np.concatenate([samples, quiet, samples])
    await group.load(ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(models.WHISPER)))
    await group.restore("m")
    task = Task(
        kind=TaskKind.TRANSCRIBE,
        parameters={"language": "en", "temperature": [0.0]},  # no window is tried twice
        tensors=[tensor("audio", recording)],
    )
    parts = Parts()
    result, found = await asyncio.gather(run(group, task, parts), read_all(parts))
    texts = [part.values["text"] for part in found]
    assert [text.split() for text in texts] == [clip.text.split()] * 2
    assert "".join(texts).strip() == result.values["text"]
