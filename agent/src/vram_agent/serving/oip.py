"""The Open Inference Protocol v2 on the serving port, with Triton's repository extension.

Why it exists: KServe and Triton clients need no change. Tensors travel as JSON; what asks for the
binary extension is refused by name, never misread. It parses and renders; queueing, loading and
VRAM are the supervisor's. What a runtime gets is a Task of kind INFER with the request's tensors
and ``parameters``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from vram_agent import __version__
from vram_agent.backend import Task, TaskKind, TaskResult, TensorSpec
from vram_agent.errors import BadInputError
from vram_agent.protocol import Runtime
from vram_agent.serving.answers import json_answer
from vram_agent.serving.context import LIMITS, PLACES, SERVER
from vram_agent.serving.requests import (
    decode_json,
    ensure_offered,
    keep_alive_seconds,
    read_body,
    refuse_large_before_continue,
    requested_model,
)
from vram_agent.serving.tensors import to_list, to_tensor

API_NAMES = {
    "/v2": "metadata",
    "/v2/health/live": "health",
    "/v2/health/ready": "health",
    "/v2/models/{m}": "metadata",
    "/v2/models/{m}/ready": "health",
    "/v2/models/{m}/infer": "infer",
    "/v2/repository/index": "repository",
    "/v2/repository/models/{m}/load": "repository",
    "/v2/repository/models/{m}/unload": "repository",
}
_PLATFORMS = {Runtime.ONNX: "onnxruntime_onnx", Runtime.TORCH: "pytorch_libtorch"}
_BINARY_HEADER = "Inference-Header-Content-Length"
_VERSION = "1"
_NO_BINARY = "this agent does not have the binary-tensor extension yet; send and ask for JSON"
_INLINE_BYTES = 256 * 1024  # larger bodies are converted off the event loop


R = TypeVar("R")


class InferInput(msgspec.Struct, kw_only=True):
    """One tensor of a request."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class InferOutput(msgspec.Struct, kw_only=True):
    """One tensor that the client wants back."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /v2/models/{m}/infer``."""

    inputs: list[InferInput]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[InferOutput] = []


class IndexRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /v2/repository/index``."""

    ready: bool = False


class LoadRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /v2/repository/models/{m}/load``."""

    parameters: dict[str, Any] = {}


def add_routes(app: web.Application) -> None:
    """Route the OIP calls."""
    app.router.add_get("/v2", describe_server)
    app.router.add_get("/v2/health/live", live)
    app.router.add_get("/v2/health/ready", ready)
    app.router.add_get("/v2/models/{m}", describe_model)
    app.router.add_get("/v2/models/{m}/ready", model_ready)
    app.router.add_post("/v2/models/{m}/infer", infer, expect_handler=refuse_large_before_continue)
    app.router.add_post("/v2/repository/index", index)
    app.router.add_post("/v2/repository/models/{m}/load", load)
    app.router.add_post("/v2/repository/models/{m}/unload", unload)


async def describe_server(_: web.Request) -> web.Response:
    """``GET /v2``."""
    return json_answer(
        {"name": "vram-agent", "version": __version__, "extensions": ["model_repository"]}
    )


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
    view = requested_model(request, request.match_info["m"])
    loaded = view.loaded
    return json_answer(
        {
            "name": view.spec.name,
            "versions": [_VERSION],
            "platform": _PLATFORMS.get(view.spec.runtime, view.spec.runtime.value.lower()),
            "inputs": [_spec(spec) for spec in (loaded.inputs if loaded else ())],
            "outputs": [_spec(spec) for spec in (loaded.outputs if loaded else ())],
        }
    )


async def model_ready(request: web.Request) -> web.Response:
    """``GET /v2/models/{m}/ready``; a lazy model that can load is ready."""
    view = requested_model(request, request.match_info["m"])
    is_ready = view.is_ready and request.app[SERVER].is_ready()
    return json_answer({"name": view.spec.name, "ready": is_ready}, status=200 if is_ready else 503)


async def infer(request: web.Request) -> web.Response:
    """``POST /v2/models/{m}/infer``."""
    with request.app[PLACES].take():
        return await _infer(request)


async def _infer(request: web.Request) -> web.Response:
    keep_alive = keep_alive_seconds(request)
    view = requested_model(request, request.match_info["m"])
    ensure_offered(request.app[SERVER], view, TaskKind.INFER)
    if _BINARY_HEADER in request.headers:
        raise BadInputError(f"{_BINARY_HEADER}: {_NO_BINARY}", param=_BINARY_HEADER)
    body = await read_body(request, request.app[LIMITS].request_bytes)
    question, task = await _off_loop(len(body), parse_infer, body)
    ensure_known_outputs(
        question, [spec.name for spec in view.loaded.outputs] if view.loaded else []
    )
    result = await request.app[SERVER].submit(view.spec.name, task, keep_alive_seconds=keep_alive)
    size = sum(len(tensor.data) for tensor in result.tensors)
    return await _off_loop(size, render_infer, view.spec.name, question, result)


def parse_infer(body: bytes) -> tuple[InferRequest, Task]:
    """Return the request and its task. Raises BadInputError."""
    question = decode_json(body, InferRequest)
    if question.parameters.get("binary_data_output"):
        raise BadInputError(f"binary_data_output: {_NO_BINARY}", param="parameters")
    for output in question.outputs:
        if output.parameters.get("binary_data"):
            raise BadInputError(f"output {output.name}: {_NO_BINARY}", param=output.name)
    names = [tensor.name for tensor in question.inputs]
    if len(set(names)) != len(names):
        raise BadInputError("an input is given twice", param="inputs")
    tensors = []
    for tensor in question.inputs:
        if tensor.data is None:
            raise BadInputError(f"input {tensor.name} has no data: {_NO_BINARY}", param=tensor.name)
        tensors.append(to_tensor(tensor.name, tensor.datatype, tensor.shape, tensor.data))
    return question, Task(
        kind=TaskKind.INFER, parameters=question.parameters, tensors=tuple(tensors)
    )


def ensure_known_outputs(question: InferRequest, known: Sequence[str]) -> None:
    """Raise BadInputError for an output that the model does not have; nothing known is no fault."""
    for output in question.outputs:
        if known and output.name not in known:
            raise BadInputError(
                f"the model has no output {output.name[:64]!r}; it has {', '.join(known)}",
                param="outputs",
            )


def render_infer(model: str, question: InferRequest, result: TaskResult) -> web.Response:
    """Return the response with the outputs that were asked for, in that order; none = all."""
    tensors = {tensor.name: tensor for tensor in result.tensors}
    ensure_known_outputs(question, list(tensors) or ["none"])
    names = [output.name for output in question.outputs] or list(tensors)
    body: dict[str, Any] = {"model_name": model, "model_version": _VERSION}
    if question.id is not None:
        body["id"] = question.id
    body["outputs"] = [
        {
            "name": name,
            "datatype": tensors[name].datatype,
            "shape": tensors[name].shape,
            "data": to_list(tensors[name]),
        }
        for name in names
    ]
    return json_answer(body)


async def index(request: web.Request) -> web.Response:
    """``POST /v2/repository/index``."""
    body = await read_body(request, request.app[LIMITS].request_bytes)
    only_ready = decode_json(body, IndexRequest).ready if body.strip() else False
    return json_answer(
        [
            {
                "name": view.spec.name,
                "version": _VERSION,
                "state": "READY" if view.is_ready else "UNAVAILABLE",
                "reason": view.report.error or "",
            }
            for view in request.app[SERVER].models()
            if view.is_ready or not only_ready
        ]
    )


async def load(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{m}/load``: into VRAM."""
    body = await read_body(request, request.app[LIMITS].request_bytes)
    if body.strip() and decode_json(body, LoadRequest).parameters:
        raise BadInputError(
            "a model's config and files come from the agent's config, not from here"
        )
    view = requested_model(request, request.match_info["m"])
    await request.app[SERVER].load(view.spec.name)
    return json_answer({})


async def unload(request: web.Request) -> web.Response:
    """``POST /v2/repository/models/{m}/unload``: to the Disk tier; the next request loads again."""
    view = requested_model(request, request.match_info["m"])
    await request.app[SERVER].unload(view.spec.name)
    return json_answer({})


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


async def _off_loop(size_bytes: int, function: Callable[..., R], *arguments: Any) -> R:
    """Call at once what is small, in a thread what would hold up the event loop."""
    if size_bytes <= _INLINE_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
