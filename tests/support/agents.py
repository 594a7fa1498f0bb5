"""A protocol-true agent without models: it reports, verifies tokens and does as it is scripted.

It stands where `vram-agent serve` stands in a pod. What it executes is recorded, so that a test can
say that a restart was carried out exactly once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import jwt
import msgspec
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from vram_agent.protocol import (
    ActionReport,
    ActionState,
    ActionStep,
    AgentConfig,
    AgentIdentity,
    AgentMode,
    DeviceKind,
    DeviceReport,
    MemoryClasses,
    MemoryReport,
    PodIdentity,
    Report,
    ResidualSource,
    RestartRequest,
)

GIB = 1024**3
_END = "-----END PUBLIC KEY-----"


def _timestamp() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass
class Script:
    """How the agent behaves. ``*_bytes`` is the residual from then on."""

    residual_bytes: int = 0
    after_recycle_bytes: int = 0
    after_restart_bytes: int = 0
    source: ResidualSource = ResidualSource.PROCESS
    idle: bool = True
    mode: AgentMode = AgentMode.SERVE
    recycle_status: int = 202
    restart_status: int = 202
    check_tokens: bool = True
    recycle_seconds: float = 0.0
    """How long a recycle takes; the answer comes at once."""


@dataclass
class Executed:
    """One restart or recycle that was really carried out."""

    restart_id: str
    step: ActionStep
    boot_id: str
    began: float
    """On the clock of the event loop; ``ended`` too, None while it lasts."""
    ended: float | None = None


@dataclass
class FakeAgent:
    """One agent. ``on_exit`` is called when PID 1 would end; the last ID survives that."""

    pod: PodIdentity
    public_keys: Callable[[], str]
    script: Script = field(default_factory=Script)
    on_exit: Callable[[], None] = lambda: None
    on_call: Callable[[str, str], None] = lambda _when, _path: None
    """Told ``before`` and ``after`` each verified restart or recycle, with its path."""
    executed: list[Executed] = field(default_factory=list)
    configs: list[AgentConfig] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    generation: int = 0
    boot_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    epoch: int = 0
    sequence: int = 0
    action: ActionReport | None = None
    started_at: str = field(default_factory=_timestamp)
    _spent: set[str] = field(default_factory=set)
    _runner: web.AppRunner | None = None
    _recycling: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/report", self._get_report),
                web.get("/healthz", self._ok),
                web.get("/readyz", self._ok),
                web.put("/config", self._put_config),
                web.post("/recycle", self._recycle),
                web.post("/restart", self._restart),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        if self._recycling is not None:
            self._recycling.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def reboot(self) -> None:
        """Be the next PID 1 of the same container volume."""
        self.boot_id, self.epoch, self.sequence = uuid.uuid4().hex, 0, 0
        self.started_at = _timestamp()
        self.script.residual_bytes = self.script.after_restart_bytes
        if self.action is not None and self.action.state is ActionState.ACTING:
            self._end(self.action.restart_id, self.action.step)

    def report(self) -> Report:
        self.sequence += 1
        script = self.script
        return Report(
            agent=AgentIdentity(
                version="0.0.0",
                mode=script.mode,
                boot_id=self.boot_id,
                epoch=self.epoch,
                started_at=self.started_at,
                pod=self.pod,
            ),
            sequence=self.sequence,
            observed_at=_timestamp(),
            config_generation=self.generation,
            devices=[
                DeviceReport(
                    uuid="CPU-0",
                    index=0,
                    kind=DeviceKind.CPU,
                    total_bytes=16 * GIB,
                    used_bytes=script.residual_bytes,
                    exclusive=False,
                )
            ],
            memory=MemoryReport(
                source=script.source,
                used_bytes=script.residual_bytes,
                model_bytes=0,
                residual_bytes=script.residual_bytes,
                host_bytes=0,
                classes=MemoryClasses(unattributed=script.residual_bytes),
            ),
            models=[],
            idle=script.idle,
            idle_since=self.started_at if script.idle else None,
            draining=False,
            action=self.action,
        )

    async def _get_report(self, _: web.Request) -> web.Response:
        return web.Response(
            body=msgspec.json.encode(self.report()), content_type="application/json"
        )

    async def _ok(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _put_config(self, request: web.Request) -> web.Response:
        body = await self._verified(request)
        config = msgspec.json.decode(body, type=AgentConfig)
        self.configs.append(config)
        self.generation = config.metadata.generation
        return web.json_response({})

    async def _recycle(self, request: web.Request) -> web.Response:
        order = msgspec.json.decode(await self._verified(request), type=RestartRequest)
        self.on_call("before", request.path)
        if self.script.recycle_status != 202:
            return web.json_response({"error": "not here"}, status=self.script.recycle_status)
        if not self._is_known(order.restart_id, ActionStep.RECYCLE):
            self._execute(order.restart_id, ActionStep.RECYCLE)
            if self.script.recycle_seconds:
                self._recycling = asyncio.create_task(self._recycle_slowly(order.restart_id))
            else:
                self._finish_recycle(order.restart_id)
        self.on_call("after", request.path)
        return web.json_response({}, status=202)

    async def _restart(self, request: web.Request) -> web.Response:
        order = msgspec.json.decode(await self._verified(request), type=RestartRequest)
        self.on_call("before", request.path)
        if self.script.restart_status != 202:
            return web.json_response({"error": "not here"}, status=self.script.restart_status)
        if not self._is_known(order.restart_id, ActionStep.IN_PLACE):
            self._execute(order.restart_id, ActionStep.IN_PLACE)
            self.on_exit()
        self.on_call("after", request.path)
        return web.json_response({}, status=202)

    def _is_known(self, restart_id: str, step: ActionStep) -> bool:
        known = self.action
        return known is not None and (known.restart_id, known.step) == (restart_id, step)

    async def _recycle_slowly(self, restart_id: str) -> None:
        await asyncio.sleep(self.script.recycle_seconds)
        self._finish_recycle(restart_id)

    def _finish_recycle(self, restart_id: str) -> None:
        self.epoch += 1
        self.script.residual_bytes = self.script.after_recycle_bytes
        self._end(restart_id, ActionStep.RECYCLE)

    def _execute(self, restart_id: str, step: ActionStep) -> None:
        began = asyncio.get_running_loop().time()
        self.executed.append(Executed(restart_id, step, self.boot_id, began))
        self._note(restart_id, step, ActionState.ACTING)

    def _end(self, restart_id: str, step: ActionStep) -> None:
        self.executed[-1].ended = asyncio.get_running_loop().time()
        self._note(restart_id, step, ActionState.DONE)

    def _note(self, restart_id: str, step: ActionStep, state: ActionState) -> None:
        self.action = ActionReport(restart_id=restart_id, step=step, state=state, at=_timestamp())

    async def _verified(self, request: web.Request) -> bytes:
        body = await request.read()
        if self.script.check_tokens:
            try:
                self._verify(request, body)
            except (jwt.InvalidTokenError, KeyError, ValueError) as error:
                self.refused.append(f"{request.method} {request.path}: {error!r}")
                raise web.HTTPUnauthorized(text=json.dumps({"error": str(error)})) from error
        return body

    def _verify(self, request: web.Request, body: bytes) -> None:
        token = request.headers["Authorization"].removeprefix("Bearer ")
        claims = self._decoded(token)
        if claims["act"] != f"{request.method} {request.raw_path}":
            raise ValueError("the token is for another call")
        if claims["bsha"] != hashlib.sha256(body).hexdigest():
            raise ValueError("the token is for another body")
        if claims["exp"] - datetime.now(UTC).timestamp() > 60:
            raise ValueError("the token lives too long")
        if claims["jti"] in self._spent:
            raise ValueError("the token is spent")
        self._spent.add(claims["jti"])

    def _decoded(self, token: str) -> dict[str, Any]:
        failure: Exception = ValueError("there is no public key")
        for part in self.public_keys().split(_END):
            if part.strip():
                key = load_pem_public_key((part + _END).encode())
                assert isinstance(key, Ed25519PublicKey)
                try:
                    return jwt.decode(
                        token,
                        key,
                        algorithms=["EdDSA"],
                        audience=self.pod.uid,
                        options={"require": ["exp", "aud", "jti", "act", "bsha"]},
                    )
                except jwt.InvalidTokenError as error:
                    failure = error
        raise failure
