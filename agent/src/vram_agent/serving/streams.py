"""Sends bodies piece by piece, as fast as the client takes them.

Why it exists: tensors and audio lie in mapped files, and a copy of them for the answer would be in
this process's memory. Called by handlers once all that can fail has been done: an answer whose head
is sent can become no error any more. It knows no API.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

_WRITE_BYTES = 256 * 1024


async def send_parts(
    request: web.Request, answer: web.StreamResponse, parts: Iterable[bytes | memoryview]
) -> web.StreamResponse:
    """Send the head and the parts; each waits until the client has taken most of the one before.

    Raises ConnectionResetError where the client went away.
    """
    await answer.prepare(request)
    for part in parts:
        for offset in range(0, len(part), _WRITE_BYTES):
            await answer.write(part[offset : offset + _WRITE_BYTES])
    await answer.write_eof()
    return answer


async def send_events(request: web.Request, events: Iterable[Any]) -> web.StreamResponse:
    """Send server-sent events with JSON data, as the OpenAI API has them: without names."""
    answer = web.StreamResponse(
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect them
    )
    answer.content_type = "text/event-stream"
    answer.charset = "utf-8"
    return await send_parts(
        request, answer, (b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events)
    )
