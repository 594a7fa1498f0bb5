"""A speech model on the node's one GPU: loaded on demand, given back, brought back, correct."""

from __future__ import annotations

import array
import base64
import json
import re
import wave
from pathlib import Path

import pytest
from openai import OpenAI
from tritonclient.http import InferenceServerClient, InferInput
from vram_agent.protocol import SERVING_PORT

from tests import models
from tests.e2e.system import REQUEST_SECONDS, Json, System
from tests.e2e.workloads import DIGITS, WHISPER, workload


@pytest.fixture(scope="module")
def speech(system: System) -> System:
    system.apply(workload("speech", [WHISPER, DIGITS], gpu_count=1))
    system.wait_ready("speech")
    return system


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def model_state(system: System, name: str) -> tuple[str, str]:
    entry = next(model for model in system.report("speech")["models"] if model["name"] == name)
    return entry["state"], entry["tier"]


def samples(path: Path) -> list[float]:
    with wave.open(str(path)) as file:
        return [value / 32768 for value in array.array("h", file.readframes(file.getnframes()))]


def test_the_pod_holds_the_gpu_and_nothing_is_loaded_at_start(speech: System) -> None:
    pod = speech.pod("speech")
    agent = next(c for c in pod["spec"]["containers"] if c["name"] == "agent")
    assert agent["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["spec"]["automountServiceAccountToken"] is False
    report = speech.report("speech")
    assert [model["state"] for model in report["models"]] == ["Absent", "Absent"]
    assert report["memory"]["usedBytes"] == 0
    assert report["agent"]["pod"]["uid"] == pod["metadata"]["uid"]


@pytest.mark.parametrize("clip", models.clips()[:3], ids=lambda clip: clip.path.stem)
def test_a_spoken_clip_is_heard_word_for_word(speech: System, clip: models.Clip) -> None:
    answer = speech.transcribe("speech", clip.path, {"model": "whisper", "language": "en"})
    assert answer.status == 200, answer
    assert words(answer.json()["text"]) == words(clip.text)


def test_a_spoken_digit_is_recognised_by_the_onnx_model(speech: System) -> None:
    clip = models.digit_clips()[0]
    body: Json = {
        "inputs": [
            {
                "name": "audio",
                "shape": [1, 16000],
                "datatype": "FP32",
                "data": samples(clip.path),
            }
        ],
        "outputs": [{"name": "digit"}],
    }
    answer = speech.request("speech", "POST", "/v2/models/digits/infer", body)
    assert answer.status == 200, answer
    assert answer.json()["outputs"][0]["data"] == [clip.digit]


def test_the_official_openai_client_transcribes_through_the_service(speech: System) -> None:
    clip = models.clips()[3]
    with (
        speech.forwarded("service/speech", SERVING_PORT) as address,
        OpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=REQUEST_SECONDS) as client,
    ):
        assert {model.id for model in client.models.list()} >= {"whisper", "digits"}
        heard = client.audio.transcriptions.create(model="whisper", file=clip.path, language="en")
    assert words(heard.text) == words(clip.text)


def test_the_official_triton_client_infers_through_the_service(speech: System) -> None:
    clip = models.digit_clips()[1]
    audio = models.read_samples(clip.path).reshape(1, -1)
    given = InferInput("audio", list(audio.shape), "FP32").set_data_from_numpy(audio)
    with (
        speech.forwarded("service/speech", SERVING_PORT) as address,
        InferenceServerClient(address, network_timeout=REQUEST_SECONDS) as client,
    ):
        assert client.is_model_ready("digits")
        found = client.infer("digits", [given])
    assert found.as_numpy("digit").tolist() == [clip.digit]
    assert found.as_numpy("probabilities").argmax() == clip.digit


def test_an_idle_model_sinks_to_host_and_comes_back(speech: System) -> None:
    clip = models.clips()[0]
    speech.transcribe("speech", clip.path, {"model": "whisper"})
    speech.wait(
        "whisper in the Host tier",
        60,
        lambda: model_state(speech, "whisper") == ("Offloaded", "Host") or None,
    )
    answer = speech.transcribe("speech", clip.path, {"model": "whisper", "response_format": "text"})
    assert words(answer.body.decode()) == words(clip.text)


def test_get_gmw_shows_what_is_loaded_without_a_log(speech: System) -> None:
    table = speech.kubectl("get", "gmw", "speech")
    head, row = table.splitlines()[:2]
    assert head.split()[:3] == ["NAME", "TARGET", "READY"]
    assert "Deployment/speech" in row
    found = speech.get("gmw", "speech")
    assert found["status"]["agents"] == {"expected": 1, "reporting": 1}
    assert {model["name"] for model in found["status"]["models"]} == {"whisper", "digits"}


def test_a_new_model_joins_the_running_pod_without_a_restart(speech: System) -> None:
    before = speech.pod("speech")["metadata"]["uid"]
    extra = {**WHISPER, "name": "second"}
    speech.apply(workload("speech", [WHISPER, DIGITS, extra], gpu_count=1))

    def joined() -> bool | None:
        return "second" in {m["name"] for m in speech.report("speech")["models"]} or None

    speech.wait("the pushed config", 60, joined)
    assert speech.pod("speech")["metadata"]["uid"] == before
    assert (
        speech.report("speech")["configGeneration"]
        == (speech.get("gmw", "speech")["metadata"]["generation"])
    )


def test_no_pod_carries_a_secret_that_commands_agents(speech: System) -> None:
    trust = speech.get("configmap", "vram-agent-trust")
    assert "BEGIN PUBLIC KEY" in trust["data"]["keys.pem"]
    assert "PRIVATE" not in json.dumps(trust)
    assert base64.b64decode(trust["data"]["keys.pem"].split("-----")[2].strip())
