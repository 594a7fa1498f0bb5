"""What may happen to a request on its way to the apiserver and back, drawn with a seed.

Leases and Events are let through: nothing rests on Events, and what a lost Lease means is tested
by itself.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True)
class Effect:
    """What happens to one request. ``answer`` is a status that somebody else gives for it."""

    answer: int | None = None
    arrives: bool = True
    is_answered: bool = True
    is_stale: bool = False
    """A list is answered as it was when it was asked for the first time."""
    delay_seconds: float = 0.0
    is_watch: bool = False

    def response(self) -> web.Response:
        """The apiserver's own form of an error; an expired watch is told of within the stream."""
        assert self.answer is not None
        status = {
            "apiVersion": "v1",
            "kind": "Status",
            "status": "Failure",
            "code": self.answer,
            "reason": _REASONS[self.answer],
            "message": "injected",
        }
        if self.is_watch:
            line = json.dumps({"type": "ERROR", "object": status}) + "\n"
            return web.Response(text=line, content_type="application/json")
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.answer == 429 else {}
        return web.json_response(status, status=self.answer, headers=headers)


_REASONS = {
    403: "Forbidden",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
}
FAIR = Effect()

KINDS: dict[str, tuple[Effect, ...]] = {
    "409 Conflict": (Effect(answer=409),),
    "410 Expired watches": (Effect(answer=410, is_watch=True),),
    "429 with Retry-After": (Effect(answer=429),),
    "500": (Effect(answer=500),),
    "requests that never arrive": (Effect(arrives=False),),
    "answers lost after the request was carried out": (Effect(is_answered=False),),
    "delays": (Effect(delay_seconds=0.7),),
    "stale lists": (Effect(is_stale=True),),
}
KINDS["all of them"] = tuple(effect for effects in KINDS.values() for effect in effects)


class Weather(Protocol):
    """Says what happens to a request; ``step`` names it if it changes something."""

    def draw(self, request: web.Request, step: str) -> Effect: ...


class Calm:
    """Nothing happens to anything."""

    def draw(self, request: web.Request, step: str) -> Effect:
        return FAIR


@dataclass
class Storm:
    """Each request that an effect can happen to has it with a chance of ``share``."""

    effects: tuple[Effect, ...]
    seed: int
    share: float = 0.35
    count: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, request: web.Request, step: str) -> Effect:
        effect = self._random.choice(self.effects)
        if not _can_have(request, step, effect) or self._random.random() > self.share:
            return FAIR
        self.count += 1
        return effect


def _can_have(request: web.Request, step: str, effect: Effect) -> bool:
    if effect.is_watch:
        return is_watch(request)
    if effect.is_stale:
        return request.method == "GET" and "limit" in request.query
    return bool(step)


@dataclass
class NoLease:
    """The Lease alone cannot be reached; all else can."""

    is_on: bool = False

    def draw(self, request: web.Request, step: str) -> Effect:
        return Effect(answer=500) if self.is_on and "/leases" in request.path else FAIR


@dataclass
class NoWatch:
    """Watches alone are refused."""

    is_on: bool = False

    def draw(self, request: web.Request, step: str) -> Effect:
        return Effect(answer=500) if self.is_on and is_watch(request) else FAIR


def is_watch(request: web.Request) -> bool:
    return request.query.get("watch") in {"true", "1"}
