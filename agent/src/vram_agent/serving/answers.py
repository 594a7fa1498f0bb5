"""Answers and errors in the words of each API.

Why it exists: the supervisor raises the types of ``errors.py`` and knows no HTTP; here, and
nowhere else, they become status codes, ``Retry-After`` and the body that the API's clients parse.
Pure but for the response objects.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from aiohttp import web

from vram_agent.errors import AgentError, BadInputError, NoSuchModelError

# Where the raiser gives no time, these seconds are told. 503 without a time means that waiting
# alone does not help, so its clients are asked to come back rarely.
_RETRY_AFTER_SECONDS = {429: 1, 503: 30, 504: 1}


class RouteError(AgentError):
    """The router knows no such call; status and code come from it."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def json_answer(body: Any, *, status: int = 200) -> web.Response:
    """Return ``body`` as JSON. Floats that JSON cannot carry (NaN, infinities) become null."""
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )


def error_answer(path: str, error: AgentError) -> web.Response:
    """Return the error in the format of the API that ``path`` belongs to."""
    body = openai_error(error) if path.startswith("/v1/") else {"error": error.message}
    answer = json_answer(body, status=error.status)
    seconds = retry_after_seconds(error)
    if seconds is not None:
        answer.headers["Retry-After"] = str(seconds)
    if error.status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def retry_after_seconds(error: AgentError) -> int | None:
    """Return the whole seconds, at least 1, after which to try again; None: do not."""
    if error.status not in _RETRY_AFTER_SECONDS:
        return None
    if error.retry_after_seconds is None:
        return _RETRY_AFTER_SECONDS[error.status]
    return max(1, math.ceil(error.retry_after_seconds))


def openai_error(error: AgentError) -> dict[str, Any]:
    """Return the error as the OpenAI API writes it, in an answer or as an event of a stream."""
    return {
        "error": {
            "message": error.message,
            "type": _openai_type(error.status),
            "param": _param(error),
            "code": error.code,
        }
    }


def _param(error: AgentError) -> str | None:
    if isinstance(error, NoSuchModelError):
        return "model"
    return error.param if isinstance(error, BadInputError) else None


def _openai_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
