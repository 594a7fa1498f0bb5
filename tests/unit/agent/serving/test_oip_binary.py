"""The binary-tensor extension, byte by byte."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vram_agent.backend import TaskResult, Tensor

from tests.support.server import FakeModelServer, absent_view
from tests.unit.agent.serving.conftest import Agent, StartAgent
from tests.unit.agent.serving.test_uploads import MEBIBYTE, resident_bytes

INFER = "/v2/models/adder/infer"
LENGTH = "Inference-Header-Content-Length"
RAW = struct.pack("<2f", 1, 2)
A = {"name": "a", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
SUM = Tensor(name="sum", datatype="FP32", shape=(1, 2), data=struct.pack("<2f", 3.5, -4))
TEXTS = Tensor(name="texts", datatype="BYTES", shape=(2,), data=b"\1\0\0\0\xff\0\0\0\0")


@pytest.fixture
def server() -> FakeModelServer:
    return FakeModelServer([absent_view("adder")], result=TaskResult(tensors=(SUM, TEXTS)))


@pytest.fixture
async def agent(start_agent: StartAgent, server: FakeModelServer) -> Agent:
    return await start_agent(server)


async def ask(
    agent: Agent, question: Any, raw: bytes = b"", **headers: str
) -> tuple[int, Any, bytes]:
    """Return the status, the JSON of the answer and the bytes behind it."""
    text = json.dumps(question).encode()
    sent = {LENGTH: str(len(text)), **headers}
    body = text + raw
    if sent.get("Content-Encoding") == "gzip":
        body = gzip.compress(body)
    async with agent.session.post(
        agent.serving(INFER), data=io.BytesIO(body), headers=sent
    ) as answer:
        whole = await answer.read()
        size = int(answer.headers.get(LENGTH, len(whole)))
        if LENGTH in answer.headers:
            assert answer.content_type == "application/octet-stream"
            assert int(answer.headers["Content-Length"]) == len(whole)
        return answer.status, json.loads(whole[:size]), whole[size:]


def inputs_of(server: FakeModelServer) -> list[Tensor]:
    (submission,) = server.submissions
    return list(submission.task.tensors)


async def test_binary_inputs_lie_behind_the_json_in_its_order_and_json_inputs_between_them(
    agent: Agent, server: FakeModelServer
) -> None:
    b = {"name": "b", "datatype": "INT8", "shape": [1], "data": [7]}
    c = {**A, "name": "c", "datatype": "UINT8", "parameters": {"binary_data_size": 2}}
    status, _, rest = await ask(
        agent, {"inputs": [A, b, c], "outputs": [{"name": "sum"}]}, RAW + b"\x05\x06"
    )
    assert (status, rest) == (200, b"")
    assert inputs_of(server) == [
        Tensor(name="a", datatype="FP32", shape=(2,), data=RAW),
        Tensor(name="b", datatype="INT8", shape=(1,), data=b"\x07"),
        Tensor(name="c", datatype="UINT8", shape=(2,), data=b"\x05\x06"),
    ]


async def test_all_outputs_come_as_binary_where_the_request_says_so(
    agent: Agent, server: FakeModelServer
) -> None:
    question = {"inputs": [A], "parameters": {"binary_data_output": True, "beams": 2}}
    status, body, rest = await ask(agent, question, RAW)
    assert (status, body) == (
        200,
        {
            "model_name": "adder",
            "model_version": "1",
            "outputs": [
                {
                    "name": "sum",
                    "datatype": "FP32",
                    "shape": [1, 2],
                    "parameters": {"binary_data_size": 8},
                },
                {
                    "name": "texts",
                    "datatype": "BYTES",
                    "shape": [2],
                    "parameters": {"binary_data_size": 9},
                },
            ],
        },
    )
    assert rest == bytes(SUM.data) + bytes(TEXTS.data)
    assert server.submissions[0].task.parameters == {"beams": 2}


@pytest.mark.parametrize(
    ("everything", "sum_parameters", "is_binary"),
    [
        pytest.param(None, {"binary_data": True}, True, id="asked for"),
        pytest.param(True, {}, True, id="as all are"),
        pytest.param(True, {"binary_data": False}, False, id="as JSON, against all"),
        pytest.param(False, {"binary_data": True}, True, id="asked for, against all"),
        pytest.param(None, {}, False, id="JSON where nothing is said"),
    ],
)
async def test_an_output_s_own_word_goes_before_the_request_s(
    agent: Agent, everything: bool | None, sum_parameters: dict[str, Any], is_binary: bool
) -> None:
    question: dict[str, Any] = {
        "inputs": [A],
        "outputs": [{"name": "sum", "parameters": sum_parameters}],
    }
    if everything is not None:
        question["parameters"] = {"binary_data_output": everything}
    _, body, rest = await ask(agent, question, RAW)
    (output,) = body["outputs"]
    assert rest == (SUM.data if is_binary else b"")
    assert output.get("data") == (None if is_binary else [3.5, -4.0])


async def test_json_and_binary_outputs_may_be_mixed(agent: Agent) -> None:
    outputs = [{"name": "texts", "parameters": {"binary_data": True}}, {"name": "sum"}]
    _, body, rest = await ask(agent, {"inputs": [A], "outputs": outputs}, RAW)
    assert body["outputs"][1]["data"] == [3.5, -4.0]
    assert rest == TEXTS.data


async def test_a_request_of_json_alone_may_ask_for_binary_outputs(agent: Agent) -> None:
    a = {"name": "a", "datatype": "FP32", "shape": [1], "data": [1]}
    question = {"inputs": [a], "outputs": [{"name": "sum", "parameters": {"binary_data": True}}]}
    async with agent.session.post(agent.serving(INFER), json=question) as answer:
        assert (answer.status, (await answer.read())[-8:]) == (200, SUM.data)


async def test_a_compressed_body_counts_as_what_it_becomes(
    agent: Agent, server: FakeModelServer
) -> None:
    question = {"inputs": [A], "outputs": [{"name": "sum"}]}
    status, _, _ = await ask(agent, question, RAW, **{"Content-Encoding": "gzip"})
    assert (status, inputs_of(server)[0].data) == (200, RAW)


@pytest.mark.parametrize("length", ["", "x", "-1", "+1", "1.5", "0", "0x10", "٣", "9" * 20])
async def test_a_header_that_is_no_length_is_refused(
    agent: Agent, server: FakeModelServer, length: str
) -> None:
    body = json.dumps({"inputs": [A]}).encode() + RAW
    async with agent.session.post(
        agent.serving(INFER), data=body, headers={LENGTH: length}
    ) as answer:
        assert answer.status == 400
        assert f"{LENGTH}: " in (await answer.json())["error"]
    assert not server.submissions


def sized(size: Any) -> dict[str, Any]:
    return {**A, "parameters": {"binary_data_size": size}}


@pytest.mark.parametrize(
    ("tensors", "raw", "reason"),
    [
        pytest.param([A], RAW[:7], "is 8, the body has 7 more bytes", id="cut off"),
        pytest.param([A], RAW + b"x", "the body has 1 bytes more than", id="left over"),
        pytest.param([A, {**A, "name": "b"}], RAW, "is 8, the body has 0 more", id="one missing"),
        pytest.param([sized(2**62)], RAW, "the body has 8 more bytes", id="huge"),
        pytest.param([sized(-8)], RAW, "'-8' is not a number of bytes", id="negative"),
        pytest.param([sized(bool(1))], b"x", "'True' is not a number of bytes", id="a boolean"),
        pytest.param([sized("8")], RAW, "'8' is not a number of bytes", id="a text"),
        pytest.param([sized(8.0)], RAW, "'8.0' is not a number of bytes", id="a float"),
        pytest.param([{**A, "data": [1, 2]}], RAW, "both data and", id="both"),
        pytest.param([{**A, "shape": [3]}], RAW, "takes 12 bytes", id="a wrong shape"),
        pytest.param(
            [{**A, "parameters": {"shared_memory_region": "r"}}], b"", "shared memory", id="shm"
        ),
    ],
)
async def test_lengths_that_lie_are_refused_before_the_model_runs(
    agent: Agent, server: FakeModelServer, tensors: list[Any], raw: bytes, reason: str
) -> None:
    status, body, _ = await ask(agent, {"inputs": tensors}, raw)
    assert status == 400
    assert reason in body["error"]
    assert not server.submissions


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        pytest.param("9999", f"{LENGTH} is 9999, the body has ", id="too long"),
        pytest.param("3", "the body is not what this call takes", id="too short"),
    ],
)
async def test_a_length_of_the_json_that_lies_is_refused(
    agent: Agent, server: FakeModelServer, length: str, reason: str
) -> None:
    status, body, _ = await ask(agent, {"inputs": [A]}, RAW, **{LENGTH: length})
    assert status == 400
    assert reason in body["error"]
    assert not server.submissions


async def test_a_size_without_the_header_names_the_header(agent: Agent) -> None:
    async with agent.session.post(agent.serving(INFER), json={"inputs": [A]}) as answer:
        assert await answer.json() == {
            "error": f"input a: binary_data_size needs the header {LENGTH}"
        }


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"parameters": {"binary_data_output": 1}}, "binary_data_output '1' is not true or false"),
        (
            {"outputs": [{"name": "sum", "parameters": {"binary_data": "yes"}}]},
            "output sum: binary_data 'yes' is not true or false",
        ),
        (
            {"outputs": [{"name": "sum", "parameters": {"classification": 3}}]},
            "output sum: classification is not offered",
        ),
    ],
)
async def test_what_is_asked_of_outputs_wrongly_is_refused(
    agent: Agent, extra: dict[str, Any], reason: str
) -> None:
    status, body, _ = await ask(agent, {"inputs": [A], **extra}, RAW)
    assert status == 400
    assert reason in body["error"]


async def test_a_large_tensor_lies_on_disk_and_comes_back_whole(start_agent: StartAgent) -> None:
    size = 96 * MEBIBYTE
    raw = bytes(range(256)) * (size // 256)
    server = FakeModelServer(
        [absent_view("adder")],
        result=TaskResult(tensors=(Tensor(name="y", datatype="UINT8", shape=(size,), data=raw),)),
    )
    agent = await start_agent(server, request_bytes="100Mi")
    large = {"name": "x", "datatype": "UINT8", "shape": [size]}
    question = {
        "inputs": [{**large, "parameters": {"binary_data_size": size}}],
        "parameters": {"binary_data_output": True},
    }
    status, _, rest = await ask(agent, question, raw)
    assert status == 200
    assert rest == raw
    assert server.submissions[0].task.tensors[0].data == raw


async def test_memory_stays_flat_while_a_large_body_comes_in(start_agent: StartAgent) -> None:
    agent = await start_agent(FakeModelServer([absent_view("adder")]), request_bytes="1Gi")
    text = json.dumps({"inputs": [{**A, "shape": [0]}]}).encode()
    peak = before = resident_bytes()

    async def body() -> AsyncIterator[bytes]:
        nonlocal peak
        yield text
        for _ in range(200):
            yield bytes(MEBIBYTE)
            peak = max(peak, resident_bytes())

    headers = {LENGTH: str(len(text))}
    async with agent.session.post(agent.serving(INFER), data=body(), headers=headers) as answer:
        assert answer.status == 400
        assert "bytes" in (await answer.json())["error"]
    assert peak - before < 48 * MEBIBYTE


async def test_a_body_that_becomes_too_large_when_unpacked_is_cut_off(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(request_bytes="1Mi")
    packed = gzip.compress(bytes(64 * MEBIBYTE))
    assert len(packed) < MEBIBYTE
    headers = {LENGTH: "2", "Content-Encoding": "gzip"}
    async with agent.session.post(agent.serving(INFER), data=packed, headers=headers) as answer:
        assert answer.status == 413
