"""The Gradio application of the examples, wrapped as its Dockerfile says, leaks and is cured."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.examples.examples import FOLDER, WRAPPED
from tests.integration.agent.test_run import (
    AGENT,
    StartWrapped,
    become_ready,
    find_free_port,
    is_done,
    start_wrapped,
)

__all__ = ["start_wrapped"]
MIB = 1 << 20
PICTURES = 3


def command_of_image() -> tuple[list[str], list[str]]:
    """ENTRYPOINT and CMD."""
    text = (FOLDER / "gradio/Dockerfile").read_text()
    found = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE))
    return json.loads(found["ENTRYPOINT"]), json.loads(found["CMD"])


def config_of_example(port: int) -> dict[str, Any]:
    text = WRAPPED.object("ConfigMap")["data"]["config.yaml"]
    found: dict[str, Any] = yaml.safe_load(text.replace("7860", str(port)))
    return found


async def painted(port: int, count: int, folder: Path) -> str:
    """Run the page's program, for so many pictures; where the last one lies."""
    (program,) = WRAPPED.programs
    program = program.replace("7860", str(port)).replace("range(40)", f"range({count})")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        env={**os.environ, "no_proxy": "127.0.0.1,localhost", "TMPDIR": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return output.decode().strip()


def read_picture(path: str) -> bytes:
    picture = Path(path).read_bytes()
    assert picture.startswith(b"\x89PNG")
    return picture


async def test_the_wrapped_application_paints_leaks_and_is_cured_by_a_recycle(
    start_wrapped: StartWrapped, tmp_path: Path, monkeypatch: Any
) -> None:
    port = find_free_port()
    container = WRAPPED.object("Deployment")["spec"]["template"]["spec"]["containers"][0]
    for variable in container["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"].replace("7860", str(port)))
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.1")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    entry, (program, script) = command_of_image()
    assert [entry[0].rsplit("/", 1)[-1], entry[1], entry[-1]] == [Path(AGENT).name, "run", "--"]
    assert program == "python"
    config = config_of_example(port)
    del config["apiVersion"], config["kind"]

    agent = await start_wrapped([sys.executable, str(FOLDER / "gradio" / script)], **config)
    fresh = await agent.when(lambda r: r.idle and r.memory.model_bytes > 0)
    first = read_picture(await painted(port, PICTURES, tmp_path))
    leaked = await agent.when(lambda r: r.idle and r.memory.residual_bytes > 64 * PICTURES * MIB)
    assert leaked.memory.model_bytes == fresh.memory.model_bytes

    order = {"restartID": "r-1", "drainTimeoutSeconds": 30}
    assert (await agent.call("/recycle", order))[0] == 202
    await agent.when(is_done)
    await become_ready(agent)
    cured = await agent.when(lambda r: r.idle)
    assert cured.agent.epoch == 1
    assert leaked.memory.used_bytes - cured.memory.used_bytes > 64 * (PICTURES - 1) * MIB
    assert read_picture(await painted(port, PICTURES, tmp_path)) == first
