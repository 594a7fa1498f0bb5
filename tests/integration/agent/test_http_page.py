"""The examples of docs/http.md, run as they stand against the real command."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.integration.agent.conftest import WHISPER_MODEL, Agent, StartAgent
from tests.integration.agent.test_openai_client import SPEAKER_MODEL
from tests.integration.agent.test_triton_client import ECHO_MODEL
from tests.models import clips

PAGE = (Path(__file__).parents[3] / "docs/http.md").read_text(encoding="utf-8")
CLIP = next(clip for clip in clips() if clip.text == "light five")
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONSOLE = [block for kind, block in _BLOCK.findall(PAGE) if kind == "console"]
PYTHON = [block for kind, block in _BLOCK.findall(PAGE) if kind == "python"]
_CALL = re.compile(r"^\$ (curl (?:.*\\\n)*.*\n)", re.MULTILINE)


@pytest.fixture
async def agent(start_agent: StartAgent, tmp_path: Path) -> Agent:
    shutil.copy(CLIP.path, tmp_path / "clip.wav")
    return await start_agent(WHISPER_MODEL, SPEAKER_MODEL, ECHO_MODEL)


async def run(folder: Path, *command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return output.decode()


def at(agent: Agent, example: str) -> str:
    """The example with this agent's address."""
    assert "localhost:8000" in example
    return example.replace("localhost:8000", agent.serving.removeprefix("http://"))


async def test_the_calls_by_curl_answer_as_the_page_says(agent: Agent, tmp_path: Path) -> None:
    calls = 0
    for block in CONSOLE:
        _, *rest = _CALL.split(block)
        for call, answer in zip(rest[::2], rest[1::2], strict=True):
            command = at(agent, call).replace("curl ", "curl --silent --fail-with-body ", 1)
            said = await run(tmp_path, "bash", "-c", command)
            assert said.strip() == answer.strip()
            calls += 1
    assert calls == 3


async def test_the_clients_examples_run(agent: Agent, tmp_path: Path) -> None:
    openai, triton = PYTHON
    await run(tmp_path, sys.executable, "-c", at(agent, openai))
    assert (tmp_path / "speech.wav").read_bytes()[:4] == b"RIFF"
    assert await run(tmp_path, sys.executable, "-c", at(agent, triton)) == "[1.  2.5]\n"
