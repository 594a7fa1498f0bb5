"""The OpenAI API's text to speech: ``POST /v1/audio/speech``.

Why it exists: applications that speak it need no change. It parses and sends; queueing, loading and
VRAM are the supervisor's, formats ``encoder.py``'s. What a runtime gets is a Task of kind SPEECH
with the parameters ``input`` (text) and, where the client gave them, ``voice`` (text),
``instructions`` (text) and ``speed`` (0.25 to 4). It gives the tensor ``audio`` and the value
``rate`` (hertz), whole or in parts; parts are sent as they come.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
import structlog
from aiohttp import web
from msgspec import Meta

from vram_agent.backend import Task, TaskKind, TaskPart, TaskResult
from vram_agent.errors import AgentError
from vram_agent.serving.context import ENCODER, PLACES, SERVER
from vram_agent.serving.encoder import CONTENT_TYPES, Speech, SpeechFormat, read_speech
from vram_agent.serving.pieces import Pieces, run_in_pieces
from vram_agent.serving.requests import (
    decode_json,
    ensure_offered,
    keep_alive_seconds,
    read_body,
    refuse_large_before_continue,
    requested_model,
)
from vram_agent.serving.streams import send_parts

API_NAMES = {"/v1/audio/speech": "speech"}
MAX_INPUT_CHARACTERS = 4096
_MAX_BODY_BYTES = 256 * 1024
_log = structlog.get_logger(__name__)
_Text = Annotated[str, Meta(max_length=MAX_INPUT_CHARACTERS)]


class CustomVoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The other form of ``voice``."""

    id: _Text


class SpeechRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/audio/speech``."""

    model: str
    input: Annotated[str, Meta(min_length=1, max_length=MAX_INPUT_CHARACTERS)]
    voice: _Text | CustomVoice | None = None
    instructions: _Text | None = None
    response_format: SpeechFormat = SpeechFormat.MP3
    speed: Annotated[float, Meta(ge=0.25, le=4.0)] | None = None
    stream_format: Literal["audio"] = "audio"

    def as_task(self) -> Task:
        """Return the task, with what the client gave and nothing else."""
        voice = self.voice.id if isinstance(self.voice, CustomVoice) else self.voice
        given: dict[str, Any] = {
            "input": self.input,
            "voice": voice,
            "instructions": self.instructions,
            "speed": self.speed,
        }
        return Task(
            kind=TaskKind.SPEECH,
            parameters={name: value for name, value in given.items() if value is not None},
        )


def add_routes(app: web.Application) -> None:
    """Route the call."""
    app.router.add_post("/v1/audio/speech", speak, expect_handler=refuse_large_before_continue)


async def speak(request: web.Request) -> web.StreamResponse:
    """``POST /v1/audio/speech``."""
    with request.app[SERVER].admit(), request.app[PLACES].take():
        return await _speak(request)


async def _speak(request: web.Request) -> web.StreamResponse:
    keep_alive = keep_alive_seconds(request)
    question = decode_json(await read_body(request, _MAX_BODY_BYTES), SpeechRequest)
    view = requested_model(request, question.model)
    ensure_offered(request.app[SERVER], view, TaskKind.SPEECH)
    encoder = request.app[ENCODER]
    await encoder.ensure_offered(question.response_format)
    name = view.spec.name
    answer = web.StreamResponse()
    answer.content_type = CONTENT_TYPES[question.response_format]
    async with run_in_pieces(request.app[SERVER], name, question.as_task(), keep_alive) as pieces:
        first = await anext(pieces)
        if isinstance(first, TaskResult):
            spoken = await encoder.encode(read_speech(name, first), question.response_format)
            answer.content_length = spoken.nbytes
            return await send_parts(request, answer, (spoken,))
        speech = _spoken(name, first, pieces)
        encoding = encoder.encode_stream(speech, question.response_format)
        async with contextlib.aclosing(encoding) as encoded:
            return await _send_stream(request, answer, await anext(encoded), encoded)


async def _spoken(model: str, first: TaskPart, rest: Pieces) -> AsyncGenerator[Speech, None]:
    """Yield the speech of each part. Raises TaskFailedError where one is no mono audio."""
    piece: TaskPart | TaskResult = first
    while isinstance(piece, TaskPart):
        yield read_speech(model, piece)
        piece = await anext(rest)


async def _send_stream(
    request: web.Request, answer: web.StreamResponse, first: bytes, rest: AsyncIterator[bytes]
) -> web.StreamResponse:
    """Send audio as it comes. Audio has no place for an error: the body then ends too early."""

    async def parts() -> AsyncIterator[bytes]:
        yield first
        async for part in rest:
            yield part

    try:
        return await send_parts(request, answer, parts())
    except AgentError as error:
        _log.warning("stream failed", error=error.message, code=error.code)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the speech ended with an error") from error
