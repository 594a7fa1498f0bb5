"""What surrounds every handler: metrics outermost, then errors as answers.

Why it exists: a handler raises and returns, nothing else; that every request is counted, that no
traceback leaves the process and that each error speaks its API's language is settled here.
"""

from __future__ import annotations

import time

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from vram_agent.errors import AgentError, BadInputError, QueueFullError
from vram_agent.metrics import UNKNOWN_MODEL
from vram_agent.serving.answers import RouteError, error_answer
from vram_agent.serving.context import METRICS, MODEL, SERVER

_log = structlog.get_logger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's word for a client that went away before the answer
_OTHER_API = "other"


def request_metrics(api_names: dict[str, str]) -> Middleware:
    """Return a middleware that counts requests; ``api_names``: label of each route's pattern."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.monotonic()
        code = CLIENT_CLOSED_REQUEST
        try:
            answer = await handler(request)
            code = answer.status
            return answer
        finally:
            request.app[METRICS].observe_request(
                request.get(MODEL, UNKNOWN_MODEL),
                _api_of(request, api_names),
                code,
                time.monotonic() - began,
            )

    return observe


@web.middleware
async def errors_as_answers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into the API's error format; cancellation passes."""
    try:
        answer = await _answer(request, handler)
    finally:
        _forget_unread(request)
    if not answer.prepared and not request.app[SERVER].is_ready():
        # A client that kept the connection would send its next request to a process that ends.
        answer.force_close()
    return answer


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except QueueFullError as error:
        answer = error_answer(request.path, error)
        answer.force_close()  # in a flood, connections kept for the next try are what costs memory
        return answer
    except AgentError as error:
        return error_answer(request.path, error)
    except web.HTTPException as error:
        return _of_the_router(request, error)
    except HttpProcessingError as error:
        return error_answer(request.path, BadInputError(f"malformed request: {error.message}"))
    except ConnectionResetError:  # the client went away while its answer was sent
        raise
    except Exception:  # the last resort: a client must get an answer, and never a traceback
        _log.exception("request failed", method=request.method, path=request.path)
        return error_answer(request.path, AgentError("internal error; the agent's log says more"))


def _forget_unread(request: web.Request) -> None:
    """A connection that is kept alive would keep a body too that came in and was never read.

    aiohttp reads on after the answer only where the body has not come in whole (lingering_time).
    """
    content = request.content
    if content.is_eof() and not content.at_eof() and content.exception() is None:
        content.read_nowait()


def _of_the_router(request: web.Request, error: web.HTTPException) -> web.Response:
    call = f"{request.method} {request.path}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{call}: use {allowed}"
        answer = error_answer(
            request.path, RouteError(message, status=405, code="method_not_allowed")
        )
        answer.headers["Allow"] = allowed
        return answer
    message = f"{call}: no such call" if error.status == 404 else f"{call}: {error.reason}"
    code = "not_found" if error.status == 404 else "invalid_request"
    return error_answer(request.path, RouteError(message, status=error.status, code=code))


def _api_of(request: web.Request, api_names: dict[str, str]) -> str:
    resource = request.match_info.route.resource
    return api_names.get(resource.canonical, _OTHER_API) if resource is not None else _OTHER_API
