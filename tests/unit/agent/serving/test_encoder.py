from __future__ import annotations

import io
import struct
import subprocess
import wave
from array import array
from pathlib import Path
from typing import Any

import pytest
from vram_agent.backend import TaskResult, Tensor
from vram_agent.errors import BadInputError, TaskFailedError
from vram_agent.serving.encoder import Speech, SpeechEncoder, SpeechFormat, read_speech
from vram_agent.serving.ffmpeg import find_ffmpeg

from tests.unit.agent.serving.sounds import crossings, tone
from tests.unit.agent.serving.test_audio import no_ffmpeg, script


def spoken(samples: list[float], code: str = "f", rate: Any = 24_000, **changes: Any) -> TaskResult:
    datatypes = {"e": "FP16", "f": "FP32", "d": "FP64", "h": "INT16"}
    tensor = {
        "name": "audio",
        "datatype": datatypes[code],
        "shape": (len(samples),),
        "data": struct.pack(f"<{len(samples)}{code}", *samples),
        **changes,
    }
    return TaskResult(values={"rate": rate}, tensors=(Tensor(**tensor),))


def a_tone(rate_hz: int) -> Speech:
    """One second of 440 Hz, as floats of half amplitude."""
    return read_speech(
        "tts", spoken([sample / 32_768 for sample in tone(1.0, rate_hz)], rate=rate_hz)
    )


def decoded(data: bytes, *before: str, rate_hz: int = 24_000) -> array[float]:
    """What ffmpeg makes of a file, as floats."""
    ffmpeg = find_ffmpeg()
    assert ffmpeg is not None
    command = [ffmpeg, "-loglevel", "error", *before, "-i", "pipe:0"]
    done = subprocess.run(
        [*command, "-ac", "1", "-ar", str(rate_hz), "-f", "f32le", "pipe:1"],
        input=data,
        check=True,
        capture_output=True,
    )
    samples = array("f")
    samples.frombytes(done.stdout)
    return samples


@pytest.mark.parametrize(
    ("code", "samples", "expected"),
    [
        pytest.param("f", [0.0, 0.5, -1.0, 1.0], [0, 16_384, -32_767, 32_767], id="FP32"),
        pytest.param("d", [0.25], [8_192], id="FP64"),
        pytest.param("e", [0.5], [16_384], id="FP16"),
        pytest.param("h", [-32_768, 7], [-32_768, 7], id="INT16"),
        pytest.param("f", [1.5, -9.0], [32_767, -32_767], id="too loud"),
        pytest.param(
            "f", [float("nan"), float("inf"), float("-inf")], [0, 32_767, -32_767], id="no numbers"
        ),
    ],
)
async def test_samples_become_16_bits_in_a_wav_of_the_model_s_rate(
    code: str, samples: list[float], expected: list[int]
) -> None:
    speech = read_speech("tts", spoken(samples, code, rate=22_050))
    data = await SpeechEncoder(find=no_ffmpeg).encode(speech, SpeechFormat.WAV)
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 22_050)
        frames = file.readframes(file.getnframes())
    assert list(struct.unpack(f"<{len(expected)}h", frames)) == expected


async def test_pcm_of_24_khz_needs_no_ffmpeg_and_has_no_header() -> None:
    speech = read_speech("tts", spoken([0.5, -0.5]))
    data = await SpeechEncoder(find=no_ffmpeg).encode(speech, SpeechFormat.PCM)
    assert bytes(data) == struct.pack("<2h", 16_384, -16_384)


async def test_pcm_of_another_rate_is_resampled_to_24_khz() -> None:
    data = await SpeechEncoder().encode(a_tone(16_000), SpeechFormat.PCM)
    samples = decoded(bytes(data), "-f", "s16le", "-ar", "24000", "-ac", "1")
    assert len(samples) == pytest.approx(24_000, rel=0.01)
    assert crossings(samples) == pytest.approx(440, abs=1)


@pytest.mark.parametrize(
    ("response_format", "magic"),
    [
        (SpeechFormat.MP3, (b"ID3", b"\xff\xfb", b"\xff\xf3")),
        (SpeechFormat.OPUS, (b"OggS",)),
        (SpeechFormat.AAC, (b"\xff\xf1", b"\xff\xf9")),
        (SpeechFormat.FLAC, (b"fLaC",)),
        (SpeechFormat.WAV, (b"RIFF",)),
    ],
)
async def test_what_is_encoded_sounds_as_it_was_spoken(
    response_format: SpeechFormat, magic: tuple[bytes, ...]
) -> None:
    data = bytes(await SpeechEncoder().encode(a_tone(22_050), response_format))
    assert data.startswith(magic)
    samples = decoded(data)
    assert len(samples) == pytest.approx(24_000, rel=0.1)
    middle = samples[6_000:18_000]  # codecs pad both ends, with noise that crosses zero too
    assert crossings(middle) == pytest.approx(220, abs=1)
    assert max(middle) == pytest.approx(0.5, abs=0.05)


async def test_hours_are_written_block_by_block() -> None:
    samples = array("h", [1, -1]) * 200_000
    speech = Speech(samples=memoryview(samples.tobytes()), datatype="INT16", rate_hz=24_000)
    data = await SpeechEncoder(find=no_ffmpeg).encode(speech, SpeechFormat.PCM)
    assert data == samples.tobytes()


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1), (1, 1, 3)])
def test_one_channel_may_have_dimensions_of_1_around_it(shape: tuple[int, ...]) -> None:
    assert read_speech("tts", spoken([0, 0, 0], shape=shape)).count == 3


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        pytest.param(TaskResult(values={"rate": 24_000}), "gave no speech", id="no samples"),
        pytest.param(spoken([0.0], name="sound"), "gave no speech", id="another name"),
        pytest.param(spoken([0.0], rate=None), "gave no speech", id="no rate"),
        pytest.param(spoken([0.0], rate=0), "from 1000 to 384000", id="a rate of 0"),
        pytest.param(spoken([0.0], rate="24k"), "gave no speech", id="a text as rate"),
        pytest.param(spoken([]), r"spoke FP32 of shape \[0\]", id="silence without a sample"),
        pytest.param(spoken([0.0] * 4, shape=(2, 2)), r"one channel of", id="stereo"),
        pytest.param(spoken([0.0] * 4, shape=(9,)), r"shape \[9\]", id="a shape that lies"),
        pytest.param(spoken([0.0], datatype="INT64"), "spoke INT64", id="a datatype of no sound"),
    ],
)
def test_what_is_no_speech_is_the_model_s_failure(result: TaskResult, reason: str) -> None:
    with pytest.raises(TaskFailedError, match=f"model tts .*{reason}"):
        read_speech("tts", result)


@pytest.mark.parametrize("response_format", SpeechFormat)
async def test_without_ffmpeg_wav_and_pcm_are_offered_and_the_rest_names_the_remedy(
    response_format: SpeechFormat,
) -> None:
    encoder = SpeechEncoder(find=no_ffmpeg)
    if response_format in {"wav", "pcm"}:
        await encoder.ensure_offered(response_format)
        return
    with pytest.raises(BadInputError, match=f"not {response_format}.*install ffmpeg") as caught:
        await encoder.ensure_offered(response_format)
    assert caught.value.param == "response_format"


async def test_pcm_of_another_rate_without_ffmpeg_names_the_remedy() -> None:
    with pytest.raises(BadInputError, match=r"speaks at 16000 Hz.*ask for wav"):
        await SpeechEncoder(find=no_ffmpeg).encode(a_tone(16_000), SpeechFormat.PCM)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import sys; sys.exit('no such encoder')", "as mp3: no such encoder"),
        ("import signal; signal.pause()", "as mp3: it took too long"),
    ],
)
async def test_an_ffmpeg_that_fails_is_no_fault_of_the_client(
    tmp_path: Path, body: str, reason: str
) -> None:
    path = script(tmp_path, body)
    encoder = SpeechEncoder(find=lambda: path, timeout_seconds=0.5)
    with pytest.raises(TaskFailedError, match=reason):
        await encoder.encode(a_tone(24_000), SpeechFormat.MP3)
