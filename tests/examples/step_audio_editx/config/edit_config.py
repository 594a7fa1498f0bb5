"""Some of upstream's kinds of edits."""

from __future__ import annotations


def get_supported_edit_types() -> dict[str, list[str]]:
    return {
        "clone": [],
        "emotion": ["happy", "sad", "remove"],
        "style": ["whisper", "remove"],
        "vad": [],
        "denoise": [],
        "paralinguistic": [],
        "speed": ["faster", "slower"],
    }
