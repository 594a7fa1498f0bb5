from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from vram_agent.backend import TaskKind, TaskPart, TaskResult
from vram_agent.errors import QueueFullError, WorkerDiedError

from tests.support.server import FakeModelServer, absent_view, infer_view, speech_view
from tests.unit.agent.serving.conftest import Agent, StartAgent
from tests.unit.agent.serving.sounds import tone, wav

TRANSCRIPTIONS = "/v1/audio/transcriptions"
CLIP = wav(tone(0.5))
SEGMENT = {"id": 0, "start": 0.0, "end": 0.5, "text": " Hello.", "tokens": [1], "avg_logprob": -0.1}
RESULT = TaskResult(
    values={"text": " Hello.", "language": "en", "duration": 0.5, "segments": [SEGMENT]}
)


@pytest.fixture
def server() -> FakeModelServer:
    return FakeModelServer(result=RESULT)


@pytest.fixture
async def agent(start_agent: StartAgent, server: FakeModelServer) -> Agent:
    return await start_agent(server)


def form(*fields: tuple[str, str], clip: bytes | None = CLIP) -> aiohttp.FormData:
    data = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields or (("model", "whisper"),):
        data.add_field(name, value)
    if clip is not None:
        data.add_field("file", clip, filename="clip.wav", content_type="audio/wav")
    return data


async def post(
    agent: Agent, data: aiohttp.FormData, path: str = TRANSCRIPTIONS, **options: Any
) -> tuple[aiohttp.ClientResponse, str]:
    async with agent.session.post(agent.serving(path), data=data, **options) as answer:
        return answer, await answer.text()


async def post_json(agent: Agent, data: aiohttp.FormData, path: str = TRANSCRIPTIONS) -> Any:
    async with agent.session.post(agent.serving(path), data=data) as answer:
        return answer.status, await answer.json()


async def test_models_are_listed_in_the_config_s_order(agent: Agent) -> None:
    async with agent.session.get(agent.serving("/v1/models")) as answer:
        body = await answer.json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["whisper", "adder", "lazy"]
    assert body["data"][0].keys() == {"id", "object", "created", "owned_by"}


async def test_one_model_is_described(agent: Agent) -> None:
    async with agent.session.get(agent.serving("/v1/models/whisper")) as answer:
        body = await answer.json()
    assert (body["id"], body["object"], body["owned_by"]) == ("whisper", "model", "vram-agent")


async def test_an_unknown_model_is_not_found(agent: Agent) -> None:
    async with agent.session.get(agent.serving("/v1/models/gone")) as answer:
        body = await answer.json()
    assert answer.status == 404
    assert body == {
        "error": {
            "message": "there is no model gone; there are whisper, adder, lazy",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


async def test_the_model_gets_the_samples_and_what_the_client_said(
    agent: Agent, server: FakeModelServer
) -> None:
    fields = [("language", "de"), ("prompt", "Namen: Ada"), ("temperature", "0.2")]
    await post(agent, form(("model", "whisper"), *fields))
    (submission,) = server.submissions
    (audio,) = submission.task.tensors
    assert submission.model == "whisper"
    assert submission.keep_alive_seconds is None
    assert submission.task.kind is TaskKind.TRANSCRIBE
    assert submission.task.parameters == {
        "language": "de",
        "prompt": "Namen: Ada",
        "temperature": 0.2,
    }
    assert (audio.name, audio.datatype, audio.shape) == ("audio", "FP32", (8000,))


async def test_fields_may_follow_the_file(agent: Agent, server: FakeModelServer) -> None:
    data = form(clip=CLIP)
    data.add_field("language", "en")
    answer, _ = await post(agent, data)
    assert answer.status == 200
    assert server.submissions[0].task.parameters == {"language": "en"}


async def test_translations_are_tasks_of_their_own(agent: Agent, server: FakeModelServer) -> None:
    data = form(("model", "whisper"), ("response_format", "verbose_json"))
    status, body = await post_json(agent, data, "/v1/audio/translations")
    assert status == 200
    assert body["task"] == "translate"
    assert server.submissions[0].task.kind is TaskKind.TRANSLATE


@pytest.mark.parametrize(
    ("response_format", "content_type", "expected"),
    [
        pytest.param("json", "application/json", '{"text":"Hello."}', id="json"),
        pytest.param("text", "text/plain", "Hello.\n", id="text"),
        pytest.param(
            "srt",
            "application/x-subrip",
            "1\n00:00:00,000 --> 00:00:00,500\nHello.\n\n",
            id="srt",
        ),
        pytest.param(
            "vtt",
            "text/vtt",
            "WEBVTT\n\n00:00:00.000 --> 00:00:00.500\nHello.\n\n",
            id="vtt",
        ),
    ],
)
async def test_response_formats(
    agent: Agent, response_format: str, content_type: str, expected: str
) -> None:
    answer, text = await post(
        agent, form(("model", "whisper"), ("response_format", response_format))
    )
    assert (answer.status, answer.content_type, text) == (200, content_type, expected)


async def test_verbose_json(agent: Agent) -> None:
    data = form(("model", "whisper"), ("response_format", "verbose_json"))
    assert await post_json(agent, data) == (
        200,
        {
            "task": "transcribe",
            "language": "en",
            "duration": 0.5,
            "text": "Hello.",
            "segments": [SEGMENT],
        },
    )


async def test_the_duration_is_the_recording_s_where_the_model_gives_none(
    agent: Agent, server: FakeModelServer
) -> None:
    server.result = TaskResult(values={"text": "x"})
    data = form(("model", "whisper"), ("response_format", "verbose_json"))
    _, body = await post_json(agent, data)
    assert body["duration"] == 0.5


async def test_word_times_are_asked_for_and_given(agent: Agent, server: FakeModelServer) -> None:
    word = {"word": "Hello.", "start": 0.0, "end": 0.4}
    server.result = TaskResult(
        values={"text": "Hello.", "segments": [{**SEGMENT, "words": [word]}]}
    )
    data = form(
        ("model", "whisper"),
        ("response_format", "verbose_json"),
        ("timestamp_granularities[]", "word"),
        ("timestamp_granularities[]", "segment"),
    )
    status, body = await post_json(agent, data)
    assert status == 200
    assert (body["words"], body["segments"]) == ([word], [SEGMENT])
    assert server.submissions[0].task.parameters == {"word_timestamps": True}


async def test_word_times_that_the_model_does_not_give_are_no_silent_omission(agent: Agent) -> None:
    data = form(
        ("model", "whisper"),
        ("response_format", "verbose_json"),
        ("timestamp_granularities[]", "word"),
    )
    status, body = await post_json(agent, data)
    assert status == 400
    assert "gives no times of words" in body["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        pytest.param(
            [("response_format", "xml")],
            "response_format",
            "'xml' is not one of json, text, srt, verbose_json, vtt",
            id="an unknown format",
        ),
        pytest.param(
            [("response_format", "verbose_json"), ("timestamp_granularities[]", "phoneme")],
            "timestamp_granularities[]",
            "'phoneme' is not one of word, segment",
            id="an unknown granularity",
        ),
        pytest.param(
            [("timestamp_granularities[]", "word")],
            "timestamp_granularities[]",
            "needs response_format=verbose_json",
            id="a granularity without verbose_json",
        ),
        pytest.param(
            [("temperature", "hot")], "temperature", "from 0 to 1", id="no number as temperature"
        ),
        pytest.param([("temperature", "nan")], "temperature", "from 0 to 1", id="nan"),
        pytest.param([("temperature", "1.5")], "temperature", "from 0 to 1", id="too hot"),
        pytest.param(
            [("stream", "true"), ("response_format", "srt")],
            "stream",
            "needs response_format=json",
            id="a stream of subtitles",
        ),
        pytest.param([("stream", "maybe")], "stream", "one of true, false", id="half streaming"),
        pytest.param([("language", "x" * 33)], "language", "a code", id="an endless language"),
        pytest.param([("lnguage", "en")], "lnguage", "known are file, model, language", id="typo"),
        pytest.param([("prompt", "a"), ("prompt", "b")], "prompt", "2 times", id="given twice"),
        pytest.param([("prompt", "a" * 70_000)], "prompt", "longer than", id="an endless prompt"),
    ],
)
async def test_fields_that_are_wrong(
    agent: Agent, server: FakeModelServer, fields: list[tuple[str, str]], param: str, reason: str
) -> None:
    status, body = await post_json(agent, form(("model", "whisper"), *fields))
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param
    assert reason in body["error"]["message"]
    assert not server.submissions


async def test_a_stream_gives_a_delta_for_each_segment_and_then_the_whole(
    agent: Agent, server: FakeModelServer
) -> None:
    texts = (" One,", " two.", " Three.")
    server.result = TaskResult(
        values={"text": "One, two. Three.", "segments": [{**SEGMENT, "text": t} for t in texts]}
    )
    answer, text = await post(agent, form(("model", "whisper"), ("stream", "true")))
    assert (answer.status, answer.content_type) == (200, "text/event-stream")
    assert answer.headers["Cache-Control"] == "no-cache"
    assert text == (
        'data: {"type":"transcript.text.delta","delta":"One,"}\n\n'
        'data: {"type":"transcript.text.delta","delta":" two."}\n\n'
        'data: {"type":"transcript.text.delta","delta":" Three."}\n\n'
        'data: {"type":"transcript.text.done","text":"One, two. Three."}\n\n'
    )


async def test_what_fails_before_a_stream_begins_is_an_error_like_any_other(
    agent: Agent, server: FakeModelServer
) -> None:
    server.error = QueueFullError("full", retry_after_seconds=3)
    answer, text = await post(agent, form(("model", "whisper"), ("stream", "true")))
    assert (answer.status, answer.headers["Retry-After"]) == (429, "3")
    assert '"code":"queue_full"' in text


def part(text: str) -> TaskPart:
    return TaskPart(values={"text": text})


async def test_a_stream_begins_before_its_task_has_ended(
    agent: Agent, server: FakeModelServer
) -> None:
    server.gate.clear()
    server.parts = [part(" One,"), part(" two. ")]
    server.result = TaskResult(values={"text": "One, two. Three."})
    data = form(("model", "whisper"), ("stream", "true"))
    async with agent.session.post(agent.serving(TRANSCRIPTIONS), data=data) as answer:
        events = [await answer.content.readuntil(b"\n\n") for _ in range(2)]
        assert not server.gate.is_set()  # the task still runs
        server.gate.set()
        events.append(await answer.content.read())
    assert b"".join(events).decode() == (
        'data: {"type":"transcript.text.delta","delta":"One,"}\n\n'
        'data: {"type":"transcript.text.delta","delta":" two."}\n\n'
        'data: {"type":"transcript.text.delta","delta":" Three."}\n\n'
        'data: {"type":"transcript.text.done","text":"One, two. Three."}\n\n'
    )


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        pytest.param(WorkerDiedError("it died"), "it died", "worker_died", id="a death"),
        pytest.param(
            ValueError("secret"),
            "internal error; the agent's log says more",
            "internal_error",
            id="a fault of ours",
        ),
    ],
)
async def test_what_fails_after_the_first_part_is_the_last_event_of_the_stream(
    agent: Agent, server: FakeModelServer, error: Exception, message: str, code: str
) -> None:
    server.parts = [part("One")]
    server.error = error
    answer, text = await post(agent, form(("model", "whisper"), ("stream", "true")))
    assert answer.status == 200
    first, last = text.strip().split("\n\n")
    assert first == 'data: {"type":"transcript.text.delta","delta":"One"}'
    assert json.loads(last.removeprefix("data: ")) == {
        "type": "error",
        "error": {"message": message, "type": "server_error", "param": None, "code": code},
    }


async def test_who_leaves_in_the_middle_of_a_stream_gives_its_task_up(
    agent: Agent, server: FakeModelServer
) -> None:
    server.gate.clear()
    server.parts = [part("One")]
    data = form(("model", "whisper"), ("stream", "true"))
    async with agent.session.post(agent.serving(TRANSCRIPTIONS), data=data) as answer:
        await answer.content.readuntil(b"\n\n")
        answer.close()
    await asyncio.wait_for(server.abandoned.wait(), timeout=20)


async def test_translations_do_not_stream(agent: Agent) -> None:
    data = form(("model", "whisper"), ("stream", "true"))
    status, body = await post_json(agent, data, "/v1/audio/translations")
    assert (status, body["error"]["param"]) == (400, "stream")


async def test_stream_false_is_no_stream(agent: Agent) -> None:
    answer, _ = await post(agent, form(("model", "whisper"), ("stream", "false")))
    assert answer.status == 200


async def test_a_missing_file_is_said(agent: Agent) -> None:
    status, body = await post_json(agent, form(("model", "whisper"), clip=None))
    assert status == 400
    assert (body["error"]["message"], body["error"]["param"]) == ("the form has no file", "file")


async def test_a_missing_model_is_said(agent: Agent) -> None:
    status, body = await post_json(agent, form(("language", "en")))
    assert status == 400
    assert (body["error"]["message"], body["error"]["param"]) == (
        "the form names no model",
        "model",
    )


async def test_a_recording_for_an_unknown_model_is_not_found(agent: Agent) -> None:
    status, body = await post_json(agent, form(("model", "gone")))
    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_two_files_are_one_too_many(agent: Agent) -> None:
    data = form()
    data.add_field("file", CLIP, filename="again.wav")
    status, body = await post_json(agent, data)
    assert (status, body["error"]["message"]) == (400, "the form has more than one file")


async def test_no_audio_is_the_client_s_fault(agent: Agent, server: FakeModelServer) -> None:
    status, body = await post_json(agent, form(clip=b"no audio at all"))
    assert (status, body["error"]["param"]) == (400, "file")
    assert not server.submissions


async def test_a_model_that_cannot_transcribe_names_those_that_can(start_agent: StartAgent) -> None:
    agent = await start_agent(FakeModelServer([infer_view(), speech_view("a"), speech_view("b")]))
    status, body = await post_json(agent, form(("model", "adder")))
    assert status == 400
    assert body["error"]["message"] == "model adder cannot transcribe; models that can: a, b"


async def test_a_model_that_was_never_loaded_is_tried(start_agent: StartAgent) -> None:
    agent = await start_agent(FakeModelServer([absent_view()], result=RESULT))
    assert (await post(agent, form(("model", "lazy"))))[0].status == 200


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        pytest.param("application/json", b"{}", id="JSON"),
        pytest.param("multipart/form-data", b"x", id="no boundary"),
        pytest.param("multipart/form-data; boundary=b", b"x", id="no part"),
        pytest.param("multipart/form-data; boundary=b", b"--b\r\nx\r\n\r\ny", id="cut off"),
        pytest.param(
            "multipart/form-data; boundary=b", b"--b\r\n\r\ny\r\n--b--", id="a part without a name"
        ),
    ],
)
async def test_what_is_no_form_is_refused(agent: Agent, content_type: str, body: bytes) -> None:
    headers = {"Content-Type": content_type}
    async with agent.session.post(
        agent.serving(TRANSCRIPTIONS), data=body, headers=headers
    ) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_request")


async def test_too_many_parts_are_refused(agent: Agent) -> None:
    status, body = await post_json(agent, form(*[("prompt", "x")] * 65))
    assert (status, body["error"]["message"]) == (400, "the form has more than 64 parts")


@pytest.mark.parametrize(
    ("header", "seconds"), [("0", 0.0), ("-1", -1.0), ("2.5", 2.5), (" 30 ", 30.0)]
)
async def test_keep_alive_is_passed_on(
    agent: Agent, server: FakeModelServer, header: str, seconds: float
) -> None:
    answer, _ = await post(agent, form(), headers={"X-Vram-Keep-Alive": header})
    assert answer.status == 200
    assert server.submissions[0].keep_alive_seconds == seconds


@pytest.mark.parametrize("header", ["", "soon", "-2", "-0.5", "nan", "inf", "1e999"])
async def test_keep_alive_that_is_no_time_is_refused(
    agent: Agent, server: FakeModelServer, header: str
) -> None:
    answer, text = await post(agent, form(), headers={"X-Vram-Keep-Alive": header})
    assert answer.status == 400
    assert "X-Vram-Keep-Alive" in text
    assert not server.submissions
