"""A transcription in the five formats of the OpenAI API, and as its stream of events; pure.

Why it exists: runtimes give text and timed segments, clients want JSON or subtitles. Called by
``openai.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any


class Format(StrEnum):
    """Values of the form field ``response_format``."""

    JSON = "json"
    TEXT = "text"
    SRT = "srt"
    VERBOSE_JSON = "verbose_json"
    VTT = "vtt"


class Granularity(StrEnum):
    """Values of the form field ``timestamp_granularities[]``."""

    WORD = "word"
    SEGMENT = "segment"


def has_words(values: Mapping[str, Any]) -> bool:
    """Whether every segment gives the times of its words; silence has none to give."""
    segments = values.get("segments", ())
    return all("words" in segment for segment in segments) and bool(segments or not _text(values))


def to_text(values: Mapping[str, Any]) -> str:
    """Return the plain text, with a line end as the OpenAI API gives it."""
    return _text(values) + "\n"


def to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the short JSON object."""
    return {"text": _text(values)}


def to_verbose_json(
    values: Mapping[str, Any], task: str, granularities: Sequence[Granularity]
) -> dict[str, Any]:
    """Return the long JSON object; ``values`` have a duration. No granularity means segments."""
    body = {
        "task": task,
        "language": values.get("language"),
        "duration": values["duration"],
        "text": _text(values),
    }
    if Granularity.WORD in granularities:
        body["words"] = [
            {name: word[name] for name in ("word", "start", "end")}
            for segment in values.get("segments", ())
            for word in segment["words"]
        ]
    if Granularity.SEGMENT in granularities or not granularities:
        body["segments"] = [
            {name: value for name, value in segment.items() if name != "words"}
            for segment in values.get("segments", ())
        ]
    return body


def to_srt(values: Mapping[str, Any]) -> str:
    """Return SubRip subtitles."""
    cues = []
    for number, segment in enumerate(_segments(values), start=1):
        start, end = _stamp(segment["start"], ","), _stamp(segment["end"], ",")
        cues.append(f"{number}\n{start} --> {end}\n{_line(segment['text'])}\n\n")
    return "".join(cues)


def to_vtt(values: Mapping[str, Any]) -> str:
    """Return WebVTT subtitles; ``&`` and ``<`` are markup there."""
    cues = ["WEBVTT\n\n"]
    for segment in _segments(values):
        start, end = _stamp(segment["start"], "."), _stamp(segment["end"], ".")
        text = _line(segment["text"]).replace("&", "&amp;").replace("<", "&lt;")
        cues.append(f"{start} --> {end}\n{text}\n\n")
    return "".join(cues)


def to_events(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stream's events: a delta for each segment, then the whole.

    The deltas put together are the whole text, as clients expect: where the segments' texts are
    not, there is one delta.
    """
    text = _text(values)
    parts = [str(segment.get("text", "")) for segment in values.get("segments", ())]
    whole = "".join(parts)
    if whole.strip() != text:
        parts = [whole := text]
    deltas = []
    end = len(whole.lstrip()) - len(whole)  # blanks before the text belong to no delta
    for part in parts:
        begin, end = end, end + len(part)
        delta = text[max(begin, 0) : max(end, 0)]
        if delta:
            deltas.append({"type": "transcript.text.delta", "delta": delta})
    return [*deltas, {"type": "transcript.text.done", "text": text}]


class Deltas:
    """The deltas of a text that comes in parts, and at last whole.

    Put together they are the whole text without the blanks around it, as clients expect.
    """

    def __init__(self) -> None:
        self._sent = ""
        self._held = ""

    @property
    def has_sent(self) -> bool:
        """Whether there was one."""
        return bool(self._sent)

    def of_part(self, text: str) -> list[dict[str, Any]]:
        """Return the events of a part; blanks at its end wait for what follows."""
        text = self._held + text
        if not self._sent:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        return self._delta(shown)

    def of_result(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the last events; a text that does not go on from the deltas is in one alone."""
        if not self._sent:
            return to_events(values)
        text = _text(values)
        rest = text[len(self._sent) :] if text.startswith(self._sent) else ""
        return [*self._delta(rest), {"type": "transcript.text.done", "text": text}]

    def _delta(self, text: str) -> list[dict[str, Any]]:
        self._sent += text
        return [{"type": "transcript.text.delta", "delta": text}] if text else []


def _segments(values: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the timed segments; a model that gives text only has one, of the whole length."""
    segments = values.get("segments")
    if segments:
        return list(segments)
    text = _text(values)
    return [{"start": 0.0, "end": values["duration"], "text": text}] if text else []


def _text(values: Mapping[str, Any]) -> str:
    return str(values.get("text", "")).strip()


def _line(text: str) -> str:
    """A cue ends at a blank line, and an arrow would be read as a time."""
    return " ".join(text.split()).replace("-->", "->")


def _stamp(seconds: float, separator: str) -> str:
    milliseconds = round(max(seconds, 0.0) * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds_part, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{seconds_part:02}{separator}{milliseconds:03}"
