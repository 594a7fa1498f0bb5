"""A model that loads says how far it is, in the report and to whoever asks whether it is ready."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.agent.conftest import Agent, StartAgent
from tests.models import DIGITS


async def ready(agent: Agent) -> tuple[int, Any]:
    async with agent.session.get(f"{agent.serving}/v2/models/digits/ready") as answer:
        return answer.status, await answer.json()


async def report_command(agent: Agent, *arguments: str) -> str:
    command = str(Path(sys.executable).with_name("vram-agent"))
    process = await asyncio.create_subprocess_exec(
        command, "report", "--url", agent.control, *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return out.decode()


@pytest.mark.parametrize("load", ["Lazy", "Eager"])
async def test_the_bytes_that_were_read_are_told_while_the_model_still_loads(
    start_agent: StartAgent, tmp_path: Path, load: str
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    options = {
        "path": str(Path(__file__).parent),
        "arguments": {"onnx": str(DIGITS), "fifo": str(fifo)},
    }
    agent = await start_agent(
        {
            "name": "digits",
            "runtime": "Python",
            "source": "served_models:make_recogniser",
            "options": options,
            "residency": {"load": load, "afterTask": "Keep"},
        }
    )
    loading = asyncio.create_task(agent.call("/models/digits/load"))
    # It has read its file, and does nothing until it may.
    assert await asyncio.to_thread(fifo.read_bytes) == b"read"
    size = DIGITS.stat().st_size
    progress = {"step": "Reading", "doneBytes": size}  # a factory's total is not known
    async with agent.session.get(f"{agent.control}/report") as answer:
        model = (await answer.json())["models"][0]
    assert (model["state"], model["progress"]) == ("Loading", progress)
    is_lazy = load == "Lazy"
    assert await ready(agent) == (
        200 if is_lazy else 503,
        {"name": "digits", "ready": is_lazy, "state": "Loading", "progress": progress},
    )
    lines = (await report_command(agent)).splitlines()
    head = next(line for line in lines if line.startswith("MODEL"))
    row = next(line for line in lines if line.startswith("digits"))
    assert row[head.index("PROGRESS") :].startswith("Reading ")
    assert (
        json.loads(await report_command(agent, "-o", "json"))["models"][0]["progress"] == progress
    )

    await asyncio.to_thread(fifo.write_bytes, b"go on")
    assert (await loading)[0] == 200
    assert (await agent.report()).models[0].progress is None
    assert await ready(agent) == (200, {"name": "digits", "ready": True})
    assert "PROGRESS" not in await report_command(agent)
