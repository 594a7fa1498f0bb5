from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from vram_agent.serving.api_keys import ApiKeyError, ApiKeys

from tests.unit.agent.serving.conftest import Agent, StartAgent

NEEDED = "this agent needs an API key; send Authorization: Bearer <key>"
UNKNOWN = "the API key is not one that this agent knows"
CALLS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/whisper"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/audio/translations"),
    ("POST", "/v1/audio/speech"),
    ("GET", "/v1/nothing"),
    ("GET", "/v2"),
    ("GET", "/v2/models/adder"),
    ("GET", "/v2/models/adder/ready"),
    ("POST", "/v2/models/adder/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/adder/load"),
    ("POST", "/v2/repository/models/adder/unload"),
    ("GET", "/"),
    ("GET", "/v2/health/live/"),
    ("POST", "/v2/health/live"),
]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(b"# the demo's\nfirst-key\n\n  second-key \r\n")
    return path


@pytest.fixture
async def agent(start_agent: StartAgent, key_file: Path) -> Agent:
    return await start_agent(api_key_file=str(key_file))


async def call(
    agent: Agent, method: str, path: str, authorization: str | None = None
) -> tuple[int, Any]:
    headers = {} if authorization is None else {"Authorization": authorization}
    async with agent.session.request(method, agent.serving(path), headers=headers) as answer:
        if answer.status == 401:
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        return answer.status, await answer.json()


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_without_a_key_no_call_is_answered_in_its_api_s_format(
    agent: Agent, method: str, path: str
) -> None:
    openai = {
        "message": NEEDED,
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert await call(agent, method, path) == (
        401,
        {"error": openai if path.startswith("/v1/") else NEEDED},
    )
    assert not agent.server.submissions
    assert not agent.server.calls


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
async def test_probes_need_no_key(agent: Agent, path: str) -> None:
    assert (await call(agent, "GET", path))[0] == 200


@pytest.mark.parametrize(
    "authorization",
    ["Bearer first-key", "Bearer second-key", "bearer first-key", "Bearer   first-key "],
)
async def test_each_key_of_the_file_is_known(agent: Agent, authorization: str) -> None:
    assert (await call(agent, "GET", "/v1/models", authorization))[0] == 200


@pytest.mark.parametrize(
    ("authorization", "message"),
    [
        pytest.param("Bearer first", UNKNOWN, id="the beginning of a key"),
        pytest.param("Bearer first-key2", UNKNOWN, id="more than a key"),
        pytest.param("Bearer FIRST-KEY", UNKNOWN, id="in capitals"),
        pytest.param("Bearer # the demo's", UNKNOWN, id="a comment"),
        pytest.param("Bearer \xfc", UNKNOWN, id="no ASCII"),
        pytest.param("Bearer", NEEDED, id="a scheme alone"),
        pytest.param("Bearer ", NEEDED, id="an empty key"),
        pytest.param("Basic first-key", NEEDED, id="another scheme"),
        pytest.param("first-key", NEEDED, id="no scheme"),
        pytest.param("", NEEDED, id="nothing"),
    ],
)
async def test_what_is_no_known_key_is_refused(
    agent: Agent, authorization: str, message: str
) -> None:
    status, body = await call(agent, "GET", "/v2", authorization)
    assert (status, body) == (401, {"error": message})


def test_keys_rotate_while_the_agent_runs(key_file: Path) -> None:
    keys = ApiKeys(str(key_file))
    keys.ensure_known("Bearer first-key")
    key_file.write_text("third-key\n")
    keys.ensure_known("Bearer third-key")
    with pytest.raises(ApiKeyError):
        keys.ensure_known("Bearer first-key")
    key_file.unlink()
    with pytest.raises(ApiKeyError):
        keys.ensure_known("Bearer third-key")


async def test_a_client_that_asks_first_sends_no_body_without_a_key(agent: Agent) -> None:
    host, _, port = agent.running.serving_address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
        b"Content-Length: 1000\r\n\r\n"
    )
    assert (await reader.readline()).split()[1] == b"401"
    writer.close()


async def test_the_control_port_has_its_own_way(agent: Agent) -> None:
    async with agent.session.get(agent.control("/report")) as answer:
        assert answer.status == 200


def test_no_file_of_keys_admits_everyone() -> None:
    ApiKeys("").ensure_known(None)


def test_a_file_that_is_missing_or_has_no_key_admits_nobody(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = ApiKeys(str(path))
    with pytest.raises(ApiKeyError, match="not one that"):
        keys.ensure_known("Bearer x")
    path.write_text("# none\n\n")
    with capture_logs() as logged, pytest.raises(ApiKeyError):
        keys.ensure_known("Bearer x")
    with capture_logs() as again, pytest.raises(ApiKeyError):
        keys.ensure_known("Bearer x")
    assert [(entry["log_level"], entry["path"]) for entry in logged] == [("warning", str(path))]
    assert again == []


def test_what_is_logged_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("secret-key\nanother\n")
    with capture_logs() as logged:
        ApiKeys(str(path)).ensure_known("Bearer secret-key")
    assert logged == [{"event": "API keys read", "log_level": "info", "path": str(path), "keys": 2}]
