"""How far a load has come, told while it runs.

Why it exists: a load takes seconds to minutes, in code that knows its bytes (engine/, devices/) and
nothing of who waits. Whoever makes a load happen measures it (``measuring``, in processes/); the
code that moves bytes says what it does (``step``) and how much is done (``advance``). Outside of
``measuring`` both do nothing, and so in other threads, which have a context of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vram_agent.protocol import LoadProgress, LoadStep

INTERVAL_SECONDS = 0.1
CHUNK_BYTES = 64 << 20
"""What a long copy does in one go, so that there is something to tell."""


class _Stage:
    def __init__(self, step: LoadStep, total_bytes: int | None) -> None:
        self.step = step
        self.total_bytes = total_bytes
        self.done_bytes = None if total_bytes is None else 0
        self.told: LoadProgress | None = None

    def as_progress(self) -> LoadProgress:
        return LoadProgress(
            step=self.step, done_bytes=self.done_bytes, total_bytes=self.total_bytes
        )


class _Meter:
    """The steps that are under way, the innermost last. Tells a new step at once, bytes rarely."""

    def __init__(self, tell: Callable[[LoadProgress], None], clock: Callable[[], float]) -> None:
        self._tell = tell
        self._clock = clock
        self._stages: list[_Stage] = []
        self._told_at = 0.0

    def begin(self, step: LoadStep, total_bytes: int | None) -> None:
        self._stages.append(_Stage(step, total_bytes))
        self._say()

    def advance(self, nbytes: int) -> None:
        if not self._stages:
            return
        stage = self._stages[-1]
        stage.done_bytes = (stage.done_bytes or 0) + nbytes
        if self._clock() - self._told_at >= INTERVAL_SECONDS:
            self._say()

    def end(self) -> None:
        self._say()
        ended = self._stages.pop()
        if not self._stages:
            return
        outer = self._stages[-1]
        if outer.step is ended.step and outer.total_bytes is None and ended.done_bytes:
            # A library's loader that reads several files: how many is not known, what was read is.
            outer.done_bytes = (outer.done_bytes or 0) + ended.done_bytes
        self._say()

    def _say(self) -> None:
        stage = self._stages[-1]
        progress = stage.as_progress()
        if progress != stage.told:
            stage.told = progress
            self._told_at = self._clock()
            self._tell(progress)


_current: ContextVar[_Meter | None] = ContextVar("vram_agent_progress", default=None)


@contextmanager
def measuring(
    tell: Callable[[LoadProgress], None], clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Have the steps inside of the block told: each new one at once, bytes ten times a second."""
    token = _current.set(_Meter(tell, clock))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def step(kind: LoadStep, total_bytes: int | None = None) -> Iterator[None]:
    """Say what is being done inside of the block; ``total_bytes`` where it is known beforehand."""
    meter = _current.get()
    if meter is None:
        yield
        return
    meter.begin(kind, total_bytes)
    try:
        yield
    finally:
        meter.end()


def advance(nbytes: int) -> None:
    """Say that so many more bytes of the innermost step are done."""
    meter = _current.get()
    if meter is not None:
        meter.advance(nbytes)
