"""The official ``openai`` client against the real command."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI
from vram_agent.serving.ffmpeg import find_ffmpeg

from tests.integration.agent.conftest import DIGITS_MODEL, WHISPER_MODEL, Agent, StartAgent
from tests.integration.agent.served_models import RATE_HERTZ
from tests.models import clips, read_samples

CLIP = clips()[0]
SPEAKER_MODEL: dict[str, Any] = {
    "name": "tts",
    "runtime": "Python",
    "source": "served_models:make_speaker",
    "options": {"path": str(Path(__file__).parent)},
    "residency": {"afterTask": "Keep"},
}


@pytest.fixture
async def connect() -> AsyncIterator[Any]:
    """A client of an agent that does not try again by itself."""
    clients: list[AsyncOpenAI] = []

    def connected(agent: Agent, **options: Any) -> AsyncOpenAI:
        base_url = f"{agent.serving}/v1"
        settings = {"api_key": "none", "max_retries": 0, "timeout": 120.0, **options}
        clients.append(AsyncOpenAI(base_url=base_url, **settings))
        return clients[-1]

    yield connected
    for client in clients:
        await client.close()


def ffmpeg(*arguments: str, data: bytes = b"") -> bytes:
    path = find_ffmpeg()
    assert path is not None
    command = [path, "-loglevel", "error", *arguments]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def wav_bytes(samples: Any) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(16_000)
        written.writeframes((samples * 32_767).astype("<i2").tobytes())
    return file.getvalue()


async def test_models_are_listed_and_one_is_retrieved(
    start_agent: StartAgent, connect: Any
) -> None:
    client = connect(await start_agent(WHISPER_MODEL, SPEAKER_MODEL))
    assert [model.id async for model in client.models.list()] == ["whisper", "tts"]
    model = await client.models.retrieve("tts")
    assert (model.id, model.object, model.owned_by) == ("tts", "model", "vram-agent")


async def test_a_recording_is_transcribed_in_every_format(
    start_agent: StartAgent, connect: Any
) -> None:
    client = connect(await start_agent({**WHISPER_MODEL, "residency": {"afterTask": "Keep"}}))
    create = client.audio.transcriptions.create
    assert (await create(model="whisper", file=CLIP.path)).text == CLIP.text
    found = {
        kind: await create(model="whisper", file=CLIP.path, response_format=kind)
        for kind in ("text", "srt", "vtt")
    }
    assert found["text"] == f"{CLIP.text}\n"
    assert found["srt"].startswith("1\n00:00:00,000 --> 00:00:0")
    assert found["vtt"].startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")
    assert CLIP.text in found["srt"]
    assert CLIP.text in found["vtt"]
    verbose = await create(
        model="whisper",
        file=CLIP.path,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
        prompt="Words.",
        temperature=0.0,
    )
    assert (verbose.text, verbose.language) == (CLIP.text, "en")
    with wave.open(str(CLIP.path)) as recording:
        seconds = recording.getnframes() / recording.getframerate()
    assert verbose.duration == pytest.approx(seconds, abs=0.01)
    assert [word.word.strip() for word in verbose.words] == CLIP.text.split()
    assert all(0 <= word.start <= word.end <= seconds + 0.1 for word in verbose.words)
    assert "".join(segment.text for segment in verbose.segments).strip() == CLIP.text


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client's of its own call
async def test_a_recording_is_translated(start_agent: StartAgent, connect: Any) -> None:
    client = connect(await start_agent(WHISPER_MODEL))
    create = client.audio.translations.create
    verbose = await create(model="whisper", file=CLIP.path, response_format="verbose_json")
    assert verbose.duration > 0
    assert (await create(model="whisper", file=CLIP.path)).text == verbose.text


async def test_a_transcription_streams(start_agent: StartAgent, connect: Any) -> None:
    client = connect(await start_agent(WHISPER_MODEL))
    stream = await client.audio.transcriptions.create(model="whisper", file=CLIP.path, stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert "".join(event.delta for event in events[:-1]) == CLIP.text
    assert (events[-1].type, events[-1].text) == ("transcript.text.done", CLIP.text)


def teller_model(fifo: Path) -> dict[str, Any]:
    return {
        "name": "teller",
        "runtime": "Python",
        "source": "served_models:make_teller",
        "options": {"path": str(Path(__file__).parent), "arguments": {"fifo": str(fifo)}},
        "residency": {"afterTask": "Keep"},
    }


async def test_a_stream_begins_while_its_task_runs_and_holds_the_model_to_its_end(
    start_agent: StartAgent, connect: Any, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    agent = await start_agent(teller_model(fifo))
    client = connect(agent)

    async def begin_stream() -> Any:
        stream = await client.audio.transcriptions.create(
            model="teller", file=CLIP.path, stream=True
        )
        assert (await anext(stream)).delta == "light"
        # The task waits for its second word's leave, so it cannot have ended.
        assert (await agent.report()).models[0].in_flight == 1
        return stream

    # To the end.
    stream = await begin_stream()
    await asyncio.to_thread(fifo.write_bytes, b"go on")
    rest = [event async for event in stream]
    assert [event.type for event in rest] == ["transcript.text.delta", "transcript.text.done"]
    assert (rest[0].delta, rest[1].text) == (" five", "light five")

    # A client that goes away ends the task at its next part; the next one is served.
    stream = await begin_stream()
    await stream.response.aclose()
    await asyncio.to_thread(fifo.write_bytes, b"go on")
    await agent.when(lambda r: r.models[0].in_flight == 0)

    # A GPU process that dies ends the stream with an error, and nothing else.
    stream = await begin_stream()
    (pid,) = agent.pids("gpu")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="killed by signal 9") as caught:
        [event async for event in stream]
    assert caught.value.code == "worker_died"

    # Speech sounds while the model still speaks.
    async with client.audio.speech.with_streaming_response.create(
        model="teller", input="a", voice="b", response_format="pcm"
    ) as answer:
        pieces = answer.iter_bytes(48_000)
        assert len(await anext(pieces)) == 48_000
        assert (await agent.report()).models[0].in_flight == 1
        await asyncio.to_thread(fifo.write_bytes, b"go on")
        assert sum([len(piece) async for piece in pieces]) == 24_000


async def test_a_recording_longer_than_whisper_s_window_is_transcribed_whole(
    start_agent: StartAgent, connect: Any
) -> None:
    client = connect(await start_agent(WHISPER_MODEL))
    words = read_samples(CLIP.path)
    quiet = np.zeros(30 * 16_000 - len(words), np.float32)
    recording = wav_bytes(np.concatenate([words, quiet, words, quiet, words]))
    mp3 = ffmpeg("-i", "pipe:0", "-b:a", "128k", "-f", "mp3", "pipe:1", data=recording)
    verbose = await client.audio.transcriptions.create(
        model="whisper",
        file=("long.mp3", mp3),
        response_format="verbose_json",
    )
    assert verbose.duration == pytest.approx(60 + len(words) / 16_000, abs=0.2)
    assert verbose.text.split() == CLIP.text.split() * 3
    assert verbose.segments[-1].start >= 60


async def test_a_text_is_spoken_in_every_format(start_agent: StartAgent, connect: Any) -> None:
    client = connect(await start_agent(SPEAKER_MODEL))
    for response_format in ("mp3", "opus", "aac", "flac", "wav", "pcm"):
        spoken = await client.audio.speech.create(
            model="tts", input="abcd", voice="300", speed=2.0, response_format=response_format
        )
        raw = ("-f", "s16le", "-ar", "24000", "-ac", "1") if response_format == "pcm" else ()
        to_floats = ("-ac", "1", "-ar", "16000", "-f", "f32le", "pipe:1")
        samples = np.frombuffer(
            ffmpeg(*raw, "-i", "pipe:0", *to_floats, data=spoken.read()), np.float32
        )
        assert len(samples) / 16_000 == pytest.approx(2.0, abs=0.15)
        middle = samples[8_000:24_000]
        loudest = np.abs(np.fft.rfft(middle)).argmax()  # one second: bins are hertz
        assert loudest == pytest.approx(300, abs=1)


async def test_speech_streams_to_a_client_that_reads_piece_by_piece(
    start_agent: StartAgent, connect: Any
) -> None:
    client = connect(await start_agent(SPEAKER_MODEL))
    async with client.audio.speech.with_streaming_response.create(
        model="tts", input="a" * 60, voice="440", response_format="wav"
    ) as answer:
        sizes = [len(piece) async for piece in answer.iter_bytes(64 * 1024)]
    assert sum(sizes) == 44 + 2 * 60 * RATE_HERTZ
    assert len(sizes) > 10


async def test_speech_is_understood_by_the_transcription_s_decoder(
    start_agent: StartAgent, connect: Any
) -> None:
    client = connect(await start_agent(SPEAKER_MODEL, WHISPER_MODEL))
    spoken = await client.audio.speech.create(model="tts", input="ab", voice="440")
    heard = await client.audio.transcriptions.create(
        model="whisper", file=("speech.mp3", spoken.read()), response_format="verbose_json"
    )
    assert heard.duration == pytest.approx(2.0, abs=0.15)


async def test_what_is_wrong_is_the_client_s_own_bad_request(
    start_agent: StartAgent, connect: Any
) -> None:
    client = connect(await start_agent(SPEAKER_MODEL, DIGITS_MODEL))
    speak = client.audio.speech.create
    with pytest.raises(openai.BadRequestError) as caught:
        await speak(model="tts", input="refuse", voice="440")
    assert caught.value.body == {
        "message": "that cannot be said",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_request",
    }
    with pytest.raises(openai.BadRequestError, match="no audio could be read"):
        await client.audio.transcriptions.create(model="digits", file=("a.mp3", b"no audio"))
    with pytest.raises(openai.BadRequestError, match="model digits cannot transcribe"):
        await client.audio.transcriptions.create(model="digits", file=CLIP.path)
    with pytest.raises(openai.BadRequestError, match="models that can: none") as caught:
        await client.audio.transcriptions.create(model="digits", file=CLIP.path)
    assert caught.value.param == "model"
    with pytest.raises(openai.InternalServerError, match="ValueError"):
        await speak(model="tts", input="a", voice="not hertz")


async def test_what_is_not_there_is_the_client_s_own_not_found(
    start_agent: StartAgent, connect: Any
) -> None:
    client = connect(await start_agent(DIGITS_MODEL))
    for asking in (
        client.models.retrieve("gone"),
        client.audio.speech.create(model="gone", input="a", voice="b"),
        client.audio.transcriptions.create(model="gone", file=CLIP.path),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await asking
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match=r"POST /v1/embeddings: no such call"):
        await client.embeddings.create(model="digits", input="a")


async def test_a_body_beyond_the_limit_is_refused(start_agent: StartAgent, connect: Any) -> None:
    client = connect(await start_agent(WHISPER_MODEL, limits={"requestBytes": "64Ki"}))
    with pytest.raises(openai.APIStatusError) as caught:
        await client.audio.transcriptions.create(
            model="whisper", file=("long.wav", wav_bytes(np.zeros(64_000)))
        )
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


async def test_a_full_queue_is_the_client_s_own_rate_limit(
    start_agent: StartAgent, connect: Any
) -> None:
    agent = await start_agent(WHISPER_MODEL, queue={"maxDepth": 1})
    client = connect(agent)
    first = asyncio.create_task(client.audio.transcriptions.create(model="whisper", file=CLIP.path))
    await agent.when(lambda r: r.models[0].queued == 1)  # it waits while its model is loaded
    with pytest.raises(openai.RateLimitError) as caught:
        await client.audio.transcriptions.create(model="whisper", file=CLIP.path)
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert (await first).text == CLIP.text


async def test_a_model_that_fails_is_the_client_s_own_server_error(
    start_agent: StartAgent, connect: Any
) -> None:
    broken = {"name": "broken", "runtime": "Whisper", "source": "/nowhere/model.pt"}
    client = connect(await start_agent(broken))
    with pytest.raises(openai.InternalServerError, match=r"/nowhere/model\.pt") as caught:
        await client.audio.transcriptions.create(model="broken", file=CLIP.path)
    assert (caught.value.status_code, caught.value.code) == (503, "model_failed")
    assert int(caught.value.response.headers["Retry-After"]) >= 1


async def test_without_a_known_api_key_a_client_is_not_authenticated(
    start_agent: StartAgent, connect: Any, tmp_path: Path
) -> None:
    keys = tmp_path / "api-keys"
    keys.write_text("sk-known\n")
    agent = await start_agent(SPEAKER_MODEL, serving={"apiKeyFile": str(keys)})
    with pytest.raises(openai.AuthenticationError, match="not one that this agent knows") as caught:
        await connect(agent, api_key="sk-unknown").models.list()
    assert caught.value.code == "invalid_api_key"
    spoken = await connect(agent, api_key="sk-known").audio.speech.create(
        model="tts", input="a", voice="440", response_format="pcm"
    )
    assert len(spoken.read()) == pytest.approx(2 * 24_000, rel=0.01)
