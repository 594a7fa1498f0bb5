"""The control port: what the operator asks of an agent, and what anyone may read.

Why it exists: reports and metrics are open, everything that changes something must be signed (see
``tokens.py``). Called by the operator, kubelet, Prometheus and ``vram-agent report``. It knows no
model and no process: each call is one method of ``ModelServer``.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from ipaddress import IPv6Address, ip_address

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from vram_agent.config import ConfigError, parse_config
from vram_agent.errors import BadInputError
from vram_agent.metrics import CONTENT_TYPE
from vram_agent.protocol import (
    AgentConfig,
    ControlPolicy,
    OffloadTier,
    PodIdentity,
    RestartRequest,
)
from vram_agent.serving.answers import json_answer
from vram_agent.serving.context import BODY, LIMITS, METRICS, SERVER
from vram_agent.serving.requests import decode_json, read_body
from vram_agent.serving.tokens import (
    ForbiddenError,
    PublicKeys,
    SignedCall,
    TokenVerifier,
    UnauthenticatedError,
)

MAX_BODY_BYTES = 1024 * 1024
_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/report"})
_NO_STORE = {"Cache-Control": "no-store"}


def add_routes(app: web.Application) -> None:
    """Route the control calls."""
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/report", report)
    app.router.add_post("/models/{m}/load", load)
    app.router.add_post("/models/{m}/offload", offload)
    app.router.add_post("/models/{m}/unload", unload)
    app.router.add_post("/scrub", scrub)
    app.router.add_post("/drain", drain)
    app.router.add_post("/resume", resume)
    app.router.add_put("/config", put_config)
    app.router.add_post("/recycle", recycle)
    app.router.add_post("/restart", restart)


def signed_calls_only(policy: ControlPolicy, pod: PodIdentity) -> Middleware:
    """Return a middleware that lets open calls pass and verifies all others, body included."""
    verifier = TokenVerifier(PublicKeys(policy.public_key_file), pod.uid)

    @web.middleware
    async def verify(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _is_open(request):
            token = _bearer_token(request)
            if token is not None:
                await _ensure_imported()
                request[BODY] = await _control_body(request)
                call = SignedCall(
                    method=request.method, target=request.raw_path, body=request[BODY]
                )
                verifier.verify(token, call, time.time())
            else:
                _ensure_unsigned_allowed(request, policy)
                request[BODY] = await _control_body(request)
        return await handler(request)

    return verify


async def healthz(request: web.Request) -> web.Response:
    """``GET /healthz``: the supervisor's loops run."""
    return _probe(request.app[SERVER].is_live(), "live")


async def readyz(request: web.Request) -> web.Response:
    """``GET /readyz``: started and not draining."""
    return _probe(request.app[SERVER].is_ready(), "ready")


async def metrics(request: web.Request) -> web.Response:
    """``GET /metrics``."""
    text = request.app[METRICS].render()
    return web.Response(body=text, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})


async def report(request: web.Request) -> web.Response:
    """``GET /report``."""
    answer = json_answer(request.app[SERVER].report())
    answer.headers.update(_NO_STORE)
    return answer


async def load(request: web.Request) -> web.Response:
    """``POST /models/{m}/load``: into VRAM."""
    return json_answer(await request.app[SERVER].load(request.match_info["m"]))


async def offload(request: web.Request) -> web.Response:
    """``POST /models/{m}/offload?tier=``."""
    tier = _tier(request)
    return json_answer(await request.app[SERVER].offload(request.match_info["m"], tier))


async def unload(request: web.Request) -> web.Response:
    """``POST /models/{m}/unload``: to the Disk tier."""
    return json_answer(await request.app[SERVER].unload(request.match_info["m"]))


async def scrub(request: web.Request) -> web.Response:
    """``POST /scrub``."""
    return json_answer(await request.app[SERVER].scrub())


async def drain(request: web.Request) -> web.Response:
    """``POST /drain``: 200 once every accepted request was answered."""
    return json_answer(await request.app[SERVER].drain())


async def resume(request: web.Request) -> web.Response:
    """``POST /resume``."""
    return json_answer(request.app[SERVER].resume())


async def put_config(request: web.Request) -> web.Response:
    """``PUT /config``: a whole AgentConfig."""
    config = _config(request[BODY])
    answer = json_answer(await request.app[SERVER].apply_config(config))
    request.app[LIMITS].apply(config)
    return answer


async def recycle(request: web.Request) -> web.Response:
    """``POST /recycle``: 202 at once, the report tells how it goes on."""
    order = decode_json(request[BODY], RestartRequest)
    return json_answer(request.app[SERVER].recycle(order), status=202)


async def restart(request: web.Request) -> web.Response:
    """``POST /restart``: 202 at once, the report tells how it goes on."""
    order = decode_json(request[BODY], RestartRequest)
    return json_answer(request.app[SERVER].restart(order), status=202)


def _is_open(request: web.Request) -> bool:
    """Go by the route that will answer, not by the path as written; no route does nothing."""
    resource = request.match_info.route.resource
    return resource is None or resource.canonical in _OPEN_PATHS


def _probe(is_fine: bool, word: str) -> web.Response:
    return web.Response(
        text=f"{word if is_fine else f'not {word}'}\n", status=200 if is_fine else 503
    )


def _config(body: bytes) -> AgentConfig:
    """Every fault is named at once, as for the config file."""
    try:
        return parse_config(decode_json(body, dict))
    except ConfigError as error:
        raise BadInputError("; ".join(error.faults)) from error


def _tier(request: web.Request) -> OffloadTier | None:
    text = request.query.get("tier", "")
    try:
        return OffloadTier(text) if text else None
    except ValueError:
        allowed = ", ".join(OffloadTier)
        raise BadInputError(f"tier: {text[:40]!r} is not one of {allowed}", param="tier") from None


def _bearer_token(request: web.Request) -> str | None:
    header = request.headers.get(hdrs.AUTHORIZATION)
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise UnauthenticatedError("Authorization must be: Bearer <token>")
    return token.strip()


def _ensure_unsigned_allowed(request: web.Request, policy: ControlPolicy) -> None:
    """A browser on the same machine sends Origin: a web page must not steer the agent."""
    if not policy.allow_unsigned:
        raise UnauthenticatedError("this call needs a token that the operator signed")
    if not _is_loopback(request):
        raise UnauthenticatedError("control.allowUnsigned holds for calls from loopback only")
    if hdrs.ORIGIN in request.headers:
        raise ForbiddenError("unsigned calls from a web page are refused")


def _is_loopback(request: web.Request) -> bool:
    peer = _peer(request)
    if not peer:
        return False
    address = ip_address(peer.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _peer(request: web.Request) -> str:
    """Return the address at the connection's other end; headers that name one prove nothing."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return str(peer[0]) if peer else ""


async def _control_body(request: web.Request) -> bytes:
    return await read_body(request, MAX_BODY_BYTES)


async def _ensure_imported() -> None:
    """Import the signature library off the event loop at the first signed call."""
    if "jwt" not in sys.modules:
        await asyncio.to_thread(importlib.import_module, "jwt")
