from __future__ import annotations

import struct
from typing import Any

import aiohttp
import pytest
from vram_agent.backend import TaskKind, TaskPart, TaskResult, Tensor
from vram_agent.errors import DrainingError, WorkerDiedError

from tests.support.server import FakeModelServer, speaking_view, speech_view
from tests.unit.agent.serving.conftest import Agent, StartAgent

SPEECH = "/v1/audio/speech"
QUESTION = {"model": "tts", "input": "Hello."}
TIMES = 16  # ffmpeg makes no FLAC of less than 16 samples
SAMPLES = struct.pack("<4f", 0, 0.5, -0.5, 1) * TIMES
AUDIO = Tensor(name="audio", datatype="FP32", shape=(4 * TIMES,), data=SAMPLES)
PCM = struct.pack("<4h", 0, 16_384, -16_384, 32_767) * TIMES


@pytest.fixture
def server() -> FakeModelServer:
    return FakeModelServer(
        [speaking_view(), speech_view()],
        result=TaskResult(values={"rate": 24_000}, tensors=(AUDIO,)),
    )


@pytest.fixture
async def agent(start_agent: StartAgent, server: FakeModelServer) -> Agent:
    return await start_agent(server)


async def refused(agent: Agent, **body: Any) -> tuple[int, Any]:
    async with agent.session.post(agent.serving(SPEECH), json={**QUESTION, **body}) as answer:
        return answer.status, (await answer.json())["error"]


@pytest.mark.parametrize(
    ("response_format", "content_type", "begin"),
    [
        ("pcm", "audio/pcm", PCM),
        ("wav", "audio/wav", b"RIFF"),
        ("flac", "audio/flac", b"fLaC"),
        ("opus", "audio/opus", b"OggS"),
        ("aac", "audio/aac", b"\xff"),
        ("mp3", "audio/mpeg", b""),
        (None, "audio/mpeg", b""),
    ],
)
async def test_the_audio_comes_as_it_was_asked_for_and_as_mp3_where_it_was_not(
    agent: Agent, response_format: str | None, content_type: str, begin: bytes
) -> None:
    asked = {} if response_format is None else {"response_format": response_format}
    async with agent.session.post(agent.serving(SPEECH), json={**QUESTION, **asked}) as answer:
        body = await answer.read()
    assert (answer.status, answer.content_type) == (200, content_type)
    assert int(answer.headers["Content-Length"]) == len(body) > 0
    assert body.startswith(begin)


async def test_the_model_gets_the_text_and_what_the_client_said(
    agent: Agent, server: FakeModelServer
) -> None:
    said = {"voice": "alloy", "instructions": "Whisper.", "speed": 1.5}
    body = {**QUESTION, **said, "response_format": "pcm"}
    headers = {"X-Vram-Keep-Alive": "-1"}
    async with agent.session.post(agent.serving(SPEECH), json=body, headers=headers) as answer:
        assert (answer.status, await answer.read()) == (200, PCM)
    (submission,) = server.submissions
    assert (submission.model, submission.keep_alive_seconds) == ("tts", -1)
    assert submission.task.kind is TaskKind.SPEECH
    assert submission.task.parameters == {"input": "Hello.", **said}


async def test_a_voice_may_be_given_by_its_id_and_nothing_need_be(
    agent: Agent, server: FakeModelServer
) -> None:
    for voice in ({"voice": {"id": "voice_1"}}, {"voice": None}, {}):
        body = {**QUESTION, **voice, "response_format": "pcm"}
        async with agent.session.post(agent.serving(SPEECH), json=body) as answer:
            assert answer.status == 200
    assert [submission.task.parameters for submission in server.submissions] == [
        {"input": "Hello.", "voice": "voice_1"},
        {"input": "Hello."},
        {"input": "Hello."},
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param({"input": ""}, "length >= 1", id="no text"),
        pytest.param({"input": "a" * 4097}, "length <= 4096", id="a long text"),
        pytest.param({"input": 7}, "Expected `str`", id="no text but a number"),
        pytest.param({"response_format": "midi"}, "'midi' - at `$.response_format`", id="format"),
        pytest.param({"speed": 0.2}, ">= 0.25", id="too slow"),
        pytest.param({"speed": 4.1}, "<= 4.0", id="too fast"),
        pytest.param({"voice": {"name": "x"}}, "at `$.voice`", id="a voice without an id"),
        pytest.param({"stream_format": "sse"}, "'sse' - at `$.stream_format`", id="events"),
        pytest.param({"pitch": 2}, "unknown field `pitch`", id="an unknown field"),
    ],
)
async def test_requests_that_are_wrong(
    agent: Agent, server: FakeModelServer, body: dict[str, Any], reason: str
) -> None:
    status, error = await refused(agent, **body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert reason in error["message"]
    assert not server.submissions


async def test_a_model_that_cannot_speak_names_those_that_can(agent: Agent) -> None:
    status, error = await refused(agent, model="whisper")
    assert (status, error["message"]) == (
        400,
        "model whisper cannot speak; models that can: tts",
    )


async def test_an_unknown_model_is_not_found(agent: Agent) -> None:
    status, error = await refused(agent, model="gone")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_a_model_that_gives_no_speech_has_failed(
    agent: Agent, server: FakeModelServer
) -> None:
    server.result = TaskResult()
    status, error = await refused(agent)
    assert (status, error["code"]) == (500, "task_failed")
    assert error["message"].startswith("model tts gave no speech")


async def test_errors_of_the_supervisor_come_before_a_byte_of_audio(
    agent: Agent, server: FakeModelServer
) -> None:
    server.error = DrainingError("draining", retry_after_seconds=7)
    async with agent.session.post(agent.serving(SPEECH), json=QUESTION) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
        assert (await answer.json())["error"]["code"] == "draining"


async def test_a_body_that_is_larger_than_any_speech_request_is_refused(agent: Agent) -> None:
    status, error = await refused(agent, input="a" * 300_000)
    assert (status, error["code"]) == (413, "request_too_large")


def part(count: int = 4, rate_hertz: int = 24_000) -> TaskPart:
    samples = (struct.pack("<4f", 0, 0.5, -0.5, 1) * (count // 4 + 1))[: 4 * count]
    audio = Tensor(name="audio", datatype="FP32", shape=(count,), data=samples)
    return TaskPart(values={"rate": rate_hertz}, tensors=(audio,))


@pytest.mark.parametrize(
    ("response_format", "rate_hertz", "begin"),
    [
        pytest.param("pcm", 24_000, PCM, id="pcm of a model that speaks at its rate"),
        pytest.param("pcm", 16_000, b"", id="pcm that is resampled"),
        pytest.param("wav", 16_000, b"RIFF", id="wav"),
        pytest.param("mp3", 16_000, b"", id="mp3"),
        pytest.param("opus", 16_000, b"OggS", id="opus"),
    ],
)
async def test_speech_begins_to_sound_before_its_task_has_ended(
    agent: Agent, server: FakeModelServer, response_format: str, rate_hertz: int, begin: bytes
) -> None:
    server.gate.clear()
    server.parts = [part(4 * rate_hertz, rate_hertz)] * 2
    server.result = TaskResult(values={"rate": rate_hertz})
    body = {**QUESTION, "response_format": response_format}
    async with agent.session.post(agent.serving(SPEECH), json=body) as answer:
        first = await answer.content.readexactly(max(len(begin), 100))
        assert not server.gate.is_set()  # the task still runs
        assert answer.headers["Transfer-Encoding"] == "chunked"
        assert first.startswith(begin)
        server.gate.set()
        rest = await answer.content.read()
    if response_format == "wav":
        assert len(first + rest) == 44 + 2 * 8 * rate_hertz
    elif response_format == "pcm":
        assert len(first + rest) == pytest.approx(2 * 8 * 24_000, rel=0.01)
    else:
        assert len(rest) > 1000


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        pytest.param(WorkerDiedError("it died"), [part()], id="the process died"),
        pytest.param(None, [part(), part(4, 8_000)], id="the rate changed midway"),
    ],
)
@pytest.mark.parametrize("response_format", ["wav", "mp3"])
async def test_speech_that_fails_midway_is_no_whole_body(
    agent: Agent,
    server: FakeModelServer,
    error: Exception | None,
    parts: list[TaskPart],
    response_format: str,
) -> None:
    server.error = error
    server.parts = parts
    server.result = TaskResult()
    body = {**QUESTION, "response_format": response_format}

    async def speak() -> None:
        async with agent.session.post(agent.serving(SPEECH), json=body) as answer:
            answer.raise_for_status()
            await answer.read()

    with pytest.raises(aiohttp.ClientError):
        await speak()


async def test_a_first_part_that_is_no_audio_is_an_error_with_a_status(
    agent: Agent, server: FakeModelServer
) -> None:
    server.parts = [TaskPart(values={"rate": 24_000})]
    status, error = await refused(agent)
    assert (status, error["code"]) == (500, "task_failed")
