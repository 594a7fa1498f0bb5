"""The agent from outside: ready time, and the way back from the Host tier.

Ready is measured beside a Python that imports torch, since that is what a server pays that loads
its libraries at start. The way back is measured beside a fresh agent's first answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from bench.record import Record, Row, write
from tests import models

SAMPLES = 5
LIMIT_SECONDS = 120.0


@contextmanager
def agent(folder: Path) -> Iterator[tuple[str, str, float]]:
    """A fresh ``vram-agent``; yields both addresses and the seconds from exec to ready."""
    config = {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "AgentConfig",
        "device": "CPU",
        "listen": {"serving": "127.0.0.1:0", "control": "127.0.0.1:0"},
        "control": {"allowUnsigned": True},
        "models": [
            {
                "name": "whisper",
                "runtime": "Whisper",
                "source": str(models.WHISPER),
                "residency": {"offloadTier": "PinnedHost"},
            }
        ],
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    environment = {**os.environ, "VRAM_AGENT_STATE_DIR": str(folder)}
    command = [sys.executable, "-m", "vram_agent", "serve", "--config", str(path)]
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        seconds = time.monotonic() - began
        try:
            yield f"http://{ready['serving']}", f"http://{ready['control']}", seconds
        finally:
            process.terminate()
            process.communicate(timeout=LIMIT_SECONDS)


def transcribe(url: str) -> float:
    """Send one clip, check its text, return the seconds."""
    clip = models.clips()[0]
    began = time.monotonic()
    with clip.path.open("rb") as audio:
        answer = requests.post(
            f"{url}/v1/audio/transcriptions",
            files={"file": audio},
            data={"model": "whisper", "language": "en"},
            timeout=LIMIT_SECONDS,
        )
    seconds = time.monotonic() - began
    assert answer.json()["text"].strip() == clip.text, answer.text
    return seconds


def weight_bytes(control: str) -> int:
    """What the model weighs, as the agent reports it."""
    (model,) = requests.get(f"{control}/report", timeout=LIMIT_SECONDS).json()["models"]
    return int(model["hostBytes"])


def main() -> None:
    """Measure and record."""
    ready: list[float] = []
    imports: list[float] = []
    first: list[float] = []
    host: list[float] = []
    pinned: list[float] = []
    weight = 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(SAMPLES):
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", "import torch, whisper"], check=True)
            imports.append(time.monotonic() - began)
            with agent(Path(folder)) as (serving, control, seconds):
                ready.append(seconds)
                first.append(transcribe(serving))
                weight = weight_bytes(control)
                pinned.append(transcribe(serving))
                requests.post(
                    f"{control}/models/whisper/offload?tier=Host", timeout=LIMIT_SECONDS
                ).raise_for_status()
                host.append(transcribe(serving))
    fresh = "a fresh agent's first answer"
    rows = [
        Row(
            benchmark="ready",
            variant="vram-agent serve",
            size_bytes=0,
            samples=ready,
            reference="python -c 'import torch, whisper'",
            reference_samples=imports,
        ),
        Row(
            benchmark="answer",
            variant="from the Host tier",
            size_bytes=weight,
            samples=host,
            reference=fresh,
            reference_samples=first,
        ),
        Row(
            benchmark="answer",
            variant="from the PinnedHost tier",
            size_bytes=weight,
            samples=pinned,
            reference=fresh,
            reference_samples=first,
        ),
    ]
    write("agent", Record(rows=rows))


if __name__ == "__main__":
    main()
