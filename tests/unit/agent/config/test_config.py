from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vram_agent.config import (
    ConfigError,
    Settings,
    config_from_flags,
    load_config,
    parse_config,
    with_overrides,
)
from vram_agent.protocol import AfterTask, DevicePreference, OffloadTier, Runtime

MODEL = {"name": "whisper", "runtime": "Whisper", "source": "/models/large-v3.pt"}

RUNTIMES = "Whisper, FunASR, ONNX, Torch, Transformers, Python"
NO_HOST_TIER = (
    "Host is impossible with options.loadsOn: cuda, "
    "whose weights live in the GPU process only; write PinnedHost or Disk"
)


def model(**fields: Any) -> dict[str, Any]:
    return {"models": [{**MODEL, **fields}]}


@pytest.mark.parametrize(
    ("document", "faults"),
    [
        pytest.param(
            model(residency={"ofloadTier": "Host"}),
            ["models[0].residency.ofloadTier: unknown field; did you mean offloadTier?"],
            id="an unknown field names the nearest valid one",
        ),
        pytest.param(
            {"modles": []},
            ["modles: unknown field; did you mean models?"],
            id="at the top too",
        ),
        pytest.param(
            {"queue": {"xyz": 1}},
            ["queue.xyz: unknown field; the fields here are maxDepth, timeoutSeconds"],
            id="where nothing is near the fields are listed",
        ),
        pytest.param(
            model(runtime="whisper"),
            [
                f"models[0].runtime: 'whisper' is not one of {RUNTIMES}; did you mean Whisper?",
            ],
            id="an enum lists its words",
        ),
        pytest.param(
            {"models": [{"name": "a", "runtime": "ONNX"}]},
            ["models[0].source: missing"],
            id="a required field is missed",
        ),
        pytest.param(
            {"models": "whisper"},
            ["models: Expected `array`, got `str`"],
            id="a type is named",
        ),
        pytest.param(
            {"queue": {"maxDepth": 0}},
            ["queue.maxDepth: Expected `int` >= 1"],
            id="a bound is named",
        ),
        pytest.param(
            {"vram": {"budget": "10GB", "headroom": -3, "warnAbove": 1024}},
            [
                "vram.budget: '10GB': not a quantity; write for example 10G or 512Mi",
                "vram.headroom: -3: not a quantity; write for example 10G or 512Mi",
                'vram.warnAbove: 1024: a number; write it as text, "1024", or as 10G or 512Mi',
            ],
            id="a quantity is shown, not its pattern",
        ),
        pytest.param(
            {"vram": {"dirty": {"above": "1GB", "polcy": "Wait"}}},
            [
                "vram.dirty.polcy: unknown field; did you mean policy?",
                "vram.dirty.above: '1GB': not a quantity; write for example 10G or 512Mi",
            ],
            id="a fault inside of what may be absent",
        ),
        pytest.param(
            model(name="A_b"),
            [
                (
                    "models[0].name: 'A_b': not a name; write 1 to 63 of a-z, 0-9 and -, "
                    "with a letter or digit at both ends"
                )
            ],
            id="a name is described, not its pattern",
        ),
        pytest.param(
            {"kind": "Foo", "apiVersion": "v2"},
            ["apiVersion: 'v2' is not vram.dev/v1alpha1", "kind: 'Foo' is not AgentConfig"],
            id="kind and version are said",
        ),
        pytest.param(
            {"queue": {"maxDepth": "many"}},
            ["queue.maxDepth: Expected `int`, got `str`"],
            id="a number is not a word",
        ),
        pytest.param(
            {"models": [MODEL, MODEL]},
            ["models[1].name: 'whisper' is models[0]'s name too; names are unique"],
            id="two models of one name",
        ),
        pytest.param(
            {
                "models": [
                    {**MODEL, "group": "g", "device": "0"},
                    {**MODEL, "name": "b", "group": "g"},
                    {**MODEL, "name": "c", "group": "g", "device": "1"},
                ]
            },
            [
                (
                    "models[2].device: 1, but whisper of the same group g is on 0; "
                    "a group has one GPU process on one device"
                )
            ],
            id="a group on two devices",
        ),
        pytest.param(
            {"listen": {"serving": "8000", "control": "0.0.0.0:99999"}},
            [
                "listen.serving: '8000' is not host:port; write for example 0.0.0.0:8000",
                "listen.control: '0.0.0.0:99999' is not host:port; write for example 0.0.0.0:8000",
            ],
            id="addresses are host and port",
        ),
        pytest.param(
            model(runtime="Python", options={"loadsOn": "cuda"}),
            [
                f"models[0].residency.idleTier: {NO_HOST_TIER}",
            ],
            id="no Host tier without a template",
        ),
        pytest.param(
            {"run": {"ready": {"tcp": "7860"}, "idle": {"http": "127.0.0.1:7860/idle"}}},
            [
                (
                    "run.idle.http: '127.0.0.1:7860/idle' is not a URL; write for example "
                    "http://127.0.0.1:7860/"
                ),
                "run.ready.tcp: '7860' is not host:port; write for example 0.0.0.0:8000",
            ],
            id="URLs of a wrapped application are whole",
        ),
        pytest.param(["models"], ["config: a mapping is expected, not list"], id="not a mapping"),
        pytest.param(None, ["config: a mapping is expected, not nothing"], id="an empty file"),
    ],
)
def test_a_fault_names_its_field_and_its_remedy(document: Any, faults: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    assert caught.value.faults == faults


@pytest.mark.parametrize(
    ("field", "value"),
    [("vram", "3 GB"), ("vram", "-1"), ("name", "Whisper"), ("name", ""), ("device", "GPU")],
)
def test_patterns_are_kept_and_the_value_is_shown(field: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(model(**{field: value}))
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(f"models[0].{field}: {value!r}: ")


def test_all_faults_are_found_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "kind": "Config",
                "models": [{"name": "a", "runtime": "x", "sorce": "y"}, {"name": "B"}],
                "vram": {"budget": "lots"},
            }
        )
    paths = [fault.partition(":")[0] for fault in caught.value.faults]
    assert paths == [
        "kind",
        "models[0].sorce",
        "models[0].runtime",
        "models[0].source",
        "models[1].name",
        "models[1].runtime",
        "models[1].source",
        "vram.budget",
    ]


def test_a_file_may_be_yaml_or_json(tmp_path: Path) -> None:
    yaml = tmp_path / "a.yaml"
    yaml.write_text(
        "apiVersion: vram.dev/v1alpha1\nkind: AgentConfig\n"
        "models:\n- {name: tts, runtime: Torch, source: /m, residency: {afterTask: Keep}}\n"
    )
    json = tmp_path / "a.json"
    json.write_text('{"models": [{"name": "tts", "runtime": "Torch", "source": "/m"}]}')
    assert load_config(yaml).models[0].residency.after_task is AfterTask.KEEP
    assert load_config(json).models[0].residency.offload_tier is OffloadTier.PINNED_HOST


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"models: [", r"a.yaml:1:10: ", id="broken YAML names its line"),
        pytest.param(b"\xff\xfe", "not a text in UTF-8", id="bytes"),
        pytest.param(b'{"models": [}', "a.yaml:1:", id="broken JSON names its line"),
    ],
)
def test_a_file_that_cannot_be_parsed(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_one_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: No such file or directory"):
        load_config(tmp_path / "none.yaml")


def test_flags_make_models() -> None:
    config = config_from_flags(["a=onnx:/m/a.onnx", "b=Python:pkg.mod:factory"])
    assert [(m.name, m.runtime, m.source) for m in config.models] == [
        ("a", Runtime.ONNX, "/m/a.onnx"),
        ("b", Runtime.PYTHON, "pkg.mod:factory"),
    ]


def test_flags_that_are_not_models_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_flags(["a", "b=ONNX", "=ONNX:/m"])
    assert len(caught.value.faults) == 3


def test_flags_win_over_the_file() -> None:
    config = with_overrides(parse_config(model()), "CPU", "127.0.0.1:0", None)
    assert (config.device, config.listen.serving) == (DevicePreference.CPU, "127.0.0.1:0")
    assert config.listen.control == "0.0.0.0:8001"
    with pytest.raises(ConfigError, match=r"listen\.serving"):
        with_overrides(config, None, "nowhere", None)


def test_the_environment_is_read_once() -> None:
    settings = Settings.from_environment(
        {"POD_NAME": "p", "POD_NAMESPACE": "n", "POD_UID": "u", "NODE_NAME": "node"}
    )
    assert (settings.pod.name, settings.pod.namespace, settings.pod.uid) == ("p", "n", "u")
    assert settings.state_directory == Path("/var/lib/vram-agent")
    moved = Settings.from_environment({"VRAM_AGENT_STATE_DIR": "/elsewhere"})
    assert moved.state_directory == Path("/elsewhere")


def test_the_environment_names_the_api_keys_where_the_config_does_not() -> None:
    settings = Settings.from_environment({"VRAM_AGENT_API_KEY_FILE": "/keys"})
    assert settings.complete(parse_config({})).serving.api_key_file == "/keys"
    own = parse_config({"serving": {"apiKeyFile": "/own"}})
    assert settings.complete(own) == own
    assert Settings.from_environment({}).complete(parse_config({})) == parse_config({})
