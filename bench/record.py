"""How a measurement is kept: ratios to a reference of the same run, with the machine and versions.

``bench/results/<name>.json``: seconds are medians, with all samples beside them. What is no time
(bytes that stay) lies in ``memory``, what a figure is held against in ``claims``, and what this
machine could not measure in ``skipped``, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("vram-agent", "torch", "safetensors", "openai-whisper", "onnxruntime", "aiohttp")
ONNX_GPU = "onnxruntime-gpu"


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
    def seconds(self) -> float:
        """The median of the variant."""
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float:
        """How many times longer the reference takes."""
        return statistics.median(self.reference_samples) / self.seconds


@dataclass(frozen=True, kw_only=True)
class Held:
    """Device memory that stays somewhere, by the device's own figure."""

    benchmark: str
    variant: str
    size_bytes: int
    samples_bytes: list[int]

    @property
    def held_bytes(self) -> int:
        """The median."""
        return int(statistics.median(self.samples_bytes))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the project says of itself, and whether this run bears it out. Nothing fails by it."""

    text: str
    measured: float
    limit: float
    holds: bool


@dataclass(kw_only=True)
class Record:
    """Everything that one benchmark found."""

    rows: list[Row] = field(default_factory=list)
    memory: list[Held] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def skip(self, what: str, reason: str) -> None:
        """Say what is not measured here, and why."""
        self.skipped.append(f"{what}: {reason}")

    def claim_at_least(self, text: str, measured: float, limit: float) -> None:
        """Hold a figure against a floor."""
        self.claims.append(
            Claim(text=text, measured=measured, limit=limit, holds=measured >= limit)
        )

    def claim_at_most(self, text: str, measured: float, limit: float) -> None:
        """Hold a figure against a ceiling."""
        self.claims.append(
            Claim(text=text, measured=measured, limit=limit, holds=measured <= limit)
        )


def write(name: str, record: Record) -> Path:
    """Print the record as tables and write it; return the file."""
    _print(record)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document: dict[str, Any] = {
        "machine": {**_machine(), **record.machine},
        "versions": _versions(),
        "rows": [_as_json(row) for row in record.rows],
    }
    if record.memory:
        document["memory"] = [_held_as_json(held) for held in record.memory]
    if record.claims:
        document["claims"] = [
            {
                "claim": claim.text,
                "measured": round(claim.measured, 6),
                "limit": round(claim.limit, 4),
                "holds": claim.holds,
            }
            for claim in record.claims
        ]
    remarks = {"notes": record.notes, "skipped": record.skipped}
    document |= {key: lines for key, lines in remarks.items() if lines}
    path.write_text(json.dumps({**document, **record.extra}, indent=1) + "\n")
    return path


def _print(record: Record) -> None:
    for note in record.notes:
        print(note)
    if record.rows:
        print(
            f"{'benchmark':<14} {'size':>8} {'variant':<32} {'seconds':>8} {'reference':<44} "
            f"{'seconds':>8} {'ratio':>7}"
        )
    for row in record.rows:
        print(
            f"{row.benchmark:<14} {format_bytes(row.size_bytes):>8} {row.variant:<32} "
            f"{row.seconds:>8.5f} {row.reference:<44} "
            f"{statistics.median(row.reference_samples):>8.5f} {row.ratio:>7.3f}"
        )
    for held in record.memory:
        print(
            f"{held.benchmark:<14} {format_bytes(held.size_bytes):>8} {held.variant:<58} "
            f"{format_bytes(held.held_bytes):>10}"
        )
    for claim in record.claims:
        verdict = "holds" if claim.holds else "does NOT hold"
        print(f"{claim.text}: {claim.measured:.3g} against {claim.limit:.3g}, {verdict}")
    for line in record.skipped:
        print(f"skipped: {line}")


def format_bytes(number_of_bytes: int) -> str:
    """Return bytes as MiB or GiB; a dash for none of a model."""
    if number_of_bytes >= 1 << 30:
        return f"{number_of_bytes / (1 << 30):.2f} GiB"
    return f"{number_of_bytes / (1 << 20):.1f} MiB"


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "benchmark": row.benchmark,
        "variant": row.variant,
        "sizeBytes": row.size_bytes,
        "seconds": round(row.seconds, 6),
        "reference": row.reference,
        "referenceSeconds": round(statistics.median(row.reference_samples), 6),
        "ratio": round(row.ratio, 3),
        "samples": [round(sample, 6) for sample in row.samples],
        "referenceSamples": [round(sample, 6) for sample in row.reference_samples],
    }


def _held_as_json(held: Held) -> dict[str, Any]:
    return {
        "benchmark": held.benchmark,
        "variant": held.variant,
        "sizeBytes": held.size_bytes,
        "heldBytes": held.held_bytes,
        "samplesBytes": held.samples_bytes,
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
        "hugePages": _read_huge_pages(),
        "loadAverage": round(os.getloadavg()[0], 2),
        "device": "CPU",
    }


def _read_huge_pages() -> str:
    """Return the kernel's choice for anonymous memory: always, madvise or never."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, ONNX_GPU):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
