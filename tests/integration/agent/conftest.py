"""The real command as a process, with real models, on free ports of the loopback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest
from vram_agent.protocol import Report

from tests.models import DIGITS, WHISPER

WHISPER_MODEL: dict[str, Any] = {"name": "whisper", "runtime": "Whisper", "source": str(WHISPER)}
DIGITS_MODEL: dict[str, Any] = {"name": "digits", "runtime": "ONNX", "source": str(DIGITS)}
DEADLINE_SECONDS = 120.0


class Agent:
    """``vram-agent serve`` as a subprocess, its log and its two ports."""

    def __init__(self, process: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.session = session
        self.log: list[dict[str, Any]] = []
        self.ready = asyncio.Event()
        self.serving = self.control = ""
        self._reading = asyncio.create_task(self._read_log())

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": "text", "text": line.decode(errors="replace")}
            self.log.append(entry)
            if entry.get("event") == "ready":
                self.serving = f"http://{entry.get('serving', '')}"
                self.control = f"http://{entry['control']}"
                self.ready.set()

    async def report(self) -> Report:
        async with self.session.get(f"{self.control}/report") as answer:
            return msgspec.json.decode(await answer.read(), type=Report)

    async def when(self, is_so: Callable[[Report], bool]) -> Report:
        """Ask for reports until one is as wanted."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            # The agent is another process: asking again is the only way to learn of a change.
            while not is_so(report := await self.report()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return report

    async def call(self, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.session.post(f"{self.control}{path}", json=body or {}) as answer:
            return answer.status, await answer.json()

    async def transcribe(self, clip: Path, model: str = "whisper") -> tuple[int, Any]:
        form = aiohttp.FormData()
        form.add_field("model", model)
        form.add_field("file", read(clip), filename=clip.name, content_type="audio/wav")
        url = f"{self.serving}/v1/audio/transcriptions"
        async with self.session.post(url, data=form) as answer:
            return answer.status, await answer.json()

    def pids(self, role: str) -> list[int]:
        """Templates are children of the supervisor; GPU processes are children of templates."""
        templates = psutil.Process(self.process.pid).children()
        if role == "template":
            return [child.pid for child in templates]
        return [child.pid for template in templates for child in template.children()]

    def read_maps(self) -> str:
        """What the supervisor has mapped, libraries among it."""
        return Path(f"/proc/{self.process.pid}/maps").read_text()

    async def end(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_SECONDS):
            status = await self.process.wait()
            await self._reading
        return status


def read(clip: Path) -> bytes:
    return clip.read_bytes()


StartAgent = Callable[..., Coroutine[Any, Any, Agent]]


@pytest.fixture
async def start_agent(tmp_path: Path) -> AsyncIterator[StartAgent]:
    agents: list[Agent] = []
    session = aiohttp.ClientSession()

    async def start(*models: dict[str, Any], wrapper: Sequence[str] = (), **config: Any) -> Agent:
        path = tmp_path / "config.json"
        document = {
            "device": "CPU",
            "listen": {"serving": "127.0.0.1:0", "control": "127.0.0.1:0"},
            "control": {"allowUnsigned": True},
            "models": list(models),
            **config,
        }
        path.write_text(json.dumps(document))
        environment = {**os.environ, "VRAM_AGENT_STATE_DIR": str(tmp_path / "state")}
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *wrapper,
            str(Path(sys.executable).with_name("vram-agent")),
            "serve",
            "--config",
            str(path),
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
        agent = Agent(process, session)
        agents.append(agent)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await agent.ready.wait()
        print(f"listening after {time.monotonic() - began:.2f} s")
        return agent

    yield start
    for agent in agents:
        try:
            await agent.end()
        finally:
            for entry in agent.log:
                print(json.dumps(entry))
    await session.close()
