"""Reads what a request brings, never more than the limit, and says what is wrong with it.

Why it exists: limits, headers and model names are checked in one way by every API. Called by the
handlers; decides nothing about models.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import TypeVar

import msgspec
from aiohttp import HttpVersion11, hdrs, web

from vram_agent.backend import TaskKind
from vram_agent.errors import AgentError, BadInputError, TooLargeError
from vram_agent.protocol import format_quantity
from vram_agent.serving.answers import error_answer
from vram_agent.serving.api_keys import ensure_admitted
from vram_agent.serving.base import ModelServer, ModelView
from vram_agent.serving.context import LIMITS, MODEL, SERVER

STALL_SECONDS = 60.0
"""A client that neither sends nor takes a byte for so long is given up: it would hold a place."""
KEEP_ALIVE_HEADER = "X-Vram-Keep-Alive"

T = TypeVar("T")


class StalledError(AgentError):
    """The client began a request and stopped sending it."""

    status = 408
    code = "request_timeout"


@contextlib.asynccontextmanager
async def expect_more() -> AsyncIterator[None]:
    """Bound the wait for the next piece of a body. Raises StalledError."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            yield
    except TimeoutError:
        raise StalledError(
            f"nothing more of the request came for {STALL_SECONDS:g} seconds"
        ) from None


def ensure_size(number_of_bytes: int | None, limit_bytes: int) -> None:
    """Raise TooLargeError where a body, announced or received, is beyond the limit."""
    if number_of_bytes is not None and number_of_bytes > limit_bytes:
        raise TooLargeError(f"the request is larger than {format_quantity(limit_bytes)} bytes")


async def refuse_large_before_continue(request: web.Request) -> web.StreamResponse | None:
    """Answer ``Expect: 100-continue``: 401 or 413 before the client sends what would be refused."""
    if request.version != HttpVersion11:
        return None
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        return error_answer(request.path, BadInputError("Expect: only 100-continue is known"))
    try:
        ensure_admitted(request)
        ensure_size(request.content_length, request.app[LIMITS].request_bytes)
    except AgentError as error:
        return error_answer(request.path, error)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # as aiohttp's own handler: the interim answer is not counted
    return None


async def read_body(request: web.Request, limit_bytes: int) -> bytes:
    """Return the whole body.

    Raises TooLargeError as soon as it is known to be too large, and StalledError.
    """
    body = bytearray()
    async for chunk in read_chunks(request, limit_bytes):
        body += chunk
    return bytes(body)


async def read_chunks(request: web.Request, limit_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body as it comes in. Raises as ``read_body``."""
    ensure_size(request.content_length, limit_bytes)
    received = 0
    content = request.content
    while True:
        if content.is_eof():  # all has come in: no wait to bound
            chunk = await content.readany()
        else:
            async with expect_more():
                chunk = await content.readany()
        if not chunk:
            return
        received += len(chunk)
        ensure_size(received, limit_bytes)
        yield chunk


def decode_json(body: bytes | memoryview, kind: type[T]) -> T:
    """Return the body as ``kind``. Raises BadInputError that names the place of the fault."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"the body is not what this call takes: {error}") from error


def keep_alive_seconds(request: web.Request) -> float | None:
    """Return the request's override of afterTask; None where the client gives none."""
    text = request.headers.get(KEEP_ALIVE_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if math.isfinite(seconds) and (seconds >= 0 or seconds == -1):
        return seconds
    raise BadInputError(
        f"{KEEP_ALIVE_HEADER}: {text[:40]!r} is neither seconds (0 or more) nor -1 (keep)",
        param=KEEP_ALIVE_HEADER,
    )


def requested_model(request: web.Request, name: str) -> ModelView:
    """Return the model a request names and note it for the metrics. Raises NoSuchModelError."""
    view = request.app[SERVER].model(name)
    request[MODEL] = view.spec.name
    return view


def ensure_offered(server: ModelServer, view: ModelView, kind: TaskKind) -> None:
    """Raise BadInputError where a model is known not to do such tasks, naming those that do.

    A model that was never loaded is not refused: what it does is known after its first load.
    """
    if view.loaded is None or kind in view.loaded.tasks:
        return
    able = [v.spec.name for v in server.models() if v.loaded and kind in v.loaded.tasks]
    verb = "speak" if kind is TaskKind.SPEECH else kind.value
    raise BadInputError(
        f"model {view.spec.name} cannot {verb}; models that can: {', '.join(able) or 'none'}",
        param="model",
    )
