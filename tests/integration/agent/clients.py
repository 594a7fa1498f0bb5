"""The tasks of the conformance suite as HTTP requests, and the answers as its results."""

from __future__ import annotations

import json
import math
import struct
import wave
from io import BytesIO
from typing import Any

import aiohttp
import numpy as np
from vram_agent.backend import Task, TaskKind, TaskResult, Tensor

ELEMENTS = {"FP32": "<f4", "FP64": "<f8", "INT32": "<i4", "INT64": "<i8"}
SPOKEN = {
    TaskKind.TRANSCRIBE: "/v1/audio/transcriptions",
    TaskKind.TRANSLATE: "/v1/audio/translations",
}


class Question:
    """One task of one model as a request; its body is made once and may be sent many times."""

    def __init__(self, model: str, task: Task) -> None:
        self.kind = task.kind
        self._fields: dict[str, str] = {}
        if task.kind in SPOKEN:
            self.path = SPOKEN[task.kind]
            self._fields = {
                "model": model,
                "response_format": "verbose_json",
                **{name: str(value) for name, value in task.parameters.items()},
            }
            self._body = as_wav(task.tensors[0])
            return
        if task.kind is not TaskKind.INFER:
            raise ValueError(f"a {task.kind.value} has no request here yet; add it to Question")
        self.path = f"/v2/models/{model}/infer"
        inputs = [as_json(tensor) for tensor in task.tensors]
        self._body = json.dumps({"inputs": inputs, "parameters": dict(task.parameters)}).encode()

    @property
    def is_json(self) -> bool:
        return not self._fields

    @property
    def body(self) -> Any:
        """What aiohttp sends."""
        if not self._fields:
            return self._body
        form = aiohttp.FormData()
        for name, value in self._fields.items():
            form.add_field(name, value)
        form.add_field("file", self._body, filename="clip.wav", content_type="audio/wav")
        return form

    def read(self, answer: Any) -> TaskResult:
        """The result that an answer of status 200 stands for."""
        if self._fields:
            return TaskResult(values=answer)
        return TaskResult(tensors=[from_json(output) for output in answer["outputs"]])


def as_wav(audio: Tensor) -> bytes:
    """16-bit PCM; exact for what was 16-bit before."""
    samples = np.frombuffer(audio.data, "<f4")
    found = BytesIO()
    with wave.open(found, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.round(samples * 32768).astype("<i2").tobytes())
    return found.getvalue()


def as_json(tensor: Tensor) -> dict[str, Any]:
    data: list[Any] = []
    if tensor.datatype == "BYTES":
        rest = bytes(tensor.data)
        while rest:
            (length,) = struct.unpack_from("<I", rest)
            data.append(rest[4 : 4 + length].decode())
            rest = rest[4 + length :]
    else:
        data = np.frombuffer(tensor.data, ELEMENTS[tensor.datatype]).tolist()
    return {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
        "data": data,
    }


def from_json(output: dict[str, Any]) -> Tensor:
    data = output["data"]
    if output["datatype"] == "BYTES":
        packed = b"".join(
            struct.pack("<I", len(raw)) + raw for raw in (text.encode() for text in data)
        )
    else:
        packed = np.array(data, ELEMENTS[output["datatype"]]).tobytes()
    shape = tuple(output["shape"])
    assert output["datatype"] == "BYTES" or len(data) == math.prod(shape)
    return Tensor(name=output["name"], datatype=output["datatype"], shape=shape, data=packed)
