"""Options and parameters are checked, and faults name the nearest valid one."""

from __future__ import annotations

from typing import Any

import pytest
from vram_agent.backend import Task, TaskKind
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import ModelSpec, Runtime
from vram_agent.runtimes.base import COUNT, FLAG, NUMBER, TEXT, check_options, check_parameters

VALID = {"beamSize": COUNT, "fp16": FLAG, "language": TEXT, "threshold": NUMBER}


def spec(runtime: Runtime = Runtime.WHISPER, **options: Any) -> ModelSpec:
    return ModelSpec(name="m", runtime=runtime, source="x", options=options)


def test_valid_options_pass() -> None:
    check_options(spec(beamSize=5, fp16=True, language="en", threshold=0.5), VALID)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"beam_size": 5}, "did you mean beamSize", id="another case"),
        pytest.param({"lang": "en"}, "did you mean language", id="short"),
        pytest.param({"beamSize": 0}, "must be a count, not 0", id="zero beams"),
        pytest.param({"beamSize": 1.5}, "must be a count", id="half a beam"),
        pytest.param({"beamSize": True}, "must be a count", id="a truth is no number"),
        pytest.param({"fp16": 1}, "must be true or false", id="a number is no truth"),
    ],
)
def test_a_bad_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFailedError, match=words) as caught:
        check_options(spec(**options), VALID)
    assert caught.value.message.startswith("model m: option ")


def test_a_runtime_without_options_says_so() -> None:
    with pytest.raises(ModelFailedError, match="there is none"):
        check_options(spec(any=1), {})


def test_a_bad_parameter_is_the_callers_fault_and_named() -> None:
    task = Task(kind=TaskKind.TRANSCRIBE, parameters={"langage": "en"})
    with pytest.raises(BadInputError, match="did you mean language") as caught:
        check_parameters(task, VALID)
    assert caught.value.param == "langage"
