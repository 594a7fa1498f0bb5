from __future__ import annotations

import struct
from typing import Any

import pytest
from vram_agent.backend import Task, TaskKind, TaskResult, Tensor
from vram_agent.errors import ModelFailedError
from vram_agent.protocol import ModelState

from tests.support.server import FakeModelServer, absent_view, infer_view, speech_view
from tests.unit.agent.serving.conftest import Agent, StartAgent

INFER = "/v2/models/adder/infer"
A = {"name": "a", "datatype": "FP32", "shape": [2], "data": [1, 2]}
SUM = Tensor(name="sum", datatype="FP32", shape=(1, 2), data=struct.pack("<2f", 3.5, -4))
COUNT = Tensor(name="count", datatype="INT64", shape=(1,), data=struct.pack("<q", 7))


@pytest.fixture
def server() -> FakeModelServer:
    return FakeModelServer(result=TaskResult(tensors=(SUM,)))


@pytest.fixture
async def agent(start_agent: StartAgent, server: FakeModelServer) -> Agent:
    return await start_agent(server)


async def get(agent: Agent, path: str) -> tuple[int, Any]:
    async with agent.session.get(agent.serving(path)) as answer:
        return answer.status, await answer.json()


async def post(agent: Agent, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
    if body is not None:
        options["json"] = body
    async with agent.session.post(agent.serving(path), **options) as answer:
        return answer.status, await answer.json()


async def test_the_server_names_itself(agent: Agent) -> None:
    assert await get(agent, "/v2") == (
        200,
        {
            "name": "vram-agent",
            "version": "0.1.0",
            "extensions": [
                "binary_tensor_data",
                "model_repository",
                "model_repository(unload_dependents)",
            ],
        },
    )


async def test_live_and_ready(agent: Agent, server: FakeModelServer) -> None:
    assert await get(agent, "/v2/health/live") == (200, {"live": True})
    assert await get(agent, "/v2/health/ready") == (200, {"ready": True})
    server.live = server.ready = False
    assert await get(agent, "/v2/health/live") == (503, {"live": False})
    assert await get(agent, "/v2/health/ready") == (503, {"ready": False})


async def test_a_loaded_model_tells_its_signature(agent: Agent) -> None:
    assert await get(agent, "/v2/models/adder") == (
        200,
        {
            "name": "adder",
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": [
                {"name": "a", "datatype": "FP32", "shape": [-1]},
                {"name": "b", "datatype": "FP32", "shape": [-1]},
            ],
            "outputs": [{"name": "sum", "datatype": "FP32", "shape": [-1]}],
        },
    )


async def test_a_model_that_was_never_loaded_has_no_signature_yet(agent: Agent) -> None:
    status, body = await get(agent, "/v2/models/lazy")
    assert (status, body["inputs"], body["outputs"]) == (200, [], [])


async def test_a_lazy_model_is_ready_and_a_failed_one_is_not(start_agent: StartAgent) -> None:
    agent = await start_agent(
        FakeModelServer([absent_view(), absent_view("broken", "no such file /models/x")])
    )
    assert await get(agent, "/v2/models/lazy/ready") == (200, {"name": "lazy", "ready": True})
    assert await get(agent, "/v2/models/broken/ready") == (503, {"name": "broken", "ready": False})


async def test_no_model_is_ready_while_the_agent_drains(
    agent: Agent, server: FakeModelServer
) -> None:
    server.ready = False
    assert (await get(agent, "/v2/models/lazy/ready"))[0] == 503


async def test_version_1_is_the_only_one(agent: Agent) -> None:
    assert (await get(agent, "/v2/models/adder/versions/1"))[1]["versions"] == ["1"]
    assert (await get(agent, "/v2/models/adder/versions/1/ready"))[0] == 200
    assert (await post(agent, "/v2/models/adder/versions/1/infer", {"inputs": [A]}))[0] == 200
    refused = (404, {"error": "model adder has no version 2; it has 1"})
    assert await get(agent, "/v2/models/adder/versions/2") == refused
    assert await get(agent, "/v2/models/adder/versions/2/ready") == refused
    assert await post(agent, "/v2/models/adder/versions/2/infer", {"inputs": [A]}) == refused


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models/gone"),
        ("GET", "/v2/models/gone/ready"),
        ("POST", "/v2/models/gone/infer"),
        ("POST", "/v2/repository/models/gone/load"),
        ("POST", "/v2/repository/models/gone/unload"),
    ],
)
async def test_unknown_models_are_not_found(agent: Agent, method: str, path: str) -> None:
    async with agent.session.request(method, agent.serving(path)) as answer:
        assert answer.status == 404
        assert await answer.json() == {
            "error": "there is no model gone; there are whisper, adder, lazy"
        }


async def test_infer_passes_tensors_and_gives_the_outputs(
    agent: Agent, server: FakeModelServer
) -> None:
    b = {"name": "b", "datatype": "BYTES", "shape": [1, 1], "data": [["x"]]}
    body = {"id": "42", "parameters": {"beams": 2}, "inputs": [A, b]}
    headers = {"X-Vram-Keep-Alive": "0"}
    assert await post(agent, INFER, body, headers=headers) == (
        200,
        {
            "model_name": "adder",
            "model_version": "1",
            "id": "42",
            "outputs": [{"name": "sum", "datatype": "FP32", "shape": [1, 2], "data": [3.5, -4.0]}],
        },
    )
    (submission,) = server.submissions
    assert submission.keep_alive_seconds == 0
    assert submission.task.kind is TaskKind.INFER
    assert submission.task.parameters == {"beams": 2}
    assert list(submission.task.tensors) == [
        Tensor(name="a", datatype="FP32", shape=(2,), data=struct.pack("<2f", 1, 2)),
        Tensor(name="b", datatype="BYTES", shape=(1, 1), data=b"\x01\0\0\0x"),
    ]


async def test_no_id_is_echoed_where_none_was_sent(agent: Agent) -> None:
    _, body = await post(agent, INFER, {"inputs": [A]})
    assert "id" not in body


async def test_a_large_request_and_answer_give_the_same(
    agent: Agent, server: FakeModelServer
) -> None:
    count = 100_000
    data = struct.pack(f"<{count}f", *range(count))
    server.result = TaskResult(
        tensors=(Tensor(name="sum", datatype="FP32", shape=(count,), data=data),)
    )
    large = {**A, "shape": [count], "data": list(range(count))}
    status, body = await post(agent, INFER, {"inputs": [large]})
    assert status == 200
    assert bytes(server.submissions[0].task.tensors[0].data) == data
    assert body["outputs"][0]["data"] == large["data"]


async def test_large_json_waits_in_the_queue_without_holding_memory(
    agent: Agent, server: FakeModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Any] = []
    submit = server.submit

    async def noting(model: str, task: Task, **options: Any) -> TaskResult:
        submitted.extend(type(tensor.data) for tensor in task.tensors)
        return await submit(model, task, **options)

    monkeypatch.setattr(server, "submit", noting)
    large = {**A, "datatype": "INT64", "shape": [200_000], "data": [1] * 200_000}
    assert (await post(agent, INFER, {"inputs": [large, {**A, "name": "b"}]}))[0] == 200
    assert submitted == [memoryview, bytes]
    assert server.submissions[0].task.tensors[0].data == struct.pack("<q", 1) * 200_000


async def test_outputs_are_selected_and_ordered(start_agent: StartAgent) -> None:
    server = FakeModelServer([absent_view("adder")], result=TaskResult(tensors=(SUM, COUNT)))
    agent = await start_agent(server)
    wanted = {"inputs": [A], "outputs": [{"name": "count"}]}
    _, body = await post(agent, INFER, wanted)
    assert [output["name"] for output in body["outputs"]] == ["count"]
    _, body = await post(
        agent, INFER, {"inputs": [A], "outputs": [{"name": "count"}, {"name": "sum"}]}
    )
    assert [output["name"] for output in body["outputs"]] == ["count", "sum"]


async def test_an_unknown_output_is_refused_before_the_model_runs(
    agent: Agent, server: FakeModelServer
) -> None:
    status, body = await post(agent, INFER, {"inputs": [A], "outputs": [{"name": "product"}]})
    assert (status, body) == (400, {"error": "the model has no output 'product'; it has sum"})
    assert not server.submissions


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param({}, "missing required field `inputs`", id="no inputs"),
        pytest.param({"inputs": [{**A, "shape": [3]}]}, "needs 3 elements", id="a wrong shape"),
        pytest.param({"inputs": [{**A, "shape": ["x"]}]}, "$.inputs[0].shape[0]", id="no shape"),
        pytest.param({"inputs": [{**A, "datatype": "BF16"}]}, "BF16 is not carried", id="BF16"),
        pytest.param({"inputs": [A, A]}, "given twice", id="an input twice"),
        pytest.param(
            {"inputs": [{"name": "a", "datatype": "FP32", "shape": [1]}]}, "no data", id="no data"
        ),
        pytest.param(
            {"inputs": [A], "outputs": [{"name": "sum"}] * 2}, "asked for twice", id="output twice"
        ),
    ],
)
async def test_requests_that_are_wrong(
    agent: Agent, server: FakeModelServer, body: Any, reason: str
) -> None:
    status, answer = await post(agent, INFER, body)
    assert status == 400
    assert answer.keys() == {"error"}
    assert reason in answer["error"]
    assert not server.submissions


async def test_what_is_no_json_is_refused(agent: Agent) -> None:
    status, body = await post(agent, INFER, data=b"{")
    assert status == 400
    assert "the body is not what this call takes" in body["error"]


async def test_a_model_that_cannot_infer_names_those_that_can(agent: Agent) -> None:
    assert await post(agent, "/v2/models/whisper/infer", {"inputs": [A]}) == (
        400,
        {"error": "model whisper cannot infer; models that can: adder"},
    )


async def test_the_index_shows_every_model_and_why_one_is_unavailable(
    start_agent: StartAgent,
) -> None:
    views = [infer_view(), absent_view(), absent_view("broken", "no such file /models/x")]
    agent = await start_agent(FakeModelServer(views))
    everything = [
        {"name": "adder", "version": "1", "state": "READY", "reason": ""},
        {"name": "lazy", "version": "1", "state": "READY", "reason": ""},
        {
            "name": "broken",
            "version": "1",
            "state": "UNAVAILABLE",
            "reason": "no such file /models/x",
        },
    ]
    assert await post(agent, "/v2/repository/index") == (200, everything)
    assert await post(agent, "/v2/repository/index", {"ready": True}) == (200, everything[:2])


async def test_load_and_unload(agent: Agent, server: FakeModelServer) -> None:
    assert await post(agent, "/v2/repository/models/lazy/load", {}) == (200, {})
    assert await post(agent, "/v2/repository/models/lazy/unload") == (200, {})
    assert server.calls == [("load", "lazy"), ("unload", "lazy")]


async def test_load_does_not_take_a_config(agent: Agent, server: FakeModelServer) -> None:
    body = {"parameters": {"config": "{}"}}
    status, answer = await post(agent, "/v2/repository/models/lazy/load", body)
    assert status == 400
    assert "agent's config" in answer["error"]
    assert not server.calls


async def test_unload_takes_triton_s_parameter_and_no_other(
    agent: Agent, server: FakeModelServer
) -> None:
    path = "/v2/repository/models/lazy/unload"
    assert await post(agent, path, {"parameters": {"unload_dependents": True}}) == (200, {})
    refused = await post(agent, path, {"parameters": {"force": True}})
    assert refused == (400, {"error": "unload has no parameter 'force'"})
    assert server.calls == [("unload", "lazy")]


async def test_a_load_that_fails_says_why(start_agent: StartAgent) -> None:
    server = FakeModelServer(
        [speech_view(state=ModelState.FAILED)], error=ModelFailedError("no such file /models/x")
    )
    agent = await start_agent(server)
    assert await post(agent, "/v2/repository/models/whisper/load") == (
        503,
        {"error": "no such file /models/x"},
    )
