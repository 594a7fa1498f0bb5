"""What only Whisper has: its parameters, words with times, and hooks that must not stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vram_agent.backend import TaskKind
from vram_agent.errors import BadInputError
from vram_agent.processes.group import ProcessGroup

from tests.conformance.cases import whisper_case


async def test_parameters_of_a_transcription(group: ProcessGroup) -> None:
    case = whisper_case()
    await group.load(case.spec)
    await group.restore("m")

    timed = await group.run(
        "m", replace(case.task, parameters={"language": "English", "word_timestamps": True})
    )
    words = [word for segment in timed.values["segments"] for word in segment["words"]]
    assert "".join(word["word"] for word in words).strip() == timed.values["text"]
    starts = [word["start"] for word in words]
    assert starts == sorted(starts)
    assert 0 <= starts[0] <= words[-1]["end"] <= 30

    beams = await group.run(
        "m", replace(case.task, parameters={"language": "en", "beam_size": 2, "temperature": [0]})
    )
    case.check(beams)
    translated = await group.run("m", replace(case.task, kind=TaskKind.TRANSLATE))
    assert translated.values["language"] == "en"
    detected = await group.run("m", replace(case.task, parameters={}))
    assert detected.values["language"]

    for parameters, name in (
        ({"language": "klingon"}, "language"),
        ({"temperature": "hot"}, "temperature"),
        ({"langage": "en"}, "langage"),
    ):
        with pytest.raises(BadInputError) as caught:
            await group.run("m", replace(case.task, parameters=parameters))
        assert caught.value.param == name
    # After all of these the model still answers as at first.
    case.check(await group.run("m", case.task))
