"""What a user's method gives, as results: values, or pieces from a generator, async or not.

Why it exists: models of streaming libraries yield audio and text as they make them. Called by
python.py in the GPU process, which has no event loop of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import numpy as np

from vram_agent.backend import TaskPart, TaskResult
from vram_agent.runtimes.arrays import as_tensor
from vram_agent.runtimes.base import Emit

_END = object()


def is_generator(found: object) -> bool:
    """Whether a method gave pieces one by one."""
    return isinstance(found, Iterator | AsyncIterator)


def one_by_one(found: Any) -> Generator[Any, None, None]:
    """Yield what a generator yields; closing this closes it."""
    if isinstance(found, Iterator):
        yield from found
        return
    # The runner closes async generators that were not read to their end.
    with asyncio.Runner() as runner:
        while (piece := runner.run(_next(found))) is not _END:
            yield piece


async def _next(found: AsyncIterator[Any]) -> Any:
    return await anext(found, _END)


def read_speech(found: Any, emit: Emit | None) -> TaskResult:
    """Return what a method ``speech`` gave; with ``emit``, give its pieces away instead.

    1. Samples and their rate. 2. A generator of samples, and the rate. 3. A generator of both.
    """
    if is_generator(found):
        pieces = one_by_one(found)  # 3
    else:
        samples, rate_hertz = found
        if not is_generator(samples):  # 1
            return _as_result(int(rate_hertz), samples)
        pieces = _with_rate(samples, int(rate_hertz))  # 2
    rate = 0
    kept: list[Any] = []
    with contextlib.closing(pieces):
        for piece, piece_rate in pieces:
            rate = int(piece_rate)
            chunk = np.atleast_1d(np.asarray(piece))
            if emit is None:
                kept.append(chunk)
            elif chunk.size:
                emit(TaskPart(values={"rate": rate}, tensors=[as_tensor("audio", chunk)]))
    if emit is not None:
        return TaskResult(values={"rate": rate})
    return _as_result(rate, np.concatenate(kept))


def _with_rate(samples: Any, rate_hertz: int) -> Generator[Any, None, None]:
    for piece in one_by_one(samples):
        yield piece, rate_hertz


def _as_result(rate_hertz: int, samples: Any) -> TaskResult:
    return TaskResult(values={"rate": rate_hertz}, tensors=[as_tensor("audio", samples)])


def read_transcript(found: Any, emit: Emit | None) -> dict[str, Any]:
    """Return the values of a transcription: of a text, a dict, or pieces of text one by one."""
    if is_generator(found):
        found = _join(found, emit)
    values = {"text": found} if isinstance(found, str) else dict(found)
    values["segments"] = list(values.get("segments") or ())
    return values


def _join(found: Any, emit: Emit | None) -> str:
    pieces: list[str] = []
    with contextlib.closing(one_by_one(found)) as texts:
        for text in texts:
            pieces.append(text)
            if emit is not None:
                emit(TaskPart(values={"text": text}))
    return "".join(pieces)
