from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from vram_agent.errors import AgentError, BadInputError, NotSupportedError
from vram_agent.protocol import (
    ActionStep,
    AgentConfig,
    ControlPolicy,
    Limits,
    OffloadTier,
    RestartRequest,
)
from yarl import URL

from tests.support.server import FakeModelServer
from tests.unit.agent.serving.conftest import Agent, StartAgent

RESTART = b'{"restartID": "r-1", "drainTimeoutSeconds": 5}'
SIGNED_CALLS = [
    ("POST", "/models/adder/load"),
    ("POST", "/models/adder/offload"),
    ("POST", "/models/adder/unload"),
    ("POST", "/scrub"),
    ("POST", "/drain"),
    ("POST", "/resume"),
    ("PUT", "/config"),
    ("POST", "/recycle"),
    ("POST", "/restart"),
]


@dataclass
class Operator:
    """Signs calls as the operator does."""

    agent: Agent
    key: Ed25519PrivateKey

    def token(self, method: str, target: str, body: bytes = b"") -> str:
        claims = {
            "aud": "pod-uid",
            "exp": time.time() + 30,
            "jti": uuid.uuid4().hex,
            "act": f"{method} {target}",
            "bsha": hashlib.sha256(body).hexdigest(),
        }
        return jwt.encode(claims, self.key, algorithm="EdDSA")

    async def call(
        self, method: str, target: str, body: bytes = b"", token: str | None = None
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token or self.token(method, target, body)}"}
        async with self.agent.session.request(
            method, self.agent.control(target), data=body, headers=headers
        ) as answer:
            return answer.status, await answer.json()


@pytest.fixture
def server() -> FakeModelServer:
    return FakeModelServer()


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def trust(tmp_path: Path, key: Ed25519PrivateKey) -> ControlPolicy:
    path = tmp_path / "keys.pem"
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return ControlPolicy(public_key_file=str(path))


@pytest.fixture
async def operator(
    start_agent: StartAgent,
    server: FakeModelServer,
    key: Ed25519PrivateKey,
    trust: ControlPolicy,
) -> Operator:
    return Operator(await start_agent(server, control=trust), key)


async def test_probes_follow_the_supervisor(agent: Agent) -> None:
    for path in ("/healthz", "/readyz"):
        async with agent.session.get(agent.control(path)) as answer:
            assert answer.status == 200
    agent.server.live = agent.server.ready = False
    for path in ("/healthz", "/readyz"):
        async with agent.session.get(agent.control(path)) as answer:
            assert answer.status == 503


async def test_the_report_is_open_and_never_cached(agent: Agent) -> None:
    async with agent.session.get(agent.control("/report")) as answer:
        body = await answer.json()
    assert answer.headers["Cache-Control"] == "no-store"
    assert body["protocol"] == "v1"
    assert body["agent"]["bootID"] == "boot-1"
    assert body["memory"]["classes"]["contextAndLibraries"] == 2900
    assert body["action"] is None
    assert body["sequence"] == 1


@pytest.mark.parametrize(("method", "path"), SIGNED_CALLS)
async def test_unsigned_calls_do_nothing(agent: Agent, method: str, path: str) -> None:
    async with agent.session.request(method, agent.control(path), data=RESTART) as answer:
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert await answer.json() == {"error": "this call needs a token that the operator signed"}
    assert agent.server.calls == []


@pytest.mark.parametrize("header", ["Basic eDp5", "Bearer", "Bearer  ", "Bearer nonsense"])
async def test_what_is_no_token_is_refused(operator: Operator, header: str) -> None:
    headers = {"Authorization": header}
    async with operator.agent.session.post(
        operator.agent.control("/drain"), headers=headers
    ) as answer:
        assert answer.status == 401
    assert operator.agent.server.calls == []


@pytest.mark.parametrize(
    ("target", "call"),
    [
        pytest.param("/models/adder/load", ("load", "adder"), id="load"),
        pytest.param("/models/adder/unload", ("unload", "adder"), id="unload"),
        pytest.param("/models/adder/offload", ("offload", "adder", None), id="offload"),
        pytest.param(
            "/models/adder/offload?tier=Disk",
            ("offload", "adder", OffloadTier.DISK),
            id="offload to a tier",
        ),
    ],
)
async def test_calls_for_a_model_answer_its_report(
    operator: Operator, server: FakeModelServer, target: str, call: tuple[object, ...]
) -> None:
    status, body = await operator.call("POST", target)
    assert (status, body["name"], body["state"]) == (200, "adder", "Resident")
    assert server.calls == [call]


@pytest.mark.parametrize("name", ["scrub", "drain", "resume"])
async def test_calls_for_the_agent_answer_its_report(
    operator: Operator, server: FakeModelServer, name: str
) -> None:
    status, body = await operator.call("POST", f"/{name}")
    assert (status, body["protocol"]) == (200, "v1")
    assert server.calls == [(name,)]


async def test_an_unknown_tier_is_refused(operator: Operator, server: FakeModelServer) -> None:
    assert await operator.call("POST", "/models/adder/offload?tier=Tape") == (
        400,
        {"error": "tier: 'Tape' is not one of PinnedHost, Host, Disk"},
    )
    assert server.calls == []


async def test_an_unknown_model_is_not_found(operator: Operator) -> None:
    assert (await operator.call("POST", "/models/gone/load"))[0] == 404


@pytest.mark.parametrize(
    ("path", "step"), [("/recycle", ActionStep.RECYCLE), ("/restart", ActionStep.IN_PLACE)]
)
async def test_a_restart_is_accepted_at_once_and_again(
    operator: Operator, server: FakeModelServer, path: str, step: ActionStep
) -> None:
    first = await operator.call("POST", path, RESTART)
    again = await operator.call("POST", path, RESTART)
    assert first == again
    assert first[0] == 202
    assert first[1]["restartID"] == "r-1"
    assert first[1]["step"] == step.value
    request = RestartRequest(restart_id="r-1", drain_timeout_seconds=5)
    assert server.calls == [(step, request), (step, request)]


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"restartID": ""}', b'{"restartID": "r", "drainTimeoutSeconds": -1}']
)
async def test_a_restart_without_a_good_body_is_refused(
    operator: Operator, server: FakeModelServer, body: bytes
) -> None:
    assert (await operator.call("POST", "/restart", body))[0] == 400
    assert server.calls == []


async def test_what_a_mode_cannot_do_is_501(operator: Operator, server: FakeModelServer) -> None:
    server.error = NotSupportedError("an embedded agent cannot end its application's process")
    assert await operator.call("POST", "/recycle", RESTART) == (
        501,
        {"error": "an embedded agent cannot end its application's process"},
    )


async def test_a_config_is_applied_and_its_limits_hold_at_once(
    operator: Operator, server: FakeModelServer
) -> None:
    config = AgentConfig(limits=Limits(request_bytes="10"))
    body = json.dumps({"limits": {"requestBytes": "10"}}).encode()
    assert (await operator.call("PUT", "/config", body))[0] == 200
    assert server.calls == [("apply_config", config)]
    agent = operator.agent
    async with agent.session.post(
        agent.serving("/v2/models/adder/infer"), data=b"x" * 11
    ) as answer:
        assert answer.status == 413


async def test_a_config_that_is_refused_changes_no_limit(
    operator: Operator, server: FakeModelServer
) -> None:
    server.error = BadInputError("listen cannot be changed while the agent runs")
    body = json.dumps({"limits": {"requestBytes": "10"}}).encode()
    assert (await operator.call("PUT", "/config", body))[0] == 400
    agent = operator.agent
    async with agent.session.post(
        agent.serving("/v2/models/adder/infer"), data=b"x" * 11
    ) as answer:
        assert answer.status == 400


async def test_a_config_with_an_unknown_field_is_refused(
    operator: Operator, server: FakeModelServer
) -> None:
    status, body = await operator.call("PUT", "/config", b'{"modles": []}')
    assert status == 400
    assert "modles" in body["error"]
    assert "models" in body["error"]
    assert server.calls == []


@pytest.mark.parametrize("body", [b"", b"[]", b"models: []", b"\xff"])
async def test_what_is_no_json_object_is_no_config(
    operator: Operator, server: FakeModelServer, body: bytes
) -> None:
    assert (await operator.call("PUT", "/config", body))[0] == 400
    assert server.calls == []


async def test_a_body_beyond_a_mebibyte_is_refused(
    operator: Operator, server: FakeModelServer
) -> None:
    body = b" " * (1024**2 + 1)
    headers = {"Authorization": f"Bearer {operator.token('PUT', '/config', body)}"}
    async with operator.agent.session.put(
        operator.agent.control("/config"), data=BytesIO(body), headers=headers
    ) as answer:
        assert answer.status == 413
        assert await answer.json() == {"error": "the request is larger than 1Mi bytes"}
    assert server.calls == []


async def test_a_token_is_spent_by_the_call_it_is_for(
    operator: Operator, server: FakeModelServer
) -> None:
    token = operator.token("POST", "/drain")
    assert (await operator.call("POST", "/scrub", token=token))[0] == 403
    assert (await operator.call("POST", "/drain", b"x", token=token))[0] == 403
    assert (await operator.call("POST", "/drain", token=token))[0] == 200
    assert await operator.call("POST", "/drain", token=token) == (
        403,
        {"error": "the token is spent"},
    )
    assert server.calls == [("drain",)]


async def test_the_action_has_the_query_as_it_was_sent(
    operator: Operator, server: FakeModelServer
) -> None:
    token = operator.token("POST", "/models/adder/offload")
    status, body = await operator.call("POST", "/models/adder/offload?tier=Disk", token=token)
    assert status == 403
    assert "not for POST /models/adder/offload?tier=Disk" in body["error"]
    assert server.calls == []


async def test_without_a_pod_uid_the_agent_refuses_and_says_why(
    start_agent: StartAgent, key: Ed25519PrivateKey, trust: ControlPolicy
) -> None:
    operator = Operator(await start_agent(control=trust, pod_uid=""), key)
    status, body = await operator.call("POST", "/drain")
    assert (status, body) == (403, {"error": "control calls are refused: POD_UID is not set"})
    assert operator.agent.server.calls == []


async def test_without_a_key_the_agent_refuses_and_says_why(
    agent: Agent, key: Ed25519PrivateKey
) -> None:
    status, body = await Operator(agent, key).call("POST", "/drain")
    assert status == 403
    assert "no Ed25519 public key in /nonexistent/keys.pem" in body["error"]
    assert agent.server.calls == []


async def test_unsigned_calls_from_loopback_are_accepted_where_the_config_says_so(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(control=ControlPolicy(allow_unsigned=True))
    async with agent.session.post(agent.control("/drain")) as answer:
        assert answer.status == 200
    assert agent.server.calls == [("drain",)]


async def test_a_web_page_on_that_machine_is_still_refused(start_agent: StartAgent) -> None:
    agent = await start_agent(control=ControlPolicy(allow_unsigned=True))
    headers = {"Origin": "https://example.org"}
    async with agent.session.post(agent.control("/drain"), headers=headers) as answer:
        assert answer.status == 403
    assert agent.server.calls == []


@pytest.mark.parametrize(
    ("peer", "accepted"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.7", False),
        ("::ffff:10.0.0.7", False),
        ("fe80::1%eth0", False),
    ],
)
async def test_only_the_peer_s_address_says_what_is_loopback(
    start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch, peer: str, *, accepted: bool
) -> None:
    agent = await start_agent(control=ControlPolicy(allow_unsigned=True))
    monkeypatch.setattr("vram_agent.serving.control._peer", lambda _: peer)
    headers = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
    async with agent.session.post(agent.control("/drain"), headers=headers) as answer:
        assert answer.status == (200 if accepted else 401)
    assert bool(agent.server.calls) is accepted


async def test_an_error_of_the_supervisor_keeps_its_status(
    operator: Operator, server: FakeModelServer
) -> None:
    server.error = AgentError("the device did not answer")
    assert await operator.call("POST", "/scrub") == (500, {"error": "the device did not answer"})


@pytest.mark.parametrize(
    "path", ["/%64rain", "/models/adder%2Fload", "//drain", "/report/../drain"]
)
async def test_no_spelling_of_a_path_goes_round_the_signature(agent: Agent, path: str) -> None:
    url = URL(agent.control(path), encoded=True)
    async with agent.session.post(url) as answer:
        assert answer.status in {401, 404}
    assert agent.server.calls == []


async def test_control_calls_have_no_place_on_the_serving_port(agent: Agent) -> None:
    for path in ("/report", "/metrics", "/healthz", "/readyz"):
        async with agent.session.get(agent.serving(path)) as answer:
            assert answer.status == 404
    async with agent.session.post(agent.serving("/drain")) as answer:
        assert answer.status == 404


async def test_calls_of_the_serving_port_have_no_place_here(agent: Agent) -> None:
    async with agent.session.post(agent.control("/v2/models/adder/infer")) as answer:
        assert answer.status == 404


async def test_a_client_that_goes_away_does_not_undo_a_control_call(
    operator: Operator, server: FakeModelServer
) -> None:
    server.control_gate.clear()
    asking = asyncio.create_task(operator.call("POST", "/models/adder/load"))
    await server.control_begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (await operator.call("POST", "/scrub"))[0] == 200  # the agent has seen the first end
    server.control_gate.set()
    await asyncio.wait_for(server.control_done.wait(), timeout=10)
    assert server.calls == [("load", "adder"), ("scrub",)]
