"""What the demo prints: steps with their times, progress, and tables of bytes.

Called by the steps; knows nothing of clusters.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from vram_agent.protocol import Report

TICK_SECONDS = 10.0


class StepFailedError(Exception):
    """A step of the demo did not happen; the message says what was expected and what was seen."""


class Step:
    """One step: a headline, what is noticed during it, and how long it took.

    A step that is silent for ten seconds says that it is still at work.
    """

    def __init__(self, number: int, title: str) -> None:
        self._number = number
        self._title = title
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        print(f"\n[{self._number}] {self._title}", flush=True)
        self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._ticker.join()
        verdict = "done" if kind is None else "FAILED"
        self.say(f"{verdict} in {time.monotonic() - self._started:.1f} s")

    def say(self, text: str) -> None:
        """Print one line of what happens."""
        print(f"    {text}", flush=True)

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self.say(f"… {time.monotonic() - self._started:.0f} s")


class Steps:
    """Numbers the steps and remembers how long each took."""

    def __init__(self) -> None:
        self._times: list[tuple[str, float]] = []

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run one step; its time goes into the summary also when it fails."""
        started = time.monotonic()
        try:
            with Step(len(self._times) + 1, title) as step:
                yield step
        finally:
            self._times.append((title, time.monotonic() - started))

    def summary(self) -> str:
        """Return the table of all steps and their seconds."""
        return table(
            ("step", "seconds"), [(title, f"{seconds:.1f}") for title, seconds in self._times]
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a head, in aligned columns, indented like a step's lines."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def mebibytes(number_of_bytes: int) -> str:
    """Return bytes as MiB with one decimal."""
    return f"{number_of_bytes / 1024**2:.1f} MiB"


class BytesTable:
    """One row for each moment of the demo: what the pod's report said then."""

    HEAD = ("moment", "device used", "models", "residual", "host", "states")

    def __init__(self) -> None:
        self._rows: list[tuple[str, ...]] = []

    def add(self, moment: str, report: Report) -> None:
        """Add a row and print the table so far."""
        memory = report.memory
        states = ", ".join(f"{model.name} {model.state}/{model.tier}" for model in report.models)
        self._rows.append(
            (
                moment,
                mebibytes(memory.used_bytes),
                mebibytes(memory.model_bytes),
                mebibytes(memory.residual_bytes),
                mebibytes(memory.host_bytes),
                states,
            )
        )
        print(table(self.HEAD, self._rows), flush=True)


def complain(text: str) -> None:
    """Print an error for a person."""
    print(f"\ndemo: {text}", file=sys.stderr, flush=True)
