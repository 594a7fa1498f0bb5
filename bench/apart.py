"""Measuring in a process of its own: a context, a heap or a peak must not touch the next figure.

A measurement is a module with a function ``measure(**arguments) -> dict``, both of JSON. It runs
with the environment that the agent gives its GPU processes, malloc's settings among it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vram_agent.devices.base import Device

ROOT = Path(__file__).parents[1]


class MeasurementFailedError(Exception):
    """The process of a measurement ended with an error, which it has printed."""


def run(module: str, on: Device, /, **arguments: Any) -> dict[str, Any]:
    """Return what ``measure`` of ``module`` returns in a fresh interpreter."""
    command = [sys.executable, "-m", "bench.apart", module, json.dumps(arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        env={**on.environment(), **os.environ},
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        raise MeasurementFailedError(f"{module} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Be the process: module and arguments on the command line, the result as the last line."""
    module, arguments = sys.argv[1:]
    print(json.dumps(importlib.import_module(module).measure(**json.loads(arguments))))


if __name__ == "__main__":
    main()
