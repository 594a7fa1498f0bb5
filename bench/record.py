"""How a measurement is kept: ratios to a reference of the same run, with the machine and versions.

``bench/results/<name>.json``: seconds are medians, with all samples beside them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("vram-agent", "torch", "openai-whisper", "onnxruntime", "aiohttp")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant beside its reference; ``size_bytes`` is what the model weighs, 0 for none."""

    benchmark: str
    variant: str
    size_bytes: int
    samples: list[float]
    reference: str
    reference_samples: list[float]

    @property
    def ratio(self) -> float:
        """How many times longer the reference takes."""
        return statistics.median(self.reference_samples) / statistics.median(self.samples)


def write(name: str, rows: list[Row]) -> Path:
    """Print the rows as a table and write them; return the file."""
    print(
        f"{'benchmark':<22} {'variant':<30} {'seconds':>9} {'reference':<34} {'seconds':>9}  ratio"
    )
    for row in rows:
        print(
            f"{row.benchmark:<22} {row.variant:<30} {statistics.median(row.samples):>9.3f} "
            f"{row.reference:<34} {statistics.median(row.reference_samples):>9.3f} "
            f"{row.ratio:>6.1f}"
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "machine": _machine(),
        "versions": _versions(),
        "rows": [_as_json(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "benchmark": row.benchmark,
        "variant": row.variant,
        "sizeBytes": row.size_bytes,
        "seconds": round(statistics.median(row.samples), 4),
        "reference": row.reference,
        "referenceSeconds": round(statistics.median(row.reference_samples), 4),
        "ratio": round(row.ratio, 2),
        "samples": [round(sample, 4) for sample in row.samples],
        "referenceSamples": [round(sample, 4) for sample in row.reference_samples],
    }


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memoryBytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "device": "CPU",
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
