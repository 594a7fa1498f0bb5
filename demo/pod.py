"""The demo as a client of the pod: a forwarded port, requests and reports.

Goes through ``kubectl port-forward``, as a person at a laptop would, so that it works on the local
cluster and on the user's own alike.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import requests
from vram_agent.protocol import Report

from demo.console import StepFailedError

FORWARD_SECONDS = 30.0
REQUEST_SECONDS = 120.0
Found = TypeVar("Found")


def wait_for(what: str, timeout_seconds: float, look: Callable[[], Found | None]) -> Found:
    """Call ``look`` twice a second until it returns something; StepFailedError after the time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.5)
    raise StepFailedError(f"{what} did not happen within {timeout_seconds:.0f} s")


class Forward:
    """A forwarded port of a Service; ends with the block."""

    def __init__(self, kubectl: Sequence[str], service: str, port: int) -> None:
        self._command = [*kubectl, "port-forward", f"service/{service}", f":{port}"]
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None  # noqa: S101 - PIPE was asked for
        line = self._process.stdout.readline()
        match = re.search(r"127\.0\.0\.1:(\d+)", line)
        if match is None:
            self._process.kill()
            raise StepFailedError(f"{' '.join(self._command)} said: {line.strip()}")
        self.url = f"http://127.0.0.1:{match[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()


class Pod:
    """The workload's pod, seen through its two ports."""

    def __init__(self, serving_url: str, control_url: str) -> None:
        self._serving = serving_url
        self._control = control_url
        self._session = requests.Session()
        self._session.trust_env = False

    def report(self) -> Report:
        """Return what the agent says of itself now."""
        answer = self._session.get(f"{self._control}/report", timeout=REQUEST_SECONDS)
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=Report)

    def transcribe(self, model: str, clip: Path) -> tuple[str, float]:
        """Return the text of a clip and the seconds that the answer took."""
        started = time.monotonic()
        with clip.open("rb") as audio:
            answer = self._session.post(
                f"{self._serving}/v1/audio/transcriptions",
                files={"file": (clip.name, audio, "audio/wav")},
                data={"model": model, "language": "en"},
                timeout=REQUEST_SECONDS,
            )
        _check(answer)
        return answer.json()["text"].strip(), time.monotonic() - started

    def infer(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        """Run one inference by the Open Inference Protocol."""
        answer = self._session.post(
            f"{self._serving}/v2/models/{model}/infer", json=body, timeout=REQUEST_SECONDS
        )
        _check(answer)
        result: dict[str, Any] = answer.json()
        return result


def _check(answer: requests.Response) -> None:
    if answer.status_code != 200:
        raise StepFailedError(
            f"{answer.request.method} {answer.url} answered {answer.status_code}: {answer.text}"
        )
