"""Bytes and moments as people and the API read them. Pure; called by everything that reports."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from vram_agent.protocol import format_quantity

GIB = 1024**3
MIB = 1024**2
QUANTUM_BYTES = 256 * MIB
"""Sums in a status are rounded to this."""
NAMED = 3
"""A message names so many pods or restarts, and counts the others."""


def show_bytes(number_of_bytes: int) -> str:
    """Return bytes for a sentence, with one decimal at most: ``9.1Gi``, ``512Mi``, ``0``."""
    for suffix, unit in (("Gi", GIB), ("Mi", MIB), ("Ki", 1024)):
        if number_of_bytes >= unit:
            return f"{number_of_bytes / unit:.1f}".removesuffix(".0") + suffix
    return str(number_of_bytes)


def show_time(moment: datetime) -> str:
    """Return a moment for a sentence: ``2026-11-24T19:00:00Z``."""
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def round_quantity(number_of_bytes: int) -> str:
    """Return bytes as a quantity, rounded to the nearest 256Mi."""
    return format_quantity((number_of_bytes + QUANTUM_BYTES // 2) // QUANTUM_BYTES * QUANTUM_BYTES)


def whole_mebibytes(number_of_bytes: int) -> str:
    """Return bytes as a quantity that a person can read: from 1Mi on in whole Mi."""
    if number_of_bytes < MIB:
        return format_quantity(number_of_bytes)
    return format_quantity((number_of_bytes + MIB // 2) // MIB * MIB)


def whole_seconds(moment: datetime) -> datetime:
    """Return the moment as the API stores it: in whole seconds."""
    return moment.replace(microsecond=0)


def show_span(span: timedelta) -> str:
    """Return a span of time for a sentence, in its two largest units: ``3 h 10 min``, ``45 s``."""
    seconds = round(span.total_seconds())
    parts = [
        f"{amount} {unit}"
        for unit, amount in (
            ("d", seconds // 86_400),
            ("h", seconds // 3600 % 24),
            ("min", seconds // 60 % 60),
            ("s", seconds % 60),
        )
        if amount
    ]
    return " ".join(parts[:2]) or "0 s"


def say_jitter(late: timedelta) -> str:
    """Return what follows a time of the schedule whose start is spread; empty for none."""
    return f", {show_span(late)} later by --schedule-jitter" if late else ""


def name_some(names: Sequence[str]) -> str:
    """Return names for a sentence: the first three, and how many more."""
    some = sorted(names)
    more = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
    return ", ".join(some[:NAMED]) + more
