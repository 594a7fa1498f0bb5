"""The agent from outside: ready time, and the way back from the Host tier.

Ready is measured beside a Python that imports torch, since that is what a server pays that loads
its libraries at start. The way back is measured beside a fresh agent's first answer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

from bench.record import Record, Row, write
from bench.served import LIMIT_SECONDS, serve
from tests import models

SAMPLES = 5


MODEL = {
    "name": "whisper",
    "runtime": "Whisper",
    "source": str(models.WHISPER),
    "residency": {"offloadTier": "PinnedHost"},
}


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
            with serve(Path(folder), [MODEL]) as served:
                serving, control = f"http://{served.serving}", f"http://{served.control}"
                ready.append(served.ready_seconds)
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
