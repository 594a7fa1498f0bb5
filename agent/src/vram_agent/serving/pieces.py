"""A task's parts and result as one stream, from its first piece to its end or its error.

Why it exists: handlers of streams wait for the first piece before they send a head, since an error
that comes earlier is an answer with a status. Called by ``openai.py`` and ``speech.py``. It knows
no format.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vram_agent.backend import Task, TaskPart, TaskResult
from vram_agent.parts import Parts
from vram_agent.serving.base import ModelServer

Pieces = AsyncIterator[TaskPart | TaskResult]
"""Any number of parts, then the result; raises the types of errors.py at any place."""


@contextlib.asynccontextmanager
async def run_in_pieces(
    server: ModelServer, model: str, task: Task, keep_alive_seconds: float | None
) -> AsyncIterator[Pieces]:
    """Yield the pieces of a task; leaving the block before their end gives the task up.

    To be called within ``server.admit``.
    """
    parts = Parts()
    answer = asyncio.ensure_future(
        server.submit(
            model, task, keep_alive_seconds=keep_alive_seconds, is_admitted=True, parts=parts
        )
    )
    answer.add_done_callback(lambda _: parts.end())
    try:
        yield _pieces(parts, answer)
    finally:
        parts.abandon()
        answer.cancel()
        # An error that nobody read any more, or the cancellation itself.
        await asyncio.gather(answer, return_exceptions=True)


async def _pieces(parts: Parts, answer: asyncio.Future[TaskResult]) -> Pieces:
    while (part := await parts.take()) is not None:
        yield part
    yield await answer
