"""docs/quickstart.md as something to follow: its commands, in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quickstart.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = "=====quickstart====="
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Command:
    """What a reader types, and what the page says comes out; empty where it says nothing."""

    text: str
    output: str


def section(number: int) -> list[Command]:
    """Return the commands of the section ``## <number>.`` of the page, in order."""
    page = PAGE.read_text(encoding="utf-8")
    _, _, rest = page.partition(f"\n## {number}. ")
    assert rest, f"{PAGE.name} has no section {number}"
    found = [
        _command(part)
        for block in _BLOCK.findall(rest.partition("\n## ")[0])
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    ]
    assert found, f"section {number} of {PAGE.name} has no command"
    return found


def _command(part: str) -> Command:
    lines = part.splitlines()
    end = lines.index("EOF") + 1 if "<<EOF" in lines[0] else 1
    while lines[end - 1].endswith("\\"):
        end += 1
    return Command("\n".join(lines[:end]), "\n".join(lines[end:]).strip())


class WalkFailedError(Exception):
    """A command of the page ended with another status than 0; the message has its output."""


@dataclass(frozen=True)
class Walk:
    """A copy of what git would clone, in which the page is followed."""

    folder: Path

    @property
    def cluster(self) -> Path:
        """The folder of the cluster that the page starts."""
        return self.folder / ".cluster"

    def copy_checkout(self) -> None:
        """Copy what git knows or would add, and link this environment."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        (self.folder / ".venv").symlink_to(ROOT / ".venv")

    def follow(self, commands: Sequence[Command]) -> dict[str, str]:
        """Run commands in one shell, as a reader does; return what each wrote, by its text.

        What they leave in the background ends with the last of them. Raises WalkFailedError at the
        first that fails.
        """
        # What the page has the reader export in section 1 holds in every later shell of theirs.
        exports = [one.text for one in section(1) if one.text.startswith("export ")]
        ready = exports if self.cluster.exists() else []
        script = "\n".join(
            ["set -euo pipefail", *ready, *(f"echo '{_MARK}'\n{one.text}" for one in commands)]
        )
        log = self.folder.parent / "quickstart.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if name != "KUBECONFIG"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(TIMEOUT_SECONDS)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        outputs = log.read_text(encoding="utf-8").split(f"{_MARK}\n")[1:]
        if status != 0:
            failed = commands[len(outputs) - 1]
            raise WalkFailedError(f"{failed.text}\nended with {status}:\n{outputs[-1]}")
        return dict(zip((one.text for one in commands), outputs, strict=True))
