"""The examples' models are really served, with small ones in place of those of the hubs.

The config is what the operator makes of the YAML; ``source`` and what else names a hub or a mount
of the pod is changed, and nothing more. Every ``curl`` and every Python block of the pages is run
as it stands, but for the address; where the page shows an answer, it is that one.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from vram_agent.backend import Task, TaskKind, Tensor
from vram_operator.core.resources import make_agent_config
from vram_operator.pods import read_workload

from tests import models
from tests.examples.examples import FOLDER, HOSTED, Example
from tests.integration.agent.conftest import Agent, StartAgent
from tests.models import tiny_funasr, tiny_transformers
from tests.support.pages import ROOT

Model = dict[str, Any]
NAMES = {example.name: example for example in HOSTED}
HEARD = "light five"


def small_whisper(model: Model, _: Path) -> Model:
    return {**model, "source": str(models.WHISPER)}


def small_funasr(model: Model, folder: Path) -> Model:
    vad = str(tiny_funasr.make_vad(folder / "vad"))
    # The committed recogniser takes no batches.
    options = {**model["options"], "vadModel": vad, "batchSizeSeconds": 0}
    return {**model, "source": str(models.FUNASR), "options": options}


def small_onnx(model: Model, _: Path) -> Model:
    return {**model, "source": str(models.DIGITS)}


def small_transformers(model: Model, folder: Path) -> Model:
    tiny_transformers.save_classifier(folder / "classifier")
    return {**model, "source": str(folder / "classifier")}


def own_code(model: Model, _: Path) -> Model:
    return {**model, "options": {**model["options"], "path": str(FOLDER / "python-tts")}}


SMALL: dict[str, Callable[[Model, Path], Model]] = {
    "speech": small_whisper,
    "funasr": small_funasr,
    "onnx": small_onnx,
    "transformers": small_transformers,
    "python-tts": own_code,
}


def rendered(example: Example) -> dict[str, Any]:
    """The operator's config for the workload, as if the apiserver had just taken it."""
    manifest = example.object("GPUModelWorkload")
    manifest["metadata"] |= {
        "namespace": "default",
        "uid": "0",
        "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    config: dict[str, Any] = msgspec.to_builtins(make_agent_config(read_workload(manifest)))
    return config


class Page:
    """An example's page beside an agent that serves its models."""

    def __init__(self, example: Example, agent: Agent, folder: Path) -> None:
        self.example, self.agent, self.folder = example, agent, folder

    async def run_all(self) -> list[str]:
        """What each curl and then each program printed; they see the repository's files."""
        for name in ("tests", "examples"):
            (self.folder / name).symlink_to(ROOT / name)
        said = []
        for command in self.example.commands:
            if command.text.startswith("curl "):
                text = command.text.replace("curl ", "curl --silent --fail-with-body ", 1)
                said.append(await self._run("bash", "-c", text))
                assert command.answer in ("", said[-1].strip())
        for program in self.example.programs:
            said.append(await self._run(sys.executable, "-c", program))
            shown = re.findall(r"\)  # (.+)$", program, re.MULTILINE)
            assert shown in ([], [said[-1].strip()])
        return said

    async def _run(self, *command: str) -> str:
        *program, text = command
        assert "localhost:8000" in text
        address = self.agent.serving.removeprefix("http://")
        process = await asyncio.create_subprocess_exec(
            *program,
            text.replace("localhost:8000", address),
            cwd=self.folder,
            env={**os.environ, "no_proxy": "127.0.0.1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, complaints = await process.communicate()
        assert process.returncode == 0, f"{output.decode()}{complaints.decode()}"
        return output.decode()


@pytest.fixture
async def serve(start_agent: StartAgent, tmp_path: Path) -> Callable[[str], Any]:
    async def served(name: str) -> Page:
        config = rendered(NAMES[name])
        small = [SMALL[name](model, tmp_path) for model in config["models"]]
        # What else it says is of the pod: addresses, the device, the drain.
        own = {field: config[field] for field in ("vram", "hostMemory", "queue") if field in config}
        agent = await start_agent(*small, **own)
        (tmp_path / "page").mkdir()
        return Page(NAMES[name], agent, tmp_path / "page")

    return served


async def test_whisper_hears_what_its_page_says(serve: Callable[[str], Any]) -> None:
    said = await (await serve("speech")).run_all()
    assert [json.loads(said[0]), said[1]] == [{"text": HEARD}, f"{HEARD}\n"]


async def test_funasr_hears_a_recording_with_its_voice_detector(
    serve: Callable[[str], Any],
) -> None:
    verbose, text = await (await serve("funasr")).run_all()
    answer = json.loads(verbose)
    assert answer["text"].strip() == HEARD
    assert text.strip() == HEARD
    clip = next(clip for clip in models.clips() if clip.text == HEARD)
    with wave.open(str(clip.path)) as recording:
        seconds = recording.getnframes() / recording.getframerate()
    assert answer["duration"] == pytest.approx(seconds, abs=0.01)


async def test_onnx_shows_the_graph_and_finds_the_digit(serve: Callable[[str], Any]) -> None:
    _, metadata, digit = await (await serve("onnx")).run_all()
    shown = json.loads(metadata)
    assert [tensor["name"] for tensor in shown["inputs"]] == ["audio"]
    assert {tensor["name"] for tensor in shown["outputs"]} == {"probabilities", "digit"}
    assert digit == "[9]\n"


async def test_transformers_answers_as_the_stock_pipeline(
    serve: Callable[[str], Any], tmp_path: Path
) -> None:
    page = await serve("transformers")
    by_curl, by_client = await page.run_all()
    found = {output["name"]: output["data"] for output in json.loads(by_curl)["outputs"]}
    packed = b"".join(len(text).to_bytes(4, "little") + text for text in (b"play music", b"stop"))
    asked = Tensor(name="text", datatype="BYTES", shape=(2,), data=packed)
    task = Task(kind=TaskKind.INFER, tensors=[asked], parameters={"top_k": 2})
    labels, scores = tiny_transformers.answer(str(tmp_path / "classifier"), task)
    assert found["label"] == labels
    assert found["score"] == pytest.approx(scores, rel=1e-4)
    assert re.findall(r"low|middle|high", by_client) == labels


def pitch_hertz(samples: Any, rate_hertz: int) -> float:
    """By autocorrelation, between 80 and 400 Hz."""
    energy = np.correlate(samples, samples, "full")[len(samples) - 1 :]
    first, last = rate_hertz // 400, rate_hertz // 80
    return float(rate_hertz / (first + energy[first:last].argmax()))


def read_wav(path: Path) -> tuple[Any, int]:
    with wave.open(io.BytesIO(path.read_bytes())) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return pcm.astype(np.float32) / 32768, file.getframerate()


async def test_your_own_code_speaks_with_the_voice_and_speed_that_were_asked(
    serve: Callable[[str], Any],
) -> None:
    page = await serve("python-tts")
    await page.run_all()
    letters = len("a e i o u")
    for name, hertz, letter_seconds in (("speech.wav", 110, 0.12), ("slow.wav", 220, 0.24)):
        samples, rate = read_wav(page.folder / name)
        assert len(samples) / rate == pytest.approx(letters * letter_seconds, abs=0.01)
        count = len(samples) // letters
        sounds = [samples[n * count : (n + 1) * count] for n in range(letters)]
        assert [bool(np.abs(sound).max() > 0.1) for sound in sounds] == [True, False] * 4 + [True]
        for vowel in sounds[::2]:
            assert pitch_hertz(vowel, rate) == pytest.approx(hertz, rel=0.02)
    # The ear tells vowels apart by where they are loud: "o" at 570 and 840 Hz, "i" at 270 and 2290.
    samples, rate = read_wav(page.folder / "speech.wav")
    count = len(samples) // letters
    shares = []
    for number in (4, 6):
        power = np.abs(np.fft.rfft(samples[number * count : (number + 1) * count])) ** 2
        hertz_of = np.fft.rfftfreq(count, 1 / rate)
        shares.append(power[(hertz_of > 500) & (hertz_of < 1000)].sum() / power.sum())
    assert shares[1] > 5 * shares[0]

    asked = {"model": "tts", "input": "a", "voice": "loud", "response_format": "wav"}
    url = f"{page.agent.serving}/v1/audio/speech"
    async with page.agent.session.post(url, json=asked) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["message"] == "voice 'loud' is not one of low, high"
