"""A proxy before the apiserver that can kill the operator at any of its steps.

A step is a request that changes something: in the apiserver, or in an agent. Leases and Events are
none, since nothing rests on them. The operator is killed with SIGKILL, either before the step is
carried out or after it, when the answer has not come back yet. What else may happen to a request is
drawn by a `Weather`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from aiohttp import web

from tests.integration.operator.weather import Calm, Weather, is_watch

_HOP_HEADERS = {"transfer-encoding", "content-encoding", "content-length", "connection"}


@dataclass
class Faults:
    """Counts the steps once armed, and kills at the step ``kill_at``."""

    kill: Callable[[], None] = lambda: None
    kill_at: int = 0
    when: str = "after"
    armed: bool = False
    steps: list[str] = field(default_factory=list)
    killed: bool = False

    def notice(self, when: str, step: str) -> bool:
        """Take note of a step; returns whether the operator has just been killed."""
        if not self.armed or self.killed:
            return False
        if when == "before":
            self.steps.append(step)
        if len(self.steps) == self.kill_at and when == self.when:
            self.killed = True
            self.kill()
            return True
        return False


class FaultProxy:
    """Forwards everything to ``server``, watches included."""

    def __init__(self, server: str, faults: Faults) -> None:
        self._server = server
        self._faults = faults
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self._watching: dict[int, web.Request] = {}
        self._lists: dict[str, bytes] = {}
        self.weather: Weather = Calm()
        self.changes: list[tuple[datetime, str]] = []
        """Each request that changed something, with the time at which it was carried out."""
        self.url = ""
        self.is_dead = False
        """While true every request is cut off, as by an apiserver that is down."""

    async def start(self) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._session = aiohttp.ClientSession(auto_decompress=False)

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def cut_watches(self) -> None:
        """End every watch that is open."""
        for request in list(self._watching.values()):
            _cut(request)

    def write_kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig that leads through this proxy."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxy",
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": "proxy", "user": {}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
        }
        path.write_text(json.dumps(config))
        return path

    async def _forward(self, request: web.Request) -> web.StreamResponse:  # noqa: PLR0911
        if self.is_dead:
            return _cut(request)
        step = _step(request)
        body = await request.read()
        if step and self._faults.notice("before", step):
            return _cut(request)
        effect = self.weather.draw(request, step)
        await asyncio.sleep(effect.delay_seconds)
        if effect.answer is not None:
            return effect.response()
        if not effect.arrives:
            return _cut(request)
        if effect.is_stale and request.raw_path in self._lists:
            return web.Response(body=self._lists[request.raw_path], content_type="application/json")
        assert self._session is not None
        headers = {"Content-Type": request.content_type, "Accept": "application/json"}
        async with self._session.request(
            request.method,
            self._server + request.raw_path,
            data=body or None,
            headers=headers if body else {"Accept": "application/json"},
            timeout=aiohttp.ClientTimeout(total=None),
        ) as answer:
            if step:
                self.changes.append((datetime.now(UTC), step))
            if step and self._faults.notice("after", step):
                return _cut(request)
            if not effect.is_answered:
                return _cut(request)
            if request.method == "GET" and "limit" in request.query:
                content = await answer.read()
                self._lists.setdefault(request.raw_path, content)
                return web.Response(
                    body=content, status=answer.status, content_type="application/json"
                )
            return await self._pass_on(request, answer)

    async def _pass_on(
        self, request: web.Request, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_HEADERS}
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        if is_watch(request):
            self._watching[id(request)] = request
        try:
            with suppress(aiohttp.ClientError, ConnectionError):
                async for chunk in answer.content.iter_any():
                    if self.is_dead:
                        return _cut(request)
                    await response.write(chunk)
        finally:
            self._watching.pop(id(request), None)
        with suppress(ConnectionError):
            await response.write_eof()
        return response


def _step(request: web.Request) -> str:
    """Name the step that a request is; empty for none."""
    path = request.path
    if request.method == "GET" or "/leases" in path or "/events" in path:
        return ""
    return f"{request.method} {path.split('/namespaces/', 1)[-1].split('/', 1)[-1]}"


def _cut(request: web.Request) -> web.StreamResponse:
    """Close the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
