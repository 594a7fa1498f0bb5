"""The quick start, followed to the letter in a copy of this checkout, on a cluster of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cluster

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quickstart.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = "=====quickstart====="
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Command:
    """What a reader types, and what the page says comes out; empty where it says nothing."""

    text: str
    output: str


def commands() -> Iterator[Command]:
    """The commands of the page's own walk, in order; the part for other clusters is not run."""
    walk, _, _ = PAGE.read_text(encoding="utf-8").partition("\n## On your own cluster")
    for block in _BLOCK.findall(walk):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            end = 1
            if "<<EOF" in lines[0]:
                end = lines.index("EOF") + 1
            while lines[end - 1].endswith("\\"):
                end += 1
            yield Command("\n".join(lines[:end]), "\n".join(lines[end:]).strip())


@pytest.fixture
def checkout(tmp_path: Path, node: cluster.Cluster) -> Iterator[Path]:
    """A copy of what git would clone, with this environment; its cluster goes away again.

    It asks for ``node``, which says why where no node can run.
    """
    del node
    folder = tmp_path / "vram-operator"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    yield folder
    cluster.down(folder / ".cluster")


def test_every_command_of_the_quick_start_does_what_the_page_says(checkout: Path) -> None:
    walk = list(commands())
    script = "set -euo pipefail\n" + "\n".join(
        f"echo '{_MARK}'\n{command.text}" for command in walk
    )
    environment = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    log = checkout.parent / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(TIMEOUT_SECONDS)
        finally:
            # The port-forward of the page runs on in the background, as a reader's would.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    outputs = log.read_text(encoding="utf-8").split(f"{_MARK}\n")[1:]
    done = dict(zip((command.text for command in walk), outputs, strict=False))
    assert status == 0, f"{walk[len(outputs) - 1].text} failed:\n{outputs[-1]}"
    for command in walk:
        assert command.output in done[command.text], command.text
    assert re.search(r"speech .* 0/1 +0 ", done["kubectl get gmw speech"])
    assert re.search(r"by-hand +speech .* Recycle +Recovered", done["kubectl get gmw,gpr"])
