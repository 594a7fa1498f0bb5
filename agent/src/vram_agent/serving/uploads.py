"""Receives what is large, a form with one file or a body of tensors, without holding it in memory.

Why it exists: ``aiohttp`` offers a body that is read whole, and recordings and tensors are large.
Called by the OpenAI and OIP handlers. It knows no field names, no audio and no tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import BinaryIO

from aiohttp import BodyPartReader, web

from vram_agent.errors import BadInputError
from vram_agent.serving.context import LIMITS
from vram_agent.serving.requests import ensure_size, expect_more, read_chunks
from vram_agent.serving.scratch import close_scratch, map_scratch, open_scratch, write_scratch

_FILE = "file"
_MAX_PARTS = 64
_MAX_TEXT_BYTES = 64 * 1024
_WRITE_BYTES = 1024 * 1024
_CHUNK_BYTES = 64 * 1024


@dataclass(slots=True)
class Form:
    """The fields in the order they came, and the file, which is None where there was none."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    file: BinaryIO | None = None


@contextlib.asynccontextmanager
async def receive_form(request: web.Request) -> AsyncIterator[Form]:
    """Yield the form of a request; its file is gone afterwards.

    Raises TooLargeError as soon as the announced or received size is beyond the limit, and
    BadInputError where the body is no form.
    """
    ensure_size(request.content_length, request.app[LIMITS].request_bytes)
    if request.content_type != "multipart/form-data":
        raise BadInputError("send the form as multipart/form-data")
    form = Form()
    try:
        await _receive(request, form)
        yield form
    finally:
        if form.file is not None:
            close_scratch(form.file)


async def receive_body(request: web.Request, limit_bytes: int) -> memoryview:
    """Return the body; one that is large lies in an unlinked temporary file, which is mapped.

    The file is gone with the last view of it. Raises TooLargeError as soon as the announced or
    received size is beyond the limit, and StalledError.
    """
    waiting = bytearray()
    scratch: BinaryIO | None = None
    try:
        async for chunk in read_chunks(request, limit_bytes):
            waiting += chunk
            if len(waiting) >= _WRITE_BYTES:
                scratch = scratch or open_scratch()
                await _write(scratch, bytes(waiting))
                waiting.clear()
        if scratch is None:
            return memoryview(bytes(waiting))
        await _write(scratch, bytes(waiting))
        return map_scratch(scratch)
    finally:
        if scratch is not None:
            close_scratch(scratch)


async def _receive(request: web.Request, form: Form) -> None:
    try:
        reader = await request.multipart()
        for _ in range(_MAX_PARTS):
            async with expect_more():
                part = await reader.next()
            if part is None:
                return
            if not isinstance(part, BodyPartReader) or part.name is None:
                raise BadInputError("every part of the form needs a name, and none may be nested")
            await _receive_part(request, form, part)
    except (ValueError, AssertionError) as error:  # what aiohttp's parser raises
        raise BadInputError(f"the form is malformed: {str(error)[:200]}") from error
    raise BadInputError(f"the form has more than {_MAX_PARTS} parts")


async def _receive_part(request: web.Request, form: Form, part: BodyPartReader) -> None:
    if part.name != _FILE:
        text = await _receive_text(request, part)
        form.fields.setdefault(str(part.name), []).append(text)
    elif form.file is not None:
        raise BadInputError("the form has more than one file", param=_FILE)
    else:
        form.file = open_scratch()
        await _receive_file(request, part, form.file)


async def _receive_text(request: web.Request, part: BodyPartReader) -> str:
    text = bytearray()
    async for chunk in _chunks(request, part):
        text += chunk
        if len(text) > _MAX_TEXT_BYTES:
            raise BadInputError(
                f"the field is longer than {_MAX_TEXT_BYTES} bytes", param=part.name
            )
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadInputError("the field is no UTF-8 text", param=part.name) from error


async def _receive_file(request: web.Request, part: BodyPartReader, file: BinaryIO) -> None:
    waiting = bytearray()
    async for chunk in _chunks(request, part):
        waiting += chunk
        if len(waiting) >= _WRITE_BYTES:
            await _write(file, bytes(waiting))
            waiting.clear()
    await _write(file, bytes(waiting))


async def _chunks(request: web.Request, part: BodyPartReader) -> AsyncIterator[bytes]:
    """Yield a part's data, checking the size of the whole body as it comes in."""
    while True:
        async with expect_more():
            chunk = await part.read_chunk(_CHUNK_BYTES)
        if not chunk:
            return
        ensure_size(request.content.total_bytes, request.app[LIMITS].request_bytes)
        yield bytes(chunk)


async def _write(file: BinaryIO, data: bytes) -> None:
    """Write off the event loop. A cancelled call waits for the write: the file is closed next."""
    writing = asyncio.ensure_future(asyncio.to_thread(write_scratch, file, data))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise
