"""Whisper's own: what a temperature means."""

from __future__ import annotations

from typing import Any

import pytest
import whisper
from vram_agent.backend import Task, TaskKind, Tensor
from vram_agent.protocol import Runtime

from tests.models import WHISPER
from tests.unit.agent.runtimes.hosting import hosted

SILENCE = memoryview(bytearray(4 * 1600))


@pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning")  # whisper's own
@pytest.mark.filterwarnings("ignore:.*tiktoken:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("parameters", "tried"),
    [
        pytest.param({}, None, id="absent: openai-whisper's own list"),
        pytest.param({"temperature": 0.0}, None, id="0: that list too, as in OpenAI's API"),
        pytest.param({"temperature": 0}, None, id="0 without a point"),
        pytest.param({"temperature": 0.4}, 0.4, id="another one: that alone"),
        pytest.param({"temperature": [0]}, (0.0,), id="a list: as it is"),
    ],
)
def test_temperature_0_falls_back_where_a_window_fails(
    parameters: dict[str, Any], tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    transcribe = whisper.transcribe

    def watched(model: Any, audio: Any, **options: Any) -> Any:
        asked.append(options.get("temperature"))
        return transcribe(model, audio, **options)

    monkeypatch.setattr(whisper, "transcribe", watched)
    task = Task(
        kind=TaskKind.TRANSCRIBE,
        parameters={"language": "en", "max_tokens": 2, **parameters},
        tensors=[Tensor(name="audio", datatype="FP32", shape=(1600,), data=SILENCE)],
    )
    with hosted(Runtime.WHISPER, str(WHISPER)) as model:
        model.run(task)
    assert asked == [tried]
