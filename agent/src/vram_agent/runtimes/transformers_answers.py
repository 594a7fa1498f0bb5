"""What pipelines of transformers take and give, as the protocol has it.

Why it exists: pipelines speak lists of dicts. Called by runtimes/transformers.py in the GPU
process; it knows neither pipelines nor devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vram_agent.backend import Tensor, TensorSpec
from vram_agent.errors import BadInputError
from vram_agent.runtimes.arrays import SAMPLE_RATE_HERTZ, Array, as_array

TEXT_INPUT = TensorSpec(name="text", datatype="BYTES", shape=(-1,))


def read_texts(model: str, tensors: Sequence[Tensor]) -> list[str]:
    """Return the texts of the one input. Raises BadInputError."""
    for tensor in tensors:
        if tensor.name != TEXT_INPUT.name:
            raise BadInputError(
                f"model {model}: input {tensor.name} is unknown; it takes text BYTES [-1]",
                param=tensor.name,
            )
        if tensor.datatype != "BYTES" or len(tensor.shape) != 1 or not tensor.shape[0]:
            raise BadInputError(
                f"model {model}: input text must be BYTES [n] with at least one text, not "
                f"{tensor.datatype} {list(tensor.shape)}",
                param=tensor.name,
            )
        try:
            return [item.decode("utf-8") for item in as_array(tensor)]
        except UnicodeDecodeError as error:
            raise BadInputError(f"input text is no UTF-8: {error}", param=tensor.name) from None
    raise BadInputError(
        f"model {model}: input text is missing; it takes text BYTES [-1]", param="text"
    )


def as_objects(items: Sequence[str]) -> Array:
    """Return texts as an array of objects, for a BYTES tensor of shape [n]."""
    array: Array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def as_json(value: Any) -> str:
    """Return a pipeline's answer as JSON; numpy's numbers are numbers."""
    return json.dumps(value, ensure_ascii=False, default=lambda number: number.item())


def read_transcript(
    found: Mapping[str, Any], parameters: Mapping[str, Any], samples: int, *, words: bool
) -> dict[str, Any]:
    """Return the values of a transcription; words alone become one segment that has them."""
    duration = samples / SAMPLE_RATE_HERTZ
    chunks = [
        {
            "text": chunk["text"],
            "start": float(chunk["timestamp"][0] or 0.0),
            # Where the audio ends in the middle of a chunk, its end is not known.
            "end": float(duration if chunk["timestamp"][1] is None else chunk["timestamp"][1]),
        }
        for chunk in found.get("chunks", ())
    ]
    text = found["text"].strip()
    languages = [chunk.get("language") for chunk in found.get("chunks", ())]
    language = parameters.get("language") or next(filter(None, languages), "")
    if words and chunks:
        spoken = [
            {"word": chunk["text"], "start": chunk["start"], "end": chunk["end"]}
            for chunk in chunks
        ]
        chunks = [
            {"text": text, "start": chunks[0]["start"], "end": chunks[-1]["end"], "words": spoken}
        ]
    segments = [{"id": index, **chunk} for index, chunk in enumerate(chunks)]
    return {"text": text, "language": language, "duration": duration, "segments": segments}
