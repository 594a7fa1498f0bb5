"""What FunASR answers, as a transcription has it.

Why it exists: each of its models names times, tokens and languages in its own way. Called by
runtimes/funasr.py in the GPU process. It imports neither FunASR nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vram_agent.runtimes.arrays import SAMPLE_RATE_HERTZ

_TAG = re.compile(r"<\|([^|]*)\|>")
_LANGUAGE = re.compile(r"^[a-z]{2,3}$")
_MILLISECONDS = 1000.0


def read_transcript(
    found: Sequence[Mapping[str, Any]],
    samples: int,
    *,
    clean: Callable[[str], str],
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the values of a transcription of ``samples`` samples.

    ``clean`` takes SenseVoice's tags out of a text. Segments are sentences where the model gives
    them, else one from the first word's time to the last one's, else none.
    """
    answer: Mapping[str, Any] = found[0] if found else {}
    raw = str(answer.get("text", ""))
    tags = _TAG.findall(raw)
    text = (clean(raw) if tags else raw).strip()
    language = parameters.get("language") or next(filter(_LANGUAGE.match, tags), "")
    words = _read_words(answer) if parameters.get("word_timestamps") else []
    segments = _read_sentences(answer, clean) or _read_whole(answer, text)
    for index, segment in enumerate(segments):
        segment["id"] = index
        if words:
            segment["words"] = [
                word for word in words if segment["start"] <= word["start"] < segment["end"]
            ]
    return {
        "text": text,
        "language": language,
        "duration": samples / SAMPLE_RATE_HERTZ,
        "segments": segments,
    }


def _read_sentences(answer: Mapping[str, Any], clean: Callable[[str], str]) -> list[dict[str, Any]]:
    sentences = []
    for one in answer.get("sentence_info") or ():
        text = str(one.get("text") or one.get("sentence") or "")
        segment = {
            "start": float(one["start"]) / _MILLISECONDS,
            "end": float(one["end"]) / _MILLISECONDS,
            "text": clean(text) if _TAG.search(text) else text,
        }
        if one.get("spk") is not None:
            segment["speaker"] = str(one["spk"])
        sentences.append(segment)
    return sentences


def _read_whole(answer: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    times = _read_times(answer)
    if not times or not text:
        return []
    return [{"start": times[0][0], "end": times[-1][1], "text": text}]


def _read_words(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    times = _read_times(answer)
    words = answer.get("words") or str(answer.get("raw_text") or answer.get("text") or "").split()
    if len(words) != len(times):
        # Its times are of units that its text does not show: no word could be told its own.
        return []
    return [
        {"word": str(word), "start": start, "end": end}
        for word, (start, end) in zip(words, times, strict=True)
    ]


def _read_times(answer: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [
        (float(time[0]) / _MILLISECONDS, float(time[1]) / _MILLISECONDS)
        for time in answer.get("timestamp") or ()
        if isinstance(time, (list, tuple)) and len(time) >= 2
    ]
