from __future__ import annotations

from typing import Any

import pytest
from vram_agent.serving import transcripts
from vram_agent.serving.transcripts import Granularity


def segment(start: float, end: float, text: str, **more: Any) -> dict[str, Any]:
    return {"id": 0, "start": start, "end": end, "text": text, **more}


VALUES = {
    "text": " Hello world. Bye. ",
    "language": "en",
    "duration": 3725.5,
    "segments": [
        segment(0.0, 1.2345, " Hello world."),
        segment(3661.0005, 3725.5, " Bye."),
    ],
}


def test_text_ends_with_a_line_end() -> None:
    assert transcripts.to_text(VALUES) == "Hello world. Bye.\n"


def test_srt_numbers_cues_from_one_and_separates_milliseconds_by_a_comma() -> None:
    assert transcripts.to_srt(VALUES) == (
        "1\n00:00:00,000 --> 00:00:01,234\nHello world.\n\n"
        "2\n01:01:01,000 --> 01:02:05,500\nBye.\n\n"
    )


def test_vtt_has_a_header_and_separates_milliseconds_by_a_point() -> None:
    assert transcripts.to_vtt(VALUES) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.234\nHello world.\n\n"
        "01:01:01.000 --> 01:02:05.500\nBye.\n\n"
    )


def test_text_cannot_break_out_of_a_cue() -> None:
    values = {"text": "", "duration": 1.0, "segments": [segment(0, 1, "a\n\n2 --> 3 <b> & c")]}
    assert transcripts.to_srt(values) == "1\n00:00:00,000 --> 00:00:01,000\na 2 -> 3 <b> & c\n\n"
    assert transcripts.to_vtt(values).endswith("\na 2 -> 3 &lt;b> &amp; c\n\n")


@pytest.mark.parametrize(
    ("seconds", "stamp"),
    [
        pytest.param(59.9996, "00:01:00,000", id="rounds up into the next minute"),
        pytest.param(3599.9999, "01:00:00,000", id="rounds up into the next hour"),
        pytest.param(-0.2, "00:00:00,000", id="no time before the start"),
        pytest.param(360_000.0, "100:00:00,000", id="more than 99 hours"),
    ],
)
def test_a_time_stamp(seconds: float, stamp: str) -> None:
    values = {"text": "", "duration": 0.0, "segments": [segment(seconds, seconds, "x")]}
    assert transcripts.to_srt(values).splitlines()[1] == f"{stamp} --> {stamp}"


def test_a_model_without_segments_gives_one_cue_of_the_whole_length() -> None:
    values = {"text": "all of it", "duration": 2.0}
    assert transcripts.to_srt(values) == "1\n00:00:00,000 --> 00:00:02,000\nall of it\n\n"


def test_silence_gives_no_cue() -> None:
    assert transcripts.to_srt({"text": "", "duration": 2.0, "segments": []}) == ""
    assert transcripts.to_vtt({"text": "", "duration": 2.0}) == "WEBVTT\n\n"


def test_verbose_json_has_task_language_duration_text_and_segments() -> None:
    assert transcripts.to_verbose_json(VALUES, "transcribe", ()) == {
        "task": "transcribe",
        "language": "en",
        "duration": 3725.5,
        "text": "Hello world. Bye.",
        "segments": VALUES["segments"],
    }


def test_words_stand_beside_the_segments_and_not_in_them() -> None:
    word = {"word": "Hi", "start": 0.0, "end": 0.5, "probability": 0.9}
    values = {"text": "Hi", "duration": 1.0, "segments": [segment(0, 1, "Hi", words=[word])]}
    only_words = transcripts.to_verbose_json(values, "transcribe", (Granularity.WORD,))
    assert only_words["words"] == [{"word": "Hi", "start": 0.0, "end": 0.5}]
    assert "segments" not in only_words
    both = transcripts.to_verbose_json(
        values, "transcribe", (Granularity.WORD, Granularity.SEGMENT)
    )
    assert both["segments"] == [segment(0, 1, "Hi")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({"text": "a", "segments": [{"words": []}]}, True, id="words in the segment"),
        pytest.param({"text": "a", "segments": [{}]}, False, id="a segment without words"),
        pytest.param({"text": "a"}, False, id="text without segments"),
        pytest.param({"text": ""}, True, id="silence has no words to give"),
    ],
)
def test_whether_a_result_has_times_of_words(values: dict[str, Any], *, expected: bool) -> None:
    assert transcripts.has_words(values) is expected


@pytest.mark.parametrize(
    ("text", "segments", "deltas"),
    [
        pytest.param("", [], [], id="silence"),
        pytest.param("Hello.", [], ["Hello."], id="a model that gives text only"),
        pytest.param("a b", [" a", " b"], ["a", " b"], id="segments"),
        pytest.param("a b", [" ", " a", "", " b", "\n"], ["a", " b"], id="blanks around"),
        pytest.param("a, b.", ["a", "b"], ["a, b."], id="texts that are not the whole's"),
    ],
)
def test_deltas_put_together_are_the_text(
    text: str, segments: list[str], deltas: list[str]
) -> None:
    events = transcripts.to_events(
        {"text": text, "segments": [{"text": part} for part in segments]}
    )
    assert [event["delta"] for event in events[:-1]] == deltas
    assert events[-1] == {"type": "transcript.text.done", "text": text}


@pytest.mark.parametrize(
    ("parts", "text", "deltas"),
    [
        pytest.param([" a", " b "], "a b c", ["a", " b", " c"], id="the result goes on"),
        pytest.param(["a", "\n ", "b\n"], "a\n b", ["a", "\n b"], id="blanks wait for words"),
        pytest.param(["", " "], "a", ["a"], id="parts without words"),
        pytest.param(["a "], "a", ["a"], id="nothing is left"),
        pytest.param(["a b"], "A, b", ["a b"], id="the result has other words"),
    ],
)
def test_the_deltas_of_parts_are_the_text_without_the_blanks_around_it(
    parts: list[str], text: str, deltas: list[str]
) -> None:
    stream = transcripts.Deltas()
    events = [event for part in parts for event in stream.of_part(part)]
    events += stream.of_result({"text": text})
    assert [event["delta"] for event in events[:-1]] == deltas
    assert events[-1] == {"type": "transcript.text.done", "text": text}
