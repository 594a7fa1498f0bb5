"""A caller may go away at any await; what it asked for ends in a consistent state."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vram_agent.errors import NotResidentError
from vram_agent.processes.group import ProcessGroup

from tests.conformance.cases import infer, onnx_case, python_spec

CASE = onnx_case()
SPEC = CASE.spec
CALLS: dict[str, Callable[[ProcessGroup], Coroutine[Any, Any, Any]]] = {
    "load": lambda group: group.load(SPEC),
    "restore": lambda group: group.restore("m"),
    "run": lambda group: group.run("m", CASE.task),
    "offload": lambda group: group.offload("m"),
    "scrub": lambda group: group.scrub(),
    "end_gpu": lambda group: group.end_gpu(),
    "unload": lambda group: group.unload("m"),
}


@pytest.mark.parametrize("turns", range(4))
async def test_every_call_cancelled_after_some_turns_of_the_loop(
    group: ProcessGroup, turns: int
) -> None:
    for name, call in CALLS.items():
        if name == "load":
            await group.unload("m")
        else:
            await group.load(SPEC)
        if name not in {"load", "restore"}:
            await group.restore("m")
        task = asyncio.ensure_future(call(group))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        # Whatever was under way, this comes after it.
        await group.end_gpu()
        assert not group.is_resident("m")
        await group.load(SPEC)
        await group.restore("m")
        CASE.check(await group.run("m", CASE.task))
        await group.end_gpu()


async def test_a_cancelled_restore_still_ends_resident(group: ProcessGroup) -> None:
    await group.load(SPEC)
    restoring = asyncio.ensure_future(group.restore("m"))
    await asyncio.sleep(0)
    restoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restoring
    # The next transition waits for it, and finds its work done.
    assert (await group.restore("m")).seconds == 0.0
    assert group.is_resident("m")


async def test_a_cancelled_task_runs_to_its_end_before_the_next(
    group: ProcessGroup, tmp_path: Path
) -> None:
    fifo = tmp_path / "started"
    os.mkfifo(fifo)
    await group.load(python_spec("make_doubler"))
    await group.restore("m")
    x = np.ones(2, np.float32)
    running = asyncio.ensure_future(group.run("m", infer(x, block=str(fifo))))
    await asyncio.to_thread(fifo.read_bytes)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    waiting = asyncio.ensure_future(group.run("m", infer(x)))
    await asyncio.sleep(0)
    assert not waiting.done()
    await group.end_gpu()
    with pytest.raises(NotResidentError):
        await waiting


async def test_closing_in_the_middle_of_a_load_ends_everything(
    group: ProcessGroup, tmp_path: Path
) -> None:
    fifo = tmp_path / "started"
    os.mkfifo(fifo)
    loading = asyncio.ensure_future(group.load(python_spec("make_blocked", fifo=str(fifo))))
    await asyncio.to_thread(fifo.read_bytes)
    await group.close()
    assert group.template_pid is None
    with pytest.raises(Exception, match="died"):
        await loading
