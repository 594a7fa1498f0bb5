"""Composes and starts the HTTP servers; the only module that knows all of serving/.

Why it exists: which middleware surrounds which routes, where they listen and how they end. Called
by ``__main__`` (both ports) and by the embedding library (the control port only).
"""

from __future__ import annotations

import asyncio
import errno
import time

from aiohttp import web

from vram_agent.metrics import AgentMetrics
from vram_agent.protocol import AgentConfig, PodIdentity
from vram_agent.serving import control, oip, openai, speech
from vram_agent.serving.api_keys import API_KEYS, ApiKeys, known_keys_only
from vram_agent.serving.audio import AudioDecoder
from vram_agent.serving.base import ModelServer
from vram_agent.serving.context import (
    CONVERSIONS,
    DECODER,
    ENCODER,
    LIMITS,
    METRICS,
    PLACES,
    SERVER,
    STARTED_AT,
)
from vram_agent.serving.encoder import SpeechEncoder
from vram_agent.serving.limits import RequestLimits
from vram_agent.serving.middleware import errors_as_answers, request_metrics
from vram_agent.serving.places import Places

# Draining is the supervisor's and comes first; this is for answers that are still being written.
_CLOSE_SECONDS = 5.0
_SERVING = "listen.serving"
_CONTROL = "listen.control"


class ListenError(Exception):
    """An address of the config cannot be listened on; the message names field, address, remedy."""


class RunningServers:
    """Servers that listen. The addresses are those bound, ``host:port``; empty: not started."""

    def __init__(self) -> None:
        self.serving_address = ""
        self.control_address = ""
        self._runners: list[web.AppRunner] = []

    async def listen(self, app: web.Application, field: str, address: str) -> str:
        """Serve an application and return the address bound. Raises ListenError.

        On the serving port a client that goes away cancels its call. Control calls run to their
        end: a transition that the operator asked for is not given up because a connection broke.
        """
        host, port = _split(field, address)
        runner = web.AppRunner(
            app,
            access_log=None,  # metrics count requests
            handler_cancellation=field == _SERVING,
            shutdown_timeout=_CLOSE_SECONDS,
        )
        self._runners.append(runner)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
            raise ListenError(
                f"{field}: cannot listen on {address}: the address {reason}; "
                "choose another one, or end the process that holds it"
            ) from error
        bound_host, bound_port = runner.addresses[0][:2]
        return f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"

    async def close(self) -> None:
        """Stop listening, give open answers a moment, end the rest. Idempotent."""
        while self._runners:
            await self._runners.pop().cleanup()


async def start_servers(
    server: ModelServer, config: AgentConfig, pod: PodIdentity, metrics: AgentMetrics
) -> RunningServers:
    """Listen on both ports. Raises ListenError; nothing listens then."""
    limits = RequestLimits(config)
    running = RunningServers()
    try:
        running.control_address = await running.listen(
            _control_app(server, config, pod, metrics, limits), _CONTROL, config.listen.control
        )
        running.serving_address = await running.listen(
            _serving_app(server, config, metrics, limits), _SERVING, config.listen.serving
        )
    except BaseException:
        await running.close()
        raise
    return running


async def start_control(
    server: ModelServer, config: AgentConfig, pod: PodIdentity, metrics: AgentMetrics
) -> RunningServers:
    """Listen on the control port only. Raises ListenError."""
    running = RunningServers()
    app = _control_app(server, config, pod, metrics, RequestLimits(config))
    try:
        running.control_address = await running.listen(app, _CONTROL, config.listen.control)
    except BaseException:
        await running.close()
        raise
    return running


def _serving_app(
    server: ModelServer, config: AgentConfig, metrics: AgentMetrics, limits: RequestLimits
) -> web.Application:
    names = {**openai.API_NAMES, **speech.API_NAMES, **oip.API_NAMES}
    app = web.Application(middlewares=[request_metrics(names), errors_as_answers, known_keys_only])
    app[API_KEYS] = ApiKeys(config.serving.api_key_file)
    app[SERVER] = server
    app[LIMITS] = limits
    app[METRICS] = metrics
    app[PLACES] = Places(limits)
    app[DECODER] = AudioDecoder()
    app[ENCODER] = SpeechEncoder()
    app[CONVERSIONS] = asyncio.Semaphore(1)
    app[STARTED_AT] = int(time.time())
    app.on_response_prepare.append(_hide_version)
    openai.add_routes(app)
    speech.add_routes(app)
    oip.add_routes(app)
    return app


def _control_app(
    server: ModelServer,
    config: AgentConfig,
    pod: PodIdentity,
    metrics: AgentMetrics,
    limits: RequestLimits,
) -> web.Application:
    metrics.attach(server.report)
    verify = control.signed_calls_only(config.control, pod)
    app = web.Application(middlewares=[errors_as_answers, verify])
    app[SERVER] = server
    app[LIMITS] = limits
    app[METRICS] = metrics
    app.on_response_prepare.append(_hide_version)
    control.add_routes(app)
    return app


async def _hide_version(_: web.Request, answer: web.StreamResponse) -> None:
    """Which aiohttp and Python serve is nobody's business."""
    answer.headers["Server"] = "vram-agent"


def _split(field: str, address: str) -> tuple[str, int]:
    """Return host and port of ``host:port``; an IPv6 host stands in brackets."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ListenError(f"{field}: {address!r} is not host:port; write for example 0.0.0.0:8000")
    return host.removeprefix("[").removesuffix("]"), int(port)
