"""The official ``tritonclient.http`` against the real command.

The client rests on gevent, whose sockets belong to one thread: each test talks in one call of
``asyncio.to_thread``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException
from vram_agent.protocol import ModelState, Tier

from tests.integration.agent.conftest import DIGITS_MODEL, Agent, StartAgent
from tests.models import digit_clips, read_samples

ECHO_MODEL: dict[str, Any] = {
    "name": "echo",
    "runtime": "Python",
    "source": "served_models:make_echo",
    "options": {"path": str(Path(__file__).parent)},
    "residency": {"afterTask": "Keep"},
}
CLIP = digit_clips()[0]
TENSORS = {
    "BOOL": np.array([[True, False]]),
    **{f"UINT{n * 8}": np.array([0, 1, np.iinfo(f"u{n}").max], f"u{n}") for n in (1, 2, 4, 8)},
    **{f"INT{n * 8}": np.array([[np.iinfo(f"i{n}").min], [-1]], f"i{n}") for n in (1, 2, 4, 8)},
    "FP16": np.array([1.5, -65504], np.float16),
    "FP32": np.array([[[1e-45, 3.4e38]]], np.float32),
    "FP64": np.array([1.7e308, -0.0]),
    "BYTES": np.array([b"", b"caf\xc3\xa9", b"a\0b"], object),
}
EMPTY = np.empty((0, 3), np.float32)


async def talk(agent: Agent, speak: Callable[[InferenceServerClient], None]) -> None:
    def connected() -> None:
        with InferenceServerClient(
            agent.serving.removeprefix("http://"), network_timeout=60.0
        ) as client:
            speak(client)

    await asyncio.to_thread(connected)


def as_input(name: str, datatype: str, array: Any, *, binary: bool = True) -> InferInput:
    given = InferInput(name, list(array.shape), datatype)
    return given.set_data_from_numpy(array, binary_data=binary)


async def test_the_server_and_its_models_say_what_they_are(start_agent: StartAgent) -> None:
    agent = await start_agent(DIGITS_MODEL, ECHO_MODEL)

    def speak(client: InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.is_model_ready("digits", "1")
        assert not client.is_model_ready("digits", "2")
        server = client.get_server_metadata()
        assert server["name"] == "vram-agent"
        assert "binary_tensor_data" in server["extensions"]
        client.load_model("digits")
        metadata = client.get_model_metadata("digits")
        assert metadata["platform"] == "onnxruntime_onnx"
        assert [(i["name"], i["datatype"], i["shape"][1]) for i in metadata["inputs"]] == [
            ("audio", "FP32", 16_000)
        ]
        assert {o["name"]: o["datatype"] for o in metadata["outputs"]} == {
            "probabilities": "FP32",
            "digit": "INT64",
        }

    await talk(agent, speak)


async def test_models_are_loaded_and_unloaded_and_the_index_shows_them(
    start_agent: StartAgent,
) -> None:
    broken = {"name": "broken", "runtime": "ONNX", "source": "/nowhere/model.onnx"}
    agent = await start_agent({**DIGITS_MODEL, "residency": {"afterTask": "Keep"}}, broken)

    def load(client: InferenceServerClient) -> None:
        client.load_model("digits")
        with pytest.raises(InferenceServerException, match=r"/nowhere/model\.onnx") as caught:
            client.load_model("broken")
        assert caught.value.status() == "503"
        index = {entry["name"]: entry for entry in client.get_model_repository_index()}
        assert index["digits"] == {
            "name": "digits",
            "version": "1",
            "state": "READY",
            "reason": "",
        }
        assert index["broken"]["state"] == "UNAVAILABLE"
        assert "/nowhere/model.onnx" in index["broken"]["reason"]

    def unload(client: InferenceServerClient) -> None:
        client.unload_model("digits", unload_dependents=True)
        assert client.is_model_ready("digits"), "the next request loads it again"

    await talk(agent, load)
    (digits, _) = (await agent.report()).models
    assert (digits.state, digits.tier) == (ModelState.RESIDENT, Tier.VRAM)
    await talk(agent, unload)
    (digits, _) = (await agent.report()).models
    assert (digits.state, digits.tier) == (ModelState.ABSENT, Tier.DISK)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_a_model_finds_the_same_in_json_and_in_binary(
    start_agent: StartAgent, compression: str | None
) -> None:
    agent = await start_agent(DIGITS_MODEL)
    samples = read_samples(CLIP.path)[None]

    def speak(client: InferenceServerClient) -> None:
        found = {}
        for binary in (True, False):
            outputs = [
                InferRequestedOutput("digit", binary_data=binary),
                InferRequestedOutput("probabilities", binary_data=binary),
            ]
            result = client.infer(
                "digits",
                [as_input("audio", "FP32", samples, binary=binary)],
                outputs=outputs,
                request_id="r-1",
                request_compression_algorithm=compression,
            )
            assert result.get_response()["id"] == "r-1"
            assert result.as_numpy("digit").tolist() == [CLIP.digit]
            found[binary] = result.as_numpy("probabilities")
        np.testing.assert_allclose(found[True], found[False], rtol=1e-6)

    await talk(agent, speak)


async def test_every_datatype_goes_through_in_binary_and_in_json(start_agent: StartAgent) -> None:
    agent = await start_agent(ECHO_MODEL)

    def speak(client: InferenceServerClient) -> None:
        for binary in (True, False):
            result = client.infer(
                "echo",
                [as_input("empty", "FP32", EMPTY, binary=binary)]
                + [as_input(d, d, array, binary=binary) for d, array in TENSORS.items()],
                outputs=[InferRequestedOutput(n, binary_data=binary) for n in ("empty", *TENSORS)],
            )
            assert result.as_numpy("empty").shape == (0, 3)
            for datatype, array in TENSORS.items():
                assert result.get_output(datatype)["datatype"] == datatype
                given_back = result.as_numpy(datatype)
                if datatype == "BYTES" and not binary:
                    assert given_back.tolist() == ["", "café", "a\0b"]
                else:
                    np.testing.assert_array_equal(given_back, array, strict=True)

    await talk(agent, speak)


async def test_floats_that_json_lacks_come_back_as_they_were_in_binary(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(ECHO_MODEL)
    array = np.array([np.nan, np.inf, -np.inf], np.float32)

    def speak(client: InferenceServerClient) -> None:
        result = client.infer("echo", [as_input("x", "FP32", array)])
        np.testing.assert_array_equal(result.as_numpy("x"), array)

    await talk(agent, speak)


async def test_errors_are_the_client_s_own_with_our_words(start_agent: StartAgent) -> None:
    agent = await start_agent(DIGITS_MODEL, ECHO_MODEL, limits={"requestBytes": "1Mi"})
    short = np.zeros((1, 8), np.float32)
    large = np.zeros(300_000, np.float32)

    def speak(client: InferenceServerClient) -> None:
        def refused(*arguments: Any, **options: Any) -> tuple[str, str]:
            with pytest.raises(InferenceServerException) as caught:
                client.infer(*arguments, **options)
            return caught.value.status(), caught.value.message()

        given = [as_input("audio", "FP32", short)]
        assert refused("gone", given) == ("404", "no model 'gone'; the config has: digits, echo")
        assert refused("digits", given, model_version="7") == (
            "404",
            "model digits has no version 7; it has 1",
        )
        status, message = refused("digits", given)
        assert status == "400"
        assert "audio" in message
        assert refused("echo", given, parameters={"refuse": "not today"}) == ("400", "not today")
        assert refused("echo", [as_input("x", "FP32", large)]) == (
            "413",
            "the request is larger than 1Mi bytes",
        )
        ranked = [InferRequestedOutput("digit", class_count=3)]
        status, message = refused("digits", given, outputs=ranked)
        assert status == "400"
        assert "classification is not offered" in message

    await talk(agent, speak)


async def test_without_the_api_key_only_probes_are_answered(
    start_agent: StartAgent, tmp_path: Path
) -> None:
    keys = tmp_path / "api-keys"
    keys.write_text("secret\n")
    agent = await start_agent(ECHO_MODEL, serving={"apiKeyFile": str(keys)})
    given = [as_input("x", "INT8", np.array([7], np.int8))]

    def speak(client: InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="needs an API key") as caught:
            client.infer("echo", given)
        assert caught.value.status() == "401"
        known = {"Authorization": "Bearer secret"}
        assert client.infer("echo", given, headers=known).as_numpy("x").tolist() == [7]

    await talk(agent, speak)
