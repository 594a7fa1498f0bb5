"""The Open Inference Protocol v2 on the serving port, with Triton's repository extension.

Why it exists: KServe and Triton clients need no change. It routes, receives and sends; what a body
says is ``inference.py``'s, queueing, loading and VRAM are the supervisor's. What a runtime gets is
a Task of kind INFER with the request's tensors and ``parameters``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from vram_agent import __version__
from vram_agent.backend import Task, TaskKind, TensorSpec
from vram_agent.errors import BadInputError, NoSuchModelError
from vram_agent.protocol import Runtime
from vram_agent.serving.answers import json_answer
from vram_agent.serving.base import ModelView
from vram_agent.serving.context import CONVERSIONS, LIMITS, PLACES, SERVER
from vram_agent.serving.inference import (
    LENGTH_HEADER,
    MODEL_VERSION,
    InferAnswer,
    InferRequest,
    ensure_known_outputs,
    parse_header_length,
    parse_infer,
    render_infer,
)
from vram_agent.serving.requests import (
    decode_json,
    ensure_offered,
    keep_alive_seconds,
    read_body,
    refuse_large_before_continue,
    requested_model,
)
from vram_agent.serving.scratch import map_scratch, open_scratch, write_scratch
from vram_agent.serving.streams import send_parts
from vram_agent.serving.uploads import receive_body

API_NAMES = {
    "/v2": "metadata",
    "/v2/health/live": "health",
    "/v2/health/ready": "health",
    "/v2/models/{m}": "metadata",
    "/v2/models/{m}/ready": "health",
    "/v2/models/{m}/infer": "infer",
    "/v2/models/{m}/versions/{v}": "metadata",
    "/v2/models/{m}/versions/{v}/ready": "health",
    "/v2/models/{m}/versions/{v}/infer": "infer",
    "/v2/repository/index": "repository",
    "/v2/repository/models/{m}/load": "repository",
    "/v2/repository/models/{m}/unload": "repository",
}
_EXTENSIONS = ["binary_tensor_data", "model_repository", "model_repository(unload_dependents)"]
_PLATFORMS = {Runtime.ONNX: "onnxruntime_onnx", Runtime.TORCH: "pytorch_libtorch"}
_MAX_CONTROL_BYTES = 1024 * 1024  # the body of a repository call: a few words, or a whole config
_BINARY = "application/octet-stream"
_ONE_PIECE_BYTES = 64 * 1024
_INLINE_BYTES = 256 * 1024  # larger bodies are converted off the event loop, one at a time


R = TypeVar("R")


class IndexRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /v2/repository/index``."""

    ready: bool = False


class RepositoryRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /v2/repository/models/{m}/load`` and ``/unload``."""

    parameters: dict[str, Any] = {}


def add_routes(app: web.Application) -> None:
    """Route the OIP calls."""
    app.router.add_get("/v2", describe_server)
    app.router.add_get("/v2/health/live", live)
    app.router.add_get("/v2/health/ready", ready)
    for model in ("/v2/models/{m}", "/v2/models/{m}/versions/{v}"):
        app.router.add_get(model, describe_model)
        app.router.add_get(f"{model}/ready", model_ready)
        app.router.add_post(f"{model}/infer", infer, expect_handler=refuse_large_before_continue)
    app.router.add_post("/v2/repository/index", index)
    app.router.add_post("/v2/repository/models/{m}/load", load)
    app.router.add_post("/v2/repository/models/{m}/unload", unload)


async def describe_server(_: web.Request) -> web.Response:
    """``GET /v2``."""
    return json_answer({"name": "vram-agent", "version": __version__, "extensions": _EXTENSIONS})


async def live(request: web.Request) -> web.Response:
    """``GET /v2/health/live``."""
    is_live = request.app[SERVER].is_live()
    return json_answer({"live": is_live}, status=200 if is_live else 503)


async def ready(request: web.Request) -> web.Response:
    """``GET /v2/health/ready``: started and not draining, whatever state the models are in."""
    is_ready = request.app[SERVER].is_ready()
    return json_answer({"ready": is_ready}, status=200 if is_ready else 503)


async def describe_model(request: web.Request) -> web.Response:
    """``GET /v2/models/{m}``; inputs and outputs are known once the model was loaded."""
    view = _requested_version(request)
    loaded = view.loaded
    return json_answer(
        {
            "name": view.spec.name,
            "versions": [MODEL_VERSION],
            "platform": _PLATFORMS.get(view.spec.runtime, view.spec.runtime.value.lower()),
            "inputs": [_spec(spec) for spec in (loaded.inputs if loaded else ())],
            "outputs": [_spec(spec) for spec in (loaded.outputs if loaded else ())],
        }
    )


async def model_ready(request: web.Request) -> web.Response:
    """``GET /v2/models/{m}/ready``, with the progress of a load that is under way."""
    view = _requested_version(request)
    is_ready = view.is_ready and request.app[SERVER].is_ready()
    body: dict[str, Any] = {"name": view.spec.name, "ready": is_ready}
    if view.report.progress is not None:
        body |= {"state": view.report.state, "progress": view.report.progress}
    return json_answer(body, status=200 if is_ready else 503)


async def infer(request: web.Request) -> web.StreamResponse:
    """``POST /v2/models/{m}/infer``."""
    with request.app[SERVER].admit(), request.app[PLACES].take():
        return await _send(request, await _infer(request))


async def _infer(request: web.Request) -> InferAnswer:
    keep_alive = keep_alive_seconds(request)
    header_length = parse_header_length(request.headers.get(LENGTH_HEADER))
    view = _requested_version(request)
    ensure_offered(request.app[SERVER], view, TaskKind.INFER)
    body = await receive_body(request, request.app[LIMITS].request_bytes)
    question, task = await _convert(request, body.nbytes, _parse, body, header_length)
    del body  # what a task needs of it lives on in the task
    ensure_known_outputs(
        question, [spec.name for spec in view.loaded.outputs] if view.loaded else []
    )
    result = await request.app[SERVER].submit(
        view.spec.name, task, keep_alive_seconds=keep_alive, is_admitted=True
    )
    size = sum(memoryview(tensor.data).nbytes for tensor in result.tensors)
    return await _convert(request, size, render_infer, view.spec.name, question, result)


def _parse(body: memoryview, header_length: int | None) -> tuple[InferRequest, Task]:
    """Parse, and put large tensors that were JSON into scratch files: their tasks may wait long."""
    question, task = parse_infer(body, header_length)
    tensors = tuple(
        replace(tensor, data=_spooled(tensor.data))
        if isinstance(tensor.data, bytes) and len(tensor.data) > _INLINE_BYTES
        else tensor
        for tensor in task.tensors
    )
    return question, replace(task, tensors=tensors)


def _spooled(data: bytes) -> memoryview:
    with open_scratch() as file:
        write_scratch(file, data)
        return map_scratch(file)


async def _send(request: web.Request, body: InferAnswer) -> web.StreamResponse:
    """Send large binary tensors from where they lie, and small ones at once."""
    if body.tensors is None:
        return web.Response(body=body.json, content_type="application/json")
    headers = {LENGTH_HEADER: str(len(body.json))}
    if body.number_of_bytes <= _ONE_PIECE_BYTES:
        whole = b"".join((body.json, *body.tensors))
        return web.Response(body=whole, headers=headers, content_type=_BINARY)
    answer = web.StreamResponse(headers=headers)
    answer.content_type = _BINARY
    answer.content_length = body.number_of_bytes
    return await send_parts(request, answer, (body.json, *body.tensors))


async def index(request: web.Request) -> web.Response:
    """``POST /v2/repository/index``."""
    body = await read_body(request, _MAX_CONTROL_BYTES)
    only_ready = decode_json(body, IndexRequest).ready if body.strip() else False
    return json_answer(
        [
            {
                "name": view.spec.name,
                "version": MODEL_VERSION,
                "state": _index_state(view),
                "reason": view.report.error or "",
            }
            for view in request.app[SERVER].models()
            if view.is_ready or not only_ready
        ]
    )


def _index_state(view: ModelView) -> str:
    if view.is_ready:
        return "READY"
    return "LOADING" if view.is_loading_eagerly else "UNAVAILABLE"


async def load(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{m}/load``: into VRAM."""
    if await _repository_parameters(request):
        raise BadInputError(
            "a model's config and files come from the agent's config, not from here"
        )
    view = requested_model(request, request.match_info["m"])
    await request.app[SERVER].load(view.spec.name)
    return json_answer({})


async def unload(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{m}/unload``: to the Disk tier; the next request loads again.

    No model depends on another here, so that ``unload_dependents`` changes nothing.
    """
    unknown = set(await _repository_parameters(request)) - {"unload_dependents"}
    if unknown:
        raise BadInputError(f"unload has no parameter {min(unknown)[:64]!r}", param="parameters")
    view = requested_model(request, request.match_info["m"])
    await request.app[SERVER].unload(view.spec.name)
    return json_answer({})


async def _repository_parameters(request: web.Request) -> dict[str, Any]:
    body = await read_body(request, _MAX_CONTROL_BYTES)
    return decode_json(body, RepositoryRequest).parameters if body.strip() else {}


def _requested_version(request: web.Request) -> ModelView:
    """Return the model that the path names. Raises NoSuchModelError, for a version other than 1."""
    view = requested_model(request, request.match_info["m"])
    version = request.match_info.get("v", MODEL_VERSION)
    if version != MODEL_VERSION:
        raise NoSuchModelError(
            f"model {view.spec.name} has no version {version[:20]}; it has {MODEL_VERSION}"
        )
    return view


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


async def _convert(
    request: web.Request, size_bytes: int, function: Callable[..., R], *arguments: Any
) -> R:
    """Call at once what is small, in a thread what would hold up the event loop.

    JSON becomes many times its size while it is converted: so one large body at a time.
    """
    if size_bytes <= _INLINE_BYTES:
        return function(*arguments)
    async with request.app[CONVERSIONS]:
        return await asyncio.to_thread(function, *arguments)
