"""Step-Audio-EditX's example, with a package of upstream's names and habits in upstream's place.

The models are tiny and real (torch modules, ONNX Runtime sessions), the agent and its processes
are those of a pod. One server is shared: it manages its memory, and nothing was loaded before.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
import yaml
from vram_agent.protocol import ModelReport, ModelState, Report, Tier

from tests.examples.step_audio_models import STREAMING_BYTES, make_model_folder, write_tone

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/step-audio-editx"
STAND_IN = Path(__file__).parent / "step_audio_editx"
DEADLINE_SECONDS = 180.0
IDLE_SECONDS = 6
GENERATE = "generate, GPUs '-1'"
HAPPY = {"edit_type": "emotion", "edit_info": "happy", "audio_text": "light five"}


class Served:
    """``serve.py`` as a process, and its clients."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.log: list[str] = []
        self.serving = self.control = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(DEADLINE_SECONDS)
        assert self.serving, self.log

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith("{") and (entry := json.loads(line)).get("event") == "ready":
                self.serving = f"http://{entry['serving']}"
                self.control = f"http://{entry['control']}"
                self._ready.set()
        self._ready.set()

    def report(self) -> Report:
        answer = httpx.get(f"{self.control}/report", timeout=DEADLINE_SECONDS)
        return msgspec.json.decode(answer.content, type=Report)

    def model(self, name: str = "step-audio") -> ModelReport:
        return next(model for model in self.report().models if model.name == name)

    def when(self, is_so: Callable[[Report], bool]) -> Report:
        """The first report that is as wanted: another process changes, and only asking tells."""
        ends = time.monotonic() + DEADLINE_SECONDS
        while not is_so(report := self.report()):
            assert time.monotonic() < ends, report
            time.sleep(0.05)
        return report

    def when_model(self, is_so: Callable[[ModelReport], bool], name: str = "step-audio") -> Report:
        return self.when(lambda report: any(is_so(m) for m in report.models if m.name == name))

    def speak(self, text: str, voice: str = "ben") -> bytes:
        """By the official client, which tries again where it is told to."""
        with openai.OpenAI(base_url=f"{self.serving}/v1", api_key="none") as client:
            return client.audio.speech.create(
                model="step-audio",
                voice=voice,
                input=text,
                response_format="wav",
            ).content

    def edit(self, recording: bytes, **parameters: str) -> bytes:
        agent = load("edit").Agent(self.serving, "")
        found: bytes = agent.edit(recording, parameters)
        return found

    def moves(self) -> list[dict[str, Any]]:
        """What the log says of transitions."""
        entries = [json.loads(line) for line in self.log if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == "transition"]

    def diary(self) -> list[str]:
        return (self.folder / "diary").read_text().splitlines()

    @property
    def gate(self) -> Path:
        return self.folder / "gate"


def load(name: str) -> Any:
    """A script of the example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(models: Path, *flags: str, code: Path = STAND_IN) -> list[str]:
    places = ["--listen-serving", "127.0.0.1:0", "--listen-control", "127.0.0.1:0"]
    script = str(EXAMPLE / "serve.py")
    folders = ["--model-path", str(models), "--code", str(code)]
    return [sys.executable, script, *folders, "--device", "CPU", *places, *flags]


@contextmanager
def serving(models: Path, folder: Path, *flags: str) -> Iterator[Served]:
    variables = {
        "STAND_IN_DIARY": str(folder / "diary"),
        "STAND_IN_GATE": str(folder / "gate"),
        "VRAM_AGENT_STATE_DIR": str(folder / "state"),
        # None, since the device is the CPU; in other words than the factory's, to tell them apart.
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    (folder / "diary").touch()
    with subprocess.Popen(
        command(models, *flags),
        env={**os.environ, **variables},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            served = Served(process, folder)
            yield served
            process.terminate()
            assert process.wait(DEADLINE_SECONDS) == 0
            print(*served.log, sep="")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step-audio")
    make_model_folder(folder)
    return folder


@pytest.fixture(scope="module")
def recording(models: Path) -> bytes:
    write_tone(models / "recording.wav", 500)
    return (models / "recording.wav").read_bytes()


@pytest.fixture(scope="module")
def managed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ("--enable-gpu-management", "--gpu-idle-timeout", str(IDLE_SECONDS))
    folder = tmp_path_factory.mktemp("managed")
    with serving(models, folder, *flags, "--enable-auto-transcribe") as served:
        report = served.report()
        assert [model.state for model in report.models] == [ModelState.ABSENT] * 2
        assert report.memory.used_bytes == 0
        assert served.diary() == []
        yield served


def test_every_part_leaves_memory_and_comes_back_with_the_same_voice(
    managed: Served, recording: bytes
) -> None:
    spoken = managed.speak("hello")
    edited = managed.edit(recording, **HAPPY)
    assert len(spoken) > 10_000
    assert len({spoken, edited, managed.speak("good bye"), managed.speak("hello", "anna")}) == 4
    # What tasks leave: FunASR's cache and attention map, keys of the LLM, a table of positions.
    report = managed.when_model(lambda model: model.state is ModelState.OFFLOADED)
    model = next(model for model in report.models if model.name == "step-audio")
    assert (model.vram_bytes, model.last_transition and model.last_transition.message) == (0, "")
    assert report.memory.classes.live_tensors == 0
    assert managed.speak("hello") == spoken
    assert managed.edit(recording, **HAPPY) == edited
    report = managed.when_model(lambda model: model.tier is Tier.HOST)
    assert (report.memory.used_bytes, report.memory.residual_bytes) == (0, 0)
    assert managed.model().host_bytes > 0
    assert managed.edit(recording, **HAPPY) == edited
    assert managed.speak("hello") == spoken
    diary = managed.diary()
    assert diary.count("Module.cuda(None)") == diary.count(GENERATE) == 8
    assert diary.count("cosy_impl on cpu, GPUs ''") == 1, "loaded once, and out of sight of GPUs"
    assert "pe moved" not in diary
    assert any(line.startswith("pe made for 8") for line in diary), "in inference mode"
    assert "whisper loaded" not in diary
    came = [move["bytes"] for move in managed.moves() if move["to"] == "Resident/VRAM"]
    assert 0 < max(came) < STREAMING_BYTES / 10


def test_requests_at_the_same_time_are_answered_as_if_alone(
    managed: Served, recording: bytes
) -> None:
    texts = [f"sentence {number}" for number in range(3)]
    sad = {**HAPPY, "edit_info": "sad"}
    alone = [*map(managed.speak, texts), managed.edit(recording, **sad)]
    with ThreadPoolExecutor(8) as pool:
        rows = [[pool.submit(managed.speak, text) for text in texts] for _ in range(2)]
        for row in rows:
            row.append(pool.submit(managed.edit, recording, **sad))
        assert [[answer.result() for answer in row] for row in rows] == [alone, alone]


def test_a_client_that_leaves_gives_up_its_place(managed: Served) -> None:
    before = managed.diary().count(GENERATE)
    os.mkfifo(managed.gate)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(managed.speak, "first")
        managed.when_model(lambda model: model.in_flight == 1)
        with subprocess.Popen(
            [sys.executable, "-c", LEAVING_CLIENT, f"{managed.serving}/v1/audio/speech"]
        ) as leaving:
            managed.when_model(lambda model: model.queued == 1)
            leaving.kill()
        managed.when_model(lambda model: model.queued == 0)
        # Opening waits for the task to come to the gate.
        with managed.gate.open("wb"):
            managed.gate.unlink()
        assert len(first.result()) > 10_000
    managed.speak("third")
    assert managed.diary().count(GENERATE) == before + 2


LEAVING_CLIENT = """
import sys, urllib.request
body = b'{"model": "step-audio", "input": "second", "response_format": "wav"}'
urllib.request.urlopen(urllib.request.Request(sys.argv[1], body))
"""


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"edit_type": "louder"}, "edit_type 'louder' is none of emotion, style, vad"),
        ({**HAPPY, "edit_info": "hapy"}, "edit_info of emotion is one of happy, sad, remove"),
        ({**HAPPY, "audio_text": " "}, "POST /v1/audio/transcriptions tells it"),
        ({**HAPPY, "edit_typo": "a"}, "parameter 'edit_typo'"),
        ({"edit_type": "paralinguistic", "audio_text": "a"}, "the new words with their tags"),
        ({"edit_type": "denoise", "file": "no sound"}, "no sound file that libsndfile reads"),
    ],
)
def test_a_wrong_edit_is_refused_with_what_would_be_right(
    managed: Served, recording: bytes, parameters: dict[str, str], words: str
) -> None:
    edit = load("edit")
    given = dict(parameters)
    file = given.pop("file", "").encode() or recording
    with pytest.raises(edit.RefusedError, match=" 400 ") as caught:
        edit.Agent(managed.serving, "").edit(file, given)
    assert words in str(caught.value)


def test_a_wrong_voice_or_wish_is_refused_with_what_would_be_right(managed: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="'carl' is not there; there are anna, ben"):
        managed.speak("hello", "carl")
    body = {"model": "step-audio", "input": "a", "speed": 2}
    answer = httpx.post(f"{managed.serving}/v1/audio/speech", json=body, timeout=DEADLINE_SECONDS)
    assert answer.status_code == 400
    assert "edit_type style or speed" in answer.json()["error"]["message"]


def test_words_that_nobody_wrote_down_are_asked_of_whisper_which_loads_for_that(
    managed: Served, models: Path, recording: bytes, tmp_path: Path
) -> None:
    assert managed.model("whisper").state is ModelState.ABSENT
    wanted = tmp_path / "happy.wav"
    script = [sys.executable, str(EXAMPLE / "edit.py"), str(models / "recording.wav")]
    flags = ["-o", str(wanted), "--edit-type", "emotion", "--edit-info", "happy"]
    done = subprocess.run(
        [*script, *flags, "--url", managed.serving], check=True, capture_output=True, text=True
    )
    said = done.stderr.removeprefix("it says: ").strip()
    assert said in {"light", "five", "door", "seven"}
    assert wanted.read_bytes() == managed.edit(recording, **{**HAPPY, "audio_text": said})
    with wave.open(io.BytesIO(wanted.read_bytes())) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert (file.getframerate(), file.getnchannels()) == (24_000, 1)
    assert samples.std() > 100
    assert managed.diary().count("whisper loaded") == 1
    managed.when_model(lambda model: model.tier is Tier.HOST, "whisper")


def test_without_management_all_is_loaded_at_the_start_and_stays(
    models: Path, tmp_path: Path
) -> None:
    with serving(models, tmp_path) as served:
        served.when_model(lambda model: model.state is ModelState.RESIDENT)
        served.speak("hello")
        (model,) = served.report().models
        assert (model.name, model.state) == ("step-audio", ModelState.RESIDENT)
        assert len(served.moves()) == 2, "loaded and brought onto the device, once"


def without(name: str) -> Callable[[Path], list[str]]:
    """The command, for a folder in which something is not there."""

    def prepared(folder: Path) -> list[str]:
        make_model_folder(folder)
        (folder / name).rename(folder / "elsewhere")
        return command(folder)

    return prepared


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: command(folder / "none"), "none: the folder is missing; it needs Step-"),
        (
            without("Step-Audio-Tokenizer/speech_tokenizer_v1.onnx"),
            ": Step-Audio-Tokenizer/speech_tokenizer_v1.onnx is missing",
        ),
        (lambda folder: command(folder, code=folder), "there is no tts.py; give --code the folder"),
    ],
)
def test_a_wrong_folder_ends_the_command_with_one_line(
    tmp_path: Path, prepare: Callable[[Path], list[str]], words: str
) -> None:
    done = subprocess.run(prepare(tmp_path), check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert words in line


def test_the_workload_says_what_the_command_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    document = yaml.safe_load((EXAMPLE / "workload.yaml").read_text())
    serve = load("serve")
    flags = ["--model-path", "/models", "--code", "/opt/step-audio", "--enable-gpu-management"]
    options = serve.build_parser().parse_args([*flags, "--enable-auto-transcribe"])
    text = json.dumps(serve.make_config(options)["models"])
    composed = json.loads(text.replace(str(EXAMPLE), "/opt/example"))
    assert document["spec"]["models"] == composed
