"""The client against a protocol-true agent: reports, signed calls, and what goes wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from vram_agent.protocol import PodIdentity
from vram_operator.agent_client import AgentAddress, AgentClient, AgentError
from vram_operator.signing import Signer, public_pem

from tests.support.agents import GIB, FakeAgent, Script


class StoppedClock:
    def __init__(self) -> None:
        self.moment = datetime.now(UTC)

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.moment.timestamp()


KEY = Ed25519PrivateKey.generate()
OLD_KEY = Ed25519PrivateKey.generate()
BOTH = public_pem(KEY) + public_pem(OLD_KEY)
POD = PodIdentity(namespace="models", name="speech-1", uid="uid-1")


def signer(key: Ed25519PrivateKey = KEY) -> Signer:
    return Signer(key, public_pem(key), StoppedClock())


@pytest.fixture
async def agent() -> AsyncIterator[tuple[FakeAgent, AgentAddress]]:
    fake = FakeAgent(POD, lambda: BOTH, Script(residual_bytes=3 * GIB))
    port = await fake.start("127.0.0.1", 0)
    yield fake, AgentAddress("127.0.0.1", port, POD.uid)
    await fake.stop()


@pytest.fixture
async def client() -> AsyncIterator[AgentClient]:
    async with aiohttp.ClientSession() as session:
        yield AgentClient(session, signer)


Agent = tuple[FakeAgent, AgentAddress]


async def test_a_report_is_read(agent: Agent, client: AgentClient) -> None:
    fake, address = agent
    report = await client.report(address)
    assert report.agent.boot_id == fake.boot_id
    assert report.memory.residual_bytes == 3 * GIB


async def test_the_report_of_another_pod_is_not_believed(agent: Agent, client: AgentClient) -> None:
    _, address = agent
    with pytest.raises(AgentError, match="another pod, speech-1"):
        await client.report(AgentAddress(address.ip, address.port, "uid-2"))


async def test_nobody_there_is_an_agent_error(agent: Agent, client: AgentClient) -> None:
    fake, address = agent
    await fake.stop()
    with pytest.raises(AgentError, match="does not answer"):
        await client.report(address)
    answer = await client.call(address, "POST", "/scrub", {})
    assert answer.status == 0
    assert "does not answer" in answer.message


@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (200, b"<html>", "is no report"),
        (200, b"{}", "is no report"),
        (200, b"x" * (5 * 1024 * 1024), "more than"),
        (302, b"", "answered 302"),
        (500, b"", "answered 500"),
    ],
)
async def test_what_is_no_report_is_an_agent_error(
    client: AgentClient, status: int, body: bytes, complaint: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_get("/report", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        port = runner.addresses[0][1]
        with pytest.raises(AgentError, match=complaint):
            await client.report(AgentAddress("127.0.0.1", port, "uid-1"))
    finally:
        await runner.cleanup()


async def test_a_signed_call_is_obeyed_once(agent: Agent, client: AgentClient) -> None:
    fake, address = agent
    body = {"restartID": "r-1", "drainTimeoutSeconds": 5}
    for _ in range(2):
        answer = await client.call(address, "POST", "/recycle", body)
        assert answer.status == 202
    assert [one.restart_id for one in fake.executed] == ["r-1"]
    assert fake.refused == []


async def test_the_previous_key_still_opens(agent: Agent) -> None:
    _, address = agent
    async with aiohttp.ClientSession() as session:
        old = AgentClient(session, lambda: signer(OLD_KEY))
        answer = await old.call(address, "POST", "/recycle", {"restartID": "r-1"})
    assert answer.status == 202


async def test_a_foreign_key_is_refused_and_nothing_happens(agent: Agent) -> None:
    fake, address = agent
    async with aiohttp.ClientSession() as session:
        foreign = AgentClient(session, lambda: signer(Ed25519PrivateKey.generate()))
        answer = await foreign.call(address, "POST", "/recycle", {"restartID": "r-1"})
    assert answer.status == 401
    assert fake.executed == []


async def test_the_words_of_a_refusal_come_back(agent: Agent, client: AgentClient) -> None:
    fake, address = agent
    fake.script.recycle_status = 501
    answer = await client.call(address, "POST", "/recycle", {"restartID": "r-1"})
    assert (answer.status, answer.message) == (501, "not here")


def test_a_token_is_for_one_call_one_pod_and_under_a_minute() -> None:
    made = signer()
    first = made.token("uid-1", "POST /models/m/offload?tier=Host", b"{}")
    second = made.token("uid-1", "POST /models/m/offload?tier=Host", b"{}")
    claims = jwt.decode(first, KEY.public_key(), algorithms=["EdDSA"], audience="uid-1")
    assert claims["act"] == "POST /models/m/offload?tier=Host"
    # SHA-256 of "{}"
    assert claims["bsha"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert 0 < claims["exp"] - claims["iat"] <= 60
    other = jwt.decode(second, KEY.public_key(), algorithms=["EdDSA"], audience="uid-1")
    assert other["jti"] != claims["jti"]
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(first, KEY.public_key(), algorithms=["EdDSA"], audience="uid-2")
