"""The text of a recording as openai-whisper decodes it, window by window.

Why it exists: ``whisper.transcribe`` returns once the whole recording is done, and has no callback.
It moves a progress bar after each window (whisper/transcribe.py:510 of v20250625), by when the
window's segments are in its list ``all_segments``; so this stands in for the bar. Should a later
version name its list otherwise, the text comes whole at the end, and its test fails.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any, Self

from vram_agent.backend import TaskPart
from vram_agent.runtimes.base import Emit

# The package has a function of the module's name.
_transcribe: Any = importlib.import_module("whisper.transcribe")


class _Bar:
    """What ``tqdm.tqdm`` makes, as far as ``transcribe`` uses it."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _frames: int) -> None:
        """A window is done: give the text of its segments away."""
        caller: FrameType | None = sys._getframe().f_back  # noqa: SLF001 - there is no callback
        segments: list[Any] = caller.f_locals.get("all_segments", []) if caller else []
        text = "".join(segment["text"] for segment in segments[self._seen :])
        self._seen = len(segments)
        if text:
            self._emit(TaskPart(values={"text": text}))


@contextmanager
def each_window(emit: Emit) -> Iterator[None]:
    """Have the text of each window emitted inside of the block. For one thread at a time."""
    original = _transcribe.tqdm
    _transcribe.tqdm = SimpleNamespace(tqdm=lambda **_: _Bar(emit))
    try:
        yield
    finally:
        _transcribe.tqdm = original
