"""Sends bodies piece by piece, as fast as the client takes them.

Why it exists: tensors and audio lie in mapped files, and a copy of them for the answer would be in
this process's memory. Called by handlers once all that can fail has been done: an answer whose head
is sent can become no error any more; what fails after it is the stream's own affair. It knows no
API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

import msgspec
from aiohttp import web

from vram_agent.serving.context import SERVER
from vram_agent.serving.requests import STALL_SECONDS

_WRITE_BYTES = 64 * 1024  # a player that takes its audio as it sounds needs a minute for no piece


async def send_parts(
    request: web.Request,
    answer: web.StreamResponse,
    parts: Iterable[bytes | memoryview] | AsyncIterable[bytes | memoryview],
) -> web.StreamResponse:
    """Send the head and the parts, as they come.

    Each waits until the client has taken most of the one before.

    Raises ConnectionResetError where the client went away, or takes nothing for STALL_SECONDS.
    """
    if not request.app[SERVER].is_ready():
        answer.force_close()  # as the middleware does with answers that are sent at once
    await answer.prepare(request)
    async for part in _each(parts):
        for offset in range(0, len(part), _WRITE_BYTES):
            await _write(request, answer, part[offset : offset + _WRITE_BYTES])
    await answer.write_eof()
    return answer


async def _each(
    parts: Iterable[bytes | memoryview] | AsyncIterable[bytes | memoryview],
) -> AsyncIterator[bytes | memoryview]:
    if isinstance(parts, AsyncIterable):
        async for part in parts:
            yield part
        return
    for one in parts:
        yield one


async def _write(
    request: web.Request, answer: web.StreamResponse, piece: bytes | memoryview
) -> None:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            await answer.write(piece)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not take its answer") from None


async def send_events(request: web.Request, events: AsyncIterable[Any]) -> web.StreamResponse:
    """Send server-sent events with JSON data, as the OpenAI API has them: without names."""
    answer = web.StreamResponse(
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect them
    )
    answer.content_type = "text/event-stream"
    answer.charset = "utf-8"
    return await send_parts(request, answer, _encoded(events))


async def _encoded(events: AsyncIterable[Any]) -> AsyncIterator[bytes]:
    async for event in events:
        yield b"data: " + msgspec.json.encode(event) + b"\n\n"
