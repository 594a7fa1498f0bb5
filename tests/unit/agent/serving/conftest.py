"""Real servers on loopback in front of a scripted ModelServer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import pytest
from vram_agent.metrics import AgentMetrics
from vram_agent.protocol import (
    AgentConfig,
    ControlPolicy,
    Limits,
    Listen,
    PodIdentity,
    QueuePolicy,
    ServingPolicy,
)
from vram_agent.serving.app import RunningServers, start_servers

from tests.support.server import FakeModelServer

ANY_PORT = Listen(serving="127.0.0.1:0", control="127.0.0.1:0")


@dataclass
class Agent:
    """One agent: what it was asked, and how to reach it."""

    server: FakeModelServer
    running: RunningServers
    session: aiohttp.ClientSession

    def serving(self, path: str) -> str:
        return f"http://{self.running.serving_address}{path}"

    def control(self, path: str) -> str:
        return f"http://{self.running.control_address}{path}"


StartAgent = Callable[..., Awaitable[Agent]]


@pytest.fixture
async def start_agent() -> AsyncIterator[StartAgent]:
    started: list[Agent] = []

    async def start(
        server: FakeModelServer | None = None,
        *,
        request_bytes: str = "64Mi",
        max_depth: int = 256,
        control: ControlPolicy | None = None,
        pod_uid: str = "pod-uid",
        api_key_file: str = "",
    ) -> Agent:
        config = AgentConfig(
            listen=ANY_PORT,
            limits=Limits(request_bytes=request_bytes),
            queue=QueuePolicy(max_depth=max_depth),
            serving=ServingPolicy(api_key_file=api_key_file),
            control=control or ControlPolicy(public_key_file="/nonexistent/keys.pem"),
        )
        server = server or FakeModelServer()
        running = await start_servers(
            server, config, PodIdentity(uid=pod_uid), AgentMetrics("0.1.0")
        )
        agent = Agent(server, running, aiohttp.ClientSession())
        started.append(agent)
        return agent

    yield start
    for agent in started:
        await agent.session.close()
        await agent.running.close()


@pytest.fixture
async def agent(start_agent: StartAgent) -> Agent:
    return await start_agent()
