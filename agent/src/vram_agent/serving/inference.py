"""An infer request and its answer, as JSON and with binary tensors; pure.

Why it exists: the binary-tensor extension puts raw bytes behind the JSON, and each length that a
client announces must hold before a byte is believed. Called by ``oip.py``, off the event loop
where a body is large. It knows no HTTP and no model.

The extension: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from vram_agent.backend import Task, TaskKind, TaskResult, Tensor
from vram_agent.errors import BadInputError
from vram_agent.serving.requests import decode_json
from vram_agent.serving.tensors import from_binary, to_binary, to_list, to_tensor

LENGTH_HEADER = "Inference-Header-Content-Length"
MODEL_VERSION = "1"

_SIZE = "binary_data_size"
_AS_BINARY = "binary_data"
_ALL_AS_BINARY = "binary_data_output"
_SHARED_MEMORY = "shared_memory_region"
_CLASSIFICATION = "classification"


class InferInput(msgspec.Struct, kw_only=True):
    """One tensor of a request."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class InferOutput(msgspec.Struct, kw_only=True):
    """One tensor that the client wants back."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, kw_only=True):
    """The JSON of ``POST /v2/models/{m}/infer``."""

    inputs: list[InferInput]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[InferOutput] = []

    @property
    def wants_binary(self) -> bool:
        """Whether outputs come as binary tensors where their own parameters do not say."""
        return bool(self.parameters.get(_ALL_AS_BINARY, False))


@dataclass(frozen=True, slots=True, kw_only=True)
class InferAnswer:
    """The JSON of an answer, and the binary tensors behind it; None: an answer of JSON alone."""

    json: bytes
    tensors: tuple[memoryview, ...] | None

    @property
    def number_of_bytes(self) -> int:
        """Length of the whole body."""
        return len(self.json) + sum(tensor.nbytes for tensor in self.tensors or ())


def parse_header_length(text: str | None) -> int | None:
    """Return how many bytes of JSON the header announces; None without it: all is JSON.

    Raises BadInputError.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text)):
        raise BadInputError(
            f"{LENGTH_HEADER}: {text[:40]!r} is not how many bytes of JSON the body begins with",
            param=LENGTH_HEADER,
        )
    return int(text)


def parse_infer(body: memoryview, header_length: int | None) -> tuple[InferRequest, Task]:
    """Return the request and its task, whose binary tensors are views of ``body``.

    Raises BadInputError: for what is no request, for lengths that do not hold and for what no
    extension of this agent covers.
    """
    length = body.nbytes if header_length is None else header_length
    if length > body.nbytes:
        raise BadInputError(
            f"{LENGTH_HEADER} is {length}, the body has {body.nbytes} bytes", param=LENGTH_HEADER
        )
    question = decode_json(body[:length], InferRequest)
    _ensure_covered(question)
    binary = _BinaryPart(body[length:], has_header=header_length is not None)
    tensors = tuple(_read_input(tensor, binary) for tensor in question.inputs)
    binary.ensure_consumed()
    parameters = {k: v for k, v in question.parameters.items() if k != _ALL_AS_BINARY}
    return question, Task(kind=TaskKind.INFER, parameters=parameters, tensors=tensors)


def ensure_known_outputs(question: InferRequest, known: Sequence[str]) -> None:
    """Raise BadInputError for an output that the model does not have; nothing known is no fault."""
    for output in question.outputs:
        if known and output.name not in known:
            raise BadInputError(
                f"the model has no output {output.name[:64]!r}; it has {', '.join(known)}",
                param="outputs",
            )


def render_infer(model: str, question: InferRequest, result: TaskResult) -> InferAnswer:
    """Return the answer with the outputs that were asked for, in that order; none = all.

    Raises BadInputError for outputs that the model did not give or JSON cannot carry.
    """
    tensors = {tensor.name: tensor for tensor in result.tensors}
    ensure_known_outputs(question, list(tensors) or ["none"])
    wanted = question.outputs or [InferOutput(name=name) for name in tensors]
    parts: list[memoryview] = []
    outputs = []
    for output in wanted:
        is_binary = output.parameters.get(_AS_BINARY, question.wants_binary)
        outputs.append(_write_output(tensors[output.name], parts if is_binary else None))
    body: dict[str, Any] = {"model_name": model, "model_version": MODEL_VERSION}
    if question.id is not None:
        body["id"] = question.id
    body["outputs"] = outputs
    is_mixed = any("data" not in output for output in outputs)
    return InferAnswer(json=msgspec.json.encode(body), tensors=tuple(parts) if is_mixed else None)


class _BinaryPart:
    """The bytes behind the JSON, given out from front to back."""

    def __init__(self, data: memoryview, *, has_header: bool) -> None:
        self._data = data
        self._offset = 0
        self._has_header = has_header

    def take(self, name: str, size: Any) -> memoryview:
        """Return the next ``size`` bytes. Raises BadInputError where there are not as many."""
        if type(size) is not int or size < 0:
            raise BadInputError(
                f"input {name}: {_SIZE} {str(size)[:40]!r} is not a number of bytes", param=name
            )
        if not self._has_header:
            raise BadInputError(
                f"input {name}: {_SIZE} needs the header {LENGTH_HEADER}", param=LENGTH_HEADER
            )
        left = self._data.nbytes - self._offset
        if size > left:
            raise BadInputError(
                f"input {name}: {_SIZE} is {size}, the body has {left} more bytes", param=name
            )
        self._offset += size
        return self._data[self._offset - size : self._offset]

    def ensure_consumed(self) -> None:
        """Raise BadInputError for bytes that belong to no input."""
        left = self._data.nbytes - self._offset
        if left:
            raise BadInputError(
                f"the body has {left} bytes more than {LENGTH_HEADER} and the inputs' {_SIZE} say",
                param=LENGTH_HEADER,
            )


def _read_input(tensor: InferInput, binary: _BinaryPart) -> Tensor:
    size = tensor.parameters.get(_SIZE)
    if size is None and tensor.data is None:
        raise BadInputError(
            f"input {tensor.name} has no data: give data, or {_SIZE} and the bytes behind the JSON",
            param=tensor.name,
        )
    if size is None:
        return to_tensor(tensor.name, tensor.datatype, tensor.shape, tensor.data or [])
    if tensor.data is not None:
        raise BadInputError(f"input {tensor.name} has both data and {_SIZE}", param=tensor.name)
    data = binary.take(tensor.name, size)
    return from_binary(tensor.name, tensor.datatype, tensor.shape, data)


def _write_output(tensor: Tensor, parts: list[memoryview] | None) -> dict[str, Any]:
    """Return the JSON of an output; its bytes go to ``parts``, or into the JSON without those."""
    head = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if parts is None:
        return {**head, "data": to_list(tensor)}
    data = to_binary(tensor)
    parts.append(data)
    return {**head, "parameters": {_SIZE: data.nbytes}}


def _ensure_covered(question: InferRequest) -> None:
    names = [tensor.name for tensor in question.inputs]
    if len(set(names)) != len(names):
        raise BadInputError("an input is given twice", param="inputs")
    outputs = [output.name for output in question.outputs]
    if len(set(outputs)) != len(outputs):
        raise BadInputError("an output is asked for twice", param="outputs")
    _ensure_flag("parameters", question.parameters, _ALL_AS_BINARY)
    for output in question.outputs:
        _ensure_flag(f"output {output.name}", output.parameters, _AS_BINARY)
        if _CLASSIFICATION in output.parameters:
            raise BadInputError(
                f"output {output.name}: {_CLASSIFICATION} is not offered; ask for the tensor",
                param=output.name,
            )
    named: list[InferInput | InferOutput] = [*question.inputs, *question.outputs]
    for tensor in named:
        if _SHARED_MEMORY in tensor.parameters:
            raise BadInputError(
                f"{tensor.name}: shared memory is not offered; tensors travel in the body",
                param=tensor.name,
            )


def _ensure_flag(where: str, parameters: dict[str, Any], name: str) -> None:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise BadInputError(f"{where}: {name} {str(value)[:40]!r} is not true or false", param=name)
