"""The OpenAI API on the serving port: models, transcriptions, translations.

Why it exists: applications that speak it need no change; ``speech.py`` is its other half. It parses
and renders; queueing, loading and VRAM are the supervisor's, behind ``ModelServer.submit``. What a
runtime gets is a Task of kind TRANSCRIBE or TRANSLATE with the tensor ``audio`` and, where the
client gave them, the parameters ``language`` (text), ``prompt`` (text), ``temperature`` (0 to 1)
and ``word_timestamps`` (true: each segment gets ``words``, a list of {word, start, end}).

A stream has a delta for each part that the runtime gives, as it comes: Whisper one for each window
of 30 s. Of runtimes that give results whole it has one for each segment, once the task is done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import structlog
from aiohttp import web

from vram_agent.backend import Task, TaskKind, TaskPart, TaskResult, Tensor
from vram_agent.errors import AgentError, BadInputError
from vram_agent.serving import transcripts
from vram_agent.serving.answers import json_answer, openai_error
from vram_agent.serving.audio import SAMPLE_RATE_HZ
from vram_agent.serving.base import ModelView
from vram_agent.serving.context import DECODER, PLACES, SERVER, STARTED_AT
from vram_agent.serving.pieces import Pieces, run_in_pieces
from vram_agent.serving.requests import (
    ensure_offered,
    keep_alive_seconds,
    refuse_large_before_continue,
    requested_model,
)
from vram_agent.serving.streams import send_events
from vram_agent.serving.transcripts import Format, Granularity
from vram_agent.serving.uploads import Form, receive_form

API_NAMES = {
    "/v1/models": "models",
    "/v1/models/{m}": "models",
    "/v1/audio/transcriptions": "transcriptions",
    "/v1/audio/translations": "translations",
}
_GRANULARITIES = "timestamp_granularities[]"
_FIELDS = (
    "file",
    "model",
    "language",
    "prompt",
    "response_format",
    "temperature",
    _GRANULARITIES,
    "stream",
)
_TASK_WORDS = {TaskKind.TRANSCRIBE: "transcribe", TaskKind.TRANSLATE: "translate"}
_MAX_LANGUAGE_CHARACTERS = 32
_log = structlog.get_logger(__name__)

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a client wants of a recording; every field is valid."""

    model: str
    format: Format = Format.JSON
    is_stream: bool = False
    granularities: tuple[Granularity, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


def add_routes(app: web.Application) -> None:
    """Route the OpenAI calls."""
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{m}", get_model)
    uploads = {
        "/v1/audio/transcriptions": transcribe,
        "/v1/audio/translations": translate,
    }
    for path, handler in uploads.items():
        app.router.add_post(path, handler, expect_handler=refuse_large_before_continue)


async def list_models(request: web.Request) -> web.Response:
    """``GET /v1/models``."""
    models = request.app[SERVER].models()
    return json_answer({"object": "list", "data": [_model(request, view) for view in models]})


async def get_model(request: web.Request) -> web.Response:
    """``GET /v1/models/{m}``."""
    return json_answer(_model(request, requested_model(request, request.match_info["m"])))


async def transcribe(request: web.Request) -> web.StreamResponse:
    """``POST /v1/audio/transcriptions``."""
    with request.app[SERVER].admit(), request.app[PLACES].take():
        return await _answer(request, TaskKind.TRANSCRIBE)


async def translate(request: web.Request) -> web.StreamResponse:
    """``POST /v1/audio/translations``: into English."""
    with request.app[SERVER].admit(), request.app[PLACES].take():
        return await _answer(request, TaskKind.TRANSLATE)


async def _answer(request: web.Request, kind: TaskKind) -> web.StreamResponse:
    """The upload is gone before the task waits in the queue; its samples go with the task."""
    keep_alive = keep_alive_seconds(request)
    async with receive_form(request) as form:
        question = parse_question(form, kind)
        view = requested_model(request, question.model)
        ensure_offered(request.app[SERVER], view, kind)
        if form.file is None:
            raise BadInputError("the form has no file", param="file")
        audio = await request.app[DECODER].decode(form.file)
    task = Task(kind=kind, parameters=question.parameters, tensors=(audio,))
    server = request.app[SERVER]
    if question.is_stream:
        async with run_in_pieces(server, view.spec.name, task, keep_alive) as pieces:
            # Until here an error is an answer with its status.
            first = await anext(pieces)
            return await send_events(request, _to_events(first, pieces))
    result = await server.submit(
        view.spec.name, task, keep_alive_seconds=keep_alive, is_admitted=True
    )
    return _render(_timed(result, audio), kind, question)


async def _to_events(first: TaskPart | TaskResult, rest: Pieces) -> AsyncIterator[dict[str, Any]]:
    """Yield the events; the last is ``transcript.text.done``, or the error that came instead."""
    deltas = transcripts.Deltas()
    try:
        piece = first
        while isinstance(piece, TaskPart):
            for event in deltas.of_part(str(piece.values.get("text", ""))):
                yield event
            piece = await anext(rest)
        for event in deltas.of_result(piece.values):
            yield event
    except AgentError as error:
        _log.warning("stream failed", error=error.message, code=error.code)
        yield {"type": "error", **openai_error(error)}
    except Exception:  # the head is sent: nobody else can answer any more
        _log.exception("stream failed")
        hidden = AgentError("internal error; the agent's log says more")
        yield {"type": "error", **openai_error(hidden)}


def parse_question(form: Form, kind: TaskKind) -> Question:
    """Return what the form asks for. Raises BadInputError that names field and allowed values."""
    for name in form.fields:
        if name not in _FIELDS:
            raise BadInputError(
                f"unknown field {name[:64]!r}; known are {', '.join(_FIELDS)}", param=name[:64]
            )
    model = _single(form, "model")
    if not model:
        raise BadInputError("the form names no model", param="model")
    response_format = _choice(Format, "response_format", _single(form, "response_format") or "json")
    granularities = tuple(
        _choice(Granularity, _GRANULARITIES, value) for value in form.fields.get(_GRANULARITIES, ())
    )
    if granularities and response_format is not Format.VERBOSE_JSON:
        raise BadInputError(
            f"{_GRANULARITIES} needs response_format=verbose_json", param=_GRANULARITIES
        )
    is_stream = _flag("stream", _single(form, "stream"))
    if is_stream and kind is not TaskKind.TRANSCRIBE:
        raise BadInputError("only transcriptions stream; leave stream out", param="stream")
    if is_stream and response_format is not Format.JSON:
        raise BadInputError("stream needs response_format=json", param="stream")
    return Question(
        model=model,
        format=response_format,
        is_stream=is_stream,
        granularities=granularities,
        parameters=_parameters(form, granularities),
    )


def _parameters(form: Form, granularities: tuple[Granularity, ...]) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    if language := _single(form, "language"):
        if len(language) > _MAX_LANGUAGE_CHARACTERS:
            raise BadInputError("language is a code such as en, or a name", param="language")
        parameters["language"] = language
    if prompt := _single(form, "prompt"):
        parameters["prompt"] = prompt
    if temperature := _single(form, "temperature"):
        parameters["temperature"] = _temperature(temperature)
    if Granularity.WORD in granularities:
        parameters["word_timestamps"] = True
    return parameters


def _single(form: Form, name: str) -> str | None:
    values = form.fields.get(name, [])
    if len(values) > 1:
        raise BadInputError(f"{name} is given {len(values)} times", param=name)
    return values[0].strip() if values else None


def _choice(kind: type[E], name: str, value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(kind)
        raise BadInputError(f"{name}: {value[:40]!r} is not one of {allowed}", param=name) from None


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise BadInputError(
            f"temperature: {text[:40]!r} is not a number from 0 to 1", param="temperature"
        )
    return value


def _flag(name: str, value: str | None) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False, "": False}
    found = words.get((value or "").lower())
    if found is None:
        raise BadInputError(f"{name}: {(value or '')[:40]!r} is not one of true, false", param=name)
    return found


def _timed(result: TaskResult, audio: Tensor) -> dict[str, Any]:
    """Return the result's values with the recording's length where the model gave none."""
    return {"duration": audio.shape[0] / SAMPLE_RATE_HZ, **result.values}


def _render(values: Mapping[str, Any], kind: TaskKind, question: Question) -> web.Response:
    if Granularity.WORD in question.granularities and not transcripts.has_words(values):
        raise BadInputError(
            f"model {question.model} gives no times of words; ask for segment", param=_GRANULARITIES
        )
    match question.format:
        case Format.JSON:
            return json_answer(transcripts.to_json(values))
        case Format.VERBOSE_JSON:
            word = _TASK_WORDS[kind]
            return json_answer(transcripts.to_verbose_json(values, word, question.granularities))
        case Format.TEXT:
            return web.Response(text=transcripts.to_text(values), content_type="text/plain")
        case Format.SRT:
            return web.Response(
                text=transcripts.to_srt(values), content_type="application/x-subrip"
            )
        case Format.VTT:
            return web.Response(text=transcripts.to_vtt(values), content_type="text/vtt")


def _model(request: web.Request, view: ModelView) -> dict[str, Any]:
    return {
        "id": view.spec.name,
        "object": "model",
        "created": request.app[STARTED_AT],
        "owned_by": "vram-agent",
    }
