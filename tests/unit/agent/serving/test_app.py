from __future__ import annotations

import asyncio
import socket
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs
from vram_agent.backend import TaskResult, Tensor
from vram_agent.errors import (
    AgentError,
    DrainingError,
    ModelFailedError,
    NoVramError,
    QueueFullError,
    QueueTimeoutError,
    TaskFailedError,
    WorkerDiedError,
)
from vram_agent.metrics import AgentMetrics
from vram_agent.protocol import AgentConfig, Listen, PodIdentity
from vram_agent.serving.app import ListenError, start_control, start_servers

from tests.support.server import FakeModelServer
from tests.unit.agent.serving.conftest import ANY_PORT, Agent, StartAgent

INFER = "/v2/models/adder/infer"
QUESTION = {"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [1]}]}


async def infer(agent: Agent) -> tuple[aiohttp.ClientResponse, Any]:
    async with agent.session.post(agent.serving(INFER), json=QUESTION) as answer:
        return answer, await answer.json()


async def metric(agent: Agent, line: str) -> str:
    """Return the value of a sample, empty where there is none."""
    async with agent.session.get(agent.control("/metrics")) as answer:
        text = await answer.text()
    values = [row.rsplit(" ", 1)[1] for row in text.splitlines() if row.startswith(line + " ")]
    return values[0] if values else ""


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        pytest.param(
            QueueFullError("the queue is full", retry_after_seconds=2.1), 429, "3", id="rounded up"
        ),
        pytest.param(QueueFullError("full", retry_after_seconds=0.0), 429, "1", id="at least 1"),
        pytest.param(QueueFullError("full"), 429, "1", id="429 without a time"),
        pytest.param(DrainingError("draining", retry_after_seconds=25), 503, "25", id="draining"),
        pytest.param(ModelFailedError("no file"), 503, "30", id="failed"),
        pytest.param(NoVramError("no room", retry_after_seconds=4), 503, "4", id="no VRAM"),
        pytest.param(QueueTimeoutError("waited 300 s"), 504, "1", id="waited too long"),
        pytest.param(WorkerDiedError("signal 9"), 502, None, id="died"),
        pytest.param(TaskFailedError("KeyError: x"), 500, None, id="the model's code raised"),
    ],
)
async def test_errors_of_the_supervisor_become_answers(
    agent: Agent, error: AgentError, status: int, retry_after: str | None
) -> None:
    agent.server.error = error
    answer, body = await infer(agent)
    assert (answer.status, body) == (status, {"error": error.message})
    assert answer.headers.get("Retry-After") == retry_after


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        pytest.param(QueueFullError("full"), "rate_limit_error", "queue_full", id="429"),
        pytest.param(DrainingError("draining"), "server_error", "draining", id="503"),
    ],
)
async def test_openai_errors_have_their_format(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, error: AgentError, kind: str, code: str
) -> None:
    def failing(_: str) -> Any:
        raise error

    monkeypatch.setattr(agent.server, "model", failing)
    async with agent.session.get(agent.serving("/v1/models/whisper")) as answer:
        assert await answer.json() == {
            "error": {"message": error.message, "type": kind, "param": None, "code": code}
        }
        assert answer.headers["Retry-After"]


@pytest.mark.parametrize("binary", [False, True], ids=["an answer at once", "an answer in pieces"])
async def test_answers_of_a_draining_agent_say_that_the_connection_closes(
    agent: Agent, binary: bool
) -> None:
    data = bytes(4 * 100_000)
    agent.server.result = TaskResult(
        tensors=[Tensor(name="sum", datatype="FP32", shape=(100_000,), data=data)]
    )
    body = {
        "inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [1]}],
        "parameters": {"binary_data_output": binary},
    }
    for is_ready in (True, False):
        agent.server.ready = is_ready
        async with agent.session.post(agent.serving(INFER), json=body) as answer:
            assert answer.status == 200
            assert len(await answer.read()) >= 100_000
            assert answer.headers.get("Connection") == (None if is_ready else "close")


async def test_the_unexpected_is_logged_once_and_not_told(agent: Agent) -> None:
    agent.server.error = RuntimeError("secret detail")
    with capture_logs() as logged:
        answer, body = await infer(agent)
    assert (answer.status, body) == (500, {"error": "internal error; the agent's log says more"})
    assert logged == [
        {
            "event": "request failed",
            "log_level": "error",
            "exc_info": True,
            "method": "POST",
            "path": INFER,
        }
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/nothing", {"error": "GET /v2/nothing: no such call"}),
        (
            "/v1/nothing",
            {
                "error": {
                    "message": "GET /v1/nothing: no such call",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": "not_found",
                }
            },
        ),
    ],
)
async def test_unknown_calls_are_not_found_in_each_api_s_format(
    agent: Agent, path: str, expected: Any
) -> None:
    async with agent.session.get(agent.serving(path)) as answer:
        assert (answer.status, await answer.json()) == (404, expected)


async def test_a_wrong_method_names_the_right_one(agent: Agent) -> None:
    async with agent.session.get(agent.serving(INFER)) as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == "POST"
        assert await answer.json() == {"error": f"GET {INFER}: use POST"}


async def test_a_client_that_goes_away_gives_up_its_place_and_is_counted(agent: Agent) -> None:
    agent.server.gate.clear()
    asking = asyncio.create_task(infer(agent))
    await agent.server.submitted.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(agent.server.abandoned.wait(), timeout=10)
    counted = 'vram_agent_requests_total{api="infer",code="499",model="adder"}'
    assert await metric(agent, counted) == "1.0"


async def test_requests_are_counted_by_model_api_and_code(agent: Agent) -> None:
    await infer(agent)
    await infer(agent)
    async with agent.session.get(agent.serving("/v2/models/adder")):
        pass
    prefix = "vram_agent_requests_total"
    assert await metric(agent, f'{prefix}{{api="infer",code="200",model="adder"}}') == "2.0"
    assert await metric(agent, f'{prefix}{{api="metadata",code="200",model="adder"}}') == "1.0"
    seconds = 'vram_agent_request_seconds_count{api="infer",model="adder"}'
    assert await metric(agent, seconds) == "2.0"


async def test_names_that_clients_make_up_never_become_labels(agent: Agent) -> None:
    for number in range(5):
        async with agent.session.post(agent.serving(f"/v2/models/made-up-{number}/infer")):
            pass
        async with agent.session.get(agent.serving(f"/made-up-{number}")):
            pass
    async with agent.session.get(agent.control("/metrics")) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "made-up" not in await answer.text()
    unknown = 'vram_agent_requests_total{api="infer",code="404",model=""}'
    assert await metric(agent, unknown) == "5.0"


async def test_answers_do_not_name_the_libraries(agent: Agent) -> None:
    answer, _ = await infer(agent)
    assert answer.headers["Server"] == "vram-agent"


async def test_a_port_in_use_is_one_clear_error_and_nothing_listens() -> None:
    with socket.socket() as free, socket.socket() as taken:
        free.bind(("127.0.0.1", 0))
        control = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serving = f"127.0.0.1:{taken.getsockname()[1]}"
        config = AgentConfig(listen=Listen(serving=serving, control=control))
        with pytest.raises(ListenError) as caught:
            await start_servers(FakeModelServer(), config, PodIdentity(), AgentMetrics("0"))
    assert str(caught.value) == (
        f"listen.serving: cannot listen on {serving}: the address is in use; "
        "choose another one, or end the process that holds it"
    )
    host, _, port = control.partition(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("address", ["8000", "localhost", "localhost:", "a:70000", "a:-1", ""])
async def test_what_is_no_address_is_refused(address: str) -> None:
    config = AgentConfig(listen=Listen(serving="127.0.0.1:0", control=address))
    with pytest.raises(ListenError, match=r"listen\.control: .* is not host:port"):
        await start_servers(FakeModelServer(), config, PodIdentity(), AgentMetrics("0"))


async def test_ipv6_addresses_stand_in_brackets() -> None:
    config = AgentConfig(listen=Listen(serving="[::1]:0", control="[::1]:0"))
    running = await start_servers(FakeModelServer(), config, PodIdentity(), AgentMetrics("0"))
    assert running.serving_address.startswith("[::1]:")
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{running.serving_address}/v2") as answer,
    ):
        assert answer.status == 200
    await running.close()


async def test_the_control_port_stands_alone_where_a_library_is_embedded() -> None:
    running = await start_control(
        FakeModelServer(), AgentConfig(listen=ANY_PORT), PodIdentity(), AgentMetrics("0")
    )
    assert running.serving_address == ""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{running.control_address}/report") as answer,
    ):
        assert answer.status == 200
    await running.close()


async def test_closing_twice_is_closing_once(start_agent: StartAgent) -> None:
    agent = await start_agent()
    await agent.running.close()
    await agent.running.close()
    with pytest.raises(aiohttp.ClientConnectorError):
        await infer(agent)


async def test_an_answer_that_is_under_way_is_finished_while_closing(agent: Agent) -> None:
    agent.server.gate.clear()
    asking = asyncio.create_task(infer(agent))
    await agent.server.submitted.wait()
    closing = asyncio.create_task(agent.running.close())
    agent.server.gate.set()
    answer, _ = await asking
    assert answer.status == 200
    await closing
