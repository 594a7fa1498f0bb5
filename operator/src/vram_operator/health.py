"""Answers /metrics, /healthz and /readyz, and knows whether the watches are alive.

A watch that is alive brings something at least each minute, if only a bookmark. `WatchHealth` sees
every request of the watches and looks at how many bytes their streams have brought; nothing for
STALE_SECONDS, or a stream that is not open, and this replica is not ready. It says so once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import structlog
from aiohttp import web

from vram_operator.clock import Clock
from vram_operator.kube import Traffic
from vram_operator.metrics import Metrics

# Bookmarks come each minute, and kopf opens a stream again after 70 s of silence.
STALE_SECONDS = 100.0

_log = structlog.get_logger(__name__)


@dataclass
class _Stream:
    response: aiohttp.ClientResponse
    seen_bytes: int
    alive_at: float


class WatchHealth:
    """Which watch streams are alive. ``observe`` may be called from any thread."""

    def __init__(self, clock: Clock, expected: int) -> None:
        self._clock = clock
        self._expected = expected
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()
        self._was_fresh: bool | None = None

    def observe(self, traffic: Traffic) -> None:
        """Take note of a watch that was opened."""
        if not traffic.is_watch or traffic.response.status != 200:
            return
        with self._lock:
            self._streams[traffic.url_path] = _Stream(traffic.response, 0, self._clock.monotonic())

    def problem(self) -> str:
        """Return why the caches cannot be trusted, or nothing. Logs a change once."""
        found = self._problem()
        if found and self._was_fresh:
            _log.warning("watches are stale; retrying", problem=found)
        elif not found and self._was_fresh is False:
            _log.info("watches are alive again")
        if not found or self._was_fresh is not None:
            self._was_fresh = not found
        return found

    def _problem(self) -> str:
        now = self._clock.monotonic()
        with self._lock:
            for path, stream in self._streams.items():
                if stream.response.closed:
                    # kopf opens it again within a second or two while the apiserver answers.
                    limit = STALE_SECONDS / 10
                else:
                    limit = STALE_SECONDS
                    received = stream.response.content.total_bytes
                    if received != stream.seen_bytes:
                        stream.seen_bytes, stream.alive_at = received, now
                if now - stream.alive_at > limit:
                    return f"nothing from the watch of {path} for {now - stream.alive_at:.0f} s"
            if len(self._streams) < self._expected:
                return f"{len(self._streams)} of {self._expected} watches are open"
        return ""


@dataclass(frozen=True)
class Probes:
    """What the two probes ask: each returns what is wrong, or nothing."""

    alive: Callable[[], str]
    ready: Callable[[], str]


class HealthServer:
    """Serves the three paths until it is closed."""

    def __init__(self, metrics: Metrics, probes: Probes) -> None:
        self._metrics = metrics
        self._probes = probes
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> int:
        """Listen on all addresses; returns the port, which matters when 0 was asked for."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._get_metrics),
                web.get("/healthz", self._get_healthz),
                web.get("/readyz", self._get_readyz),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=1.0
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, None, port)
        await site.start()
        # Port 0 takes one for IPv4 and another for IPv6: the one that 127.0.0.1 reaches counts.
        return int(min(self._runner.addresses, key=len)[1])

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _get_healthz(self, _: web.Request) -> web.Response:
        return _probe(self._probes.alive())

    async def _get_readyz(self, _: web.Request) -> web.Response:
        return _probe(self._probes.ready())


def _probe(problem: str) -> web.Response:
    return web.Response(text=f"{problem or 'ok'}\n", status=503 if problem else 200)
