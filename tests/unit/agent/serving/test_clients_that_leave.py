"""Clients that leave or stall at each stage, over real sockets: nothing of theirs stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import Awaitable, Callable

import pytest
from structlog.testing import capture_logs
from vram_agent.backend import TaskResult, Tensor
from vram_agent.errors import QueueFullError
from vram_agent.protocol import AgentConfig, QueuePolicy
from vram_agent.serving.limits import RequestLimits
from vram_agent.serving.places import Places

from tests.support.server import FakeModelServer, absent_view, speaking_view, speech_view
from tests.unit.agent.serving.conftest import Agent, StartAgent
from tests.unit.agent.serving.test_app import metric
from tests.unit.agent.serving.test_uploads import scratch_files

INFER = "/v2/models/adder/infer"
SPEECH = "/v1/audio/speech"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
QUESTION = {"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [1]}]}
MEBIBYTE = 1024**2
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + bytes(
    2 * MEBIBYTE
)


class Client:
    """A socket, and what was written to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, agent: Agent) -> Client:
        host, _, port = agent.running.serving_address.partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def send(self, path: str, body: bytes, *, announced: int | None = None) -> None:
        kind = "multipart/form-data; boundary=b" if body.startswith(b"--b") else "application/json"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body) if announced is None else announced}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    def leave(self) -> None:
        """Close at once, whatever is under way: the other side gets a reset."""
        self.writer.transport.abort()


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """The server learns of a closed socket by itself: asking again is the only way to see it."""
    async with asyncio.timeout(20):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def is_admitted(agent: Agent) -> bool:
    async with agent.session.post(agent.serving(INFER), json=QUESTION) as answer:
        assert answer.status in {200, 429}
        return answer.status == 200


def count_of_499(api: str, model: str) -> str:
    return f'vram_agent_requests_total{{api="{api}",code="499",model="{model}"}}'


@pytest.fixture
def server() -> FakeModelServer:
    views = [absent_view("adder"), speech_view(), speaking_view()]
    return FakeModelServer(views)


@pytest.fixture
async def agent(start_agent: StartAgent, server: FakeModelServer) -> Agent:
    """An agent with two places."""
    return await start_agent(server, max_depth=1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(INFER, json.dumps(QUESTION).encode(), id="JSON"),
        pytest.param(INFER, b" " * 3 * MEBIBYTE, id="a large body"),
        pytest.param(TRANSCRIPTIONS, FORM, id="an upload"),
    ],
)
async def test_who_leaves_while_sending_gives_the_place_up(
    agent: Agent, path: str, body: bytes
) -> None:
    files = scratch_files()
    clients = [await Client.connect(agent) for _ in range(2)]
    for client in clients:
        await client.send(path, body, announced=len(body) + 10)

    async def is_full() -> bool:
        return not await is_admitted(agent)

    await until(is_full)
    clients[0].leave()
    await until(lambda: is_admitted(agent))
    clients[1].leave()

    async def are_gone() -> bool:
        return scratch_files() == files

    await until(are_gone)


async def test_who_leaves_the_queue_gives_the_place_up_and_is_counted(
    agent: Agent, server: FakeModelServer
) -> None:
    server.gate.clear()
    client = await Client.connect(agent)
    await client.send(INFER, json.dumps(QUESTION).encode())
    await server.submitted.wait()
    client.leave()
    await asyncio.wait_for(server.abandoned.wait(), timeout=20)

    async def is_counted() -> bool:
        return await metric(agent, count_of_499("infer", "adder")) == "1.0"

    await until(is_counted)


@pytest.mark.parametrize(
    ("path", "question", "result", "counted"),
    [
        pytest.param(
            INFER,
            {**QUESTION, "parameters": {"binary_data_output": True}},
            TaskResult(
                tensors=(
                    Tensor(
                        name="y",
                        datatype="UINT8",
                        shape=(64 * MEBIBYTE,),
                        data=bytes(64 * MEBIBYTE),
                    ),
                )
            ),
            ("infer", "adder"),
            id="tensors",
        ),
        pytest.param(
            SPEECH,
            {"model": "tts", "input": "a", "response_format": "wav"},
            TaskResult(
                values={"rate": 24_000},
                tensors=(
                    Tensor(
                        name="audio",
                        datatype="INT16",
                        shape=(16 * MEBIBYTE,),
                        data=struct.pack("<h", 1) * 16 * MEBIBYTE,
                    ),
                ),
            ),
            ("speech", "tts"),
            id="speech",
        ),
    ],
)
async def test_who_leaves_while_the_answer_is_sent_is_counted_and_no_fault(
    agent: Agent, path: str, question: object, result: TaskResult, counted: tuple[str, str]
) -> None:
    agent.server.result = result
    with capture_logs() as logged:
        clients = [await Client.connect(agent) for _ in range(2)]
        for client in clients:
            await client.send(path, json.dumps(question).encode())
            assert (await client.reader.readline()).split()[1] == b"200"
        agent.server.result = TaskResult()
        assert not await is_admitted(agent), "a place lasts as long as its answer"
        for client in clients:
            client.leave()

        async def is_counted() -> bool:
            return await metric(agent, count_of_499(*counted)) == "2.0"

        await until(is_counted)
        assert await is_admitted(agent)
    assert [entry for entry in logged if entry["log_level"] == "error"] == []


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("requests", "streams"):
        monkeypatch.setattr(f"vram_agent.serving.{module}.STALL_SECONDS", 0.2)


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        pytest.param(INFER, b"{", b'{"error":"nothing more of the request came', id="JSON"),
        pytest.param(TRANSCRIPTIONS, FORM, b'"code":"request_timeout"', id="an upload"),
        pytest.param(TRANSCRIPTIONS, b"--b", b'"code":"request_timeout"', id="half a boundary"),
    ],
)
async def test_who_stops_sending_is_told_and_gives_the_place_up(
    agent: Agent, short_patience: None, path: str, body: bytes, error: bytes
) -> None:
    client = await Client.connect(agent)
    await client.send(path, body, announced=len(body) + 10)
    assert (await client.reader.readline()).split()[1] == b"408"
    await client.reader.readuntil(b"\r\n\r\n")
    assert error in await client.reader.readuntil(b"}")
    client.leave()


async def test_who_stops_taking_the_answer_gives_the_place_up(
    agent: Agent, short_patience: None
) -> None:
    size = 64 * MEBIBYTE
    agent.server.result = TaskResult(
        tensors=(Tensor(name="y", datatype="UINT8", shape=(size,), data=bytes(size)),)
    )
    client = await Client.connect(agent)
    question = {**QUESTION, "parameters": {"binary_data_output": True}}
    await client.send(INFER, json.dumps(question).encode())
    assert (await client.reader.readline()).split()[1] == b"200"

    async def is_counted() -> bool:
        return await metric(agent, count_of_499("infer", "adder")) == "1.0"

    await until(is_counted)
    client.leave()


def test_who_finds_no_place_is_told_when_one_is_likely_free() -> None:
    now = 0.0
    config = AgentConfig(queue=QueuePolicy(max_depth=3))
    places = Places(RequestLimits(config), lambda: now)
    with places.take():
        now += 40.0
    with contextlib.ExitStack() as taken:
        for _ in range(4):
            taken.enter_context(places.take())
        with pytest.raises(QueueFullError) as caught, places.take():
            pass
    assert caught.value.retry_after_seconds == pytest.approx(40.0 / 4)
