"""Reading an ONNX file's signature without ONNX Runtime.

Why it exists: a template must know a model's inputs and outputs, and that the file is whole, and
may not make a session: its threads would not survive the fork. Reads the few fields of the
protobuf that say so (github.com/onnx/onnx, onnx/onnx.proto). Called by runtimes/onnx.py. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vram_agent.backend import TensorSpec

_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_TYPE_ELEMENT, _TENSOR_TYPE_SHAPE = 1, 2
_SHAPE_DIMENSION, _DIMENSION_VALUE = 1, 1
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_NODE_ATTRIBUTE, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 5, 5, 6
_DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class BrokenOnnxError(Exception):
    """The bytes are no whole ONNX model, or one with inputs or outputs that are no tensors."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What an ONNX file says of itself.

    ``any_rank``: names whose shape it leaves open. ``metadata``: what its maker wrote into it.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    any_rank: frozenset[str]
    external_files: tuple[str, ...]
    metadata: Mapping[str, str]


@dataclass(slots=True)
class _Graph:
    inputs: list[memoryview] = field(default_factory=list)
    outputs: list[memoryview] = field(default_factory=list)
    initializers: set[str] = field(default_factory=set)
    external_files: dict[str, None] = field(default_factory=dict)


def find_beside(model: Path, name: str) -> Path | None:
    """Return the file that a model names for its weights; None where it is none beside the model.

    The name comes from the model's file, so it may not lead out of the model's folder. Symbolic
    links are whoever's who put the files there: a hub's cache is made of them.
    """
    path = model.parent / name
    is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return path if is_inside and path.is_file() else None


def read_signature(model: memoryview) -> Signature:
    """Return the signature of an ONNX model. Raises BrokenOnnxError."""
    graphs: list[int | memoryview] = []
    metadata: dict[str, str] = {}
    for number, value in _fields(model):
        if number == _MODEL_GRAPH:
            graphs.append(value)
        elif number == _MODEL_METADATA and isinstance(value, memoryview):
            entry = {key: _text(part) for key, part in _fields(value) if _is_bytes(part)}
            metadata[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise BrokenOnnxError("it holds no graph")
    graph = _Graph()
    _read_graph(graphs[0], graph, is_main=True)
    open_ranks: set[str] = set()
    inputs = [_read_value(value, open_ranks) for value in graph.inputs]
    return Signature(
        # Files of the oldest format list their weights as inputs too.
        inputs=tuple(spec for spec in inputs if spec.name not in graph.initializers),
        outputs=tuple(_read_value(value, open_ranks) for value in graph.outputs),
        any_rank=frozenset(open_ranks),
        external_files=tuple(graph.external_files),
        metadata=metadata,
    )


def _read_graph(data: memoryview, graph: _Graph, *, is_main: bool) -> None:
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == _GRAPH_INITIALIZER:
            name = _read_tensor(value, graph)
            if is_main:
                graph.initializers.add(name)
        elif number == _GRAPH_NODE:
            _read_node(value, graph)
        elif number == _GRAPH_INPUT and is_main:
            graph.inputs.append(value)
        elif number == _GRAPH_OUTPUT and is_main:
            graph.outputs.append(value)


def _read_node(node: memoryview, graph: _Graph) -> None:
    for number, attribute in _fields(node):
        if number != _NODE_ATTRIBUTE or not isinstance(attribute, memoryview):
            continue
        for inner, value in _fields(attribute):
            if inner == _ATTRIBUTE_TENSOR and isinstance(value, memoryview):
                _read_tensor(value, graph)
            elif inner == _ATTRIBUTE_GRAPH and isinstance(value, memoryview):
                _read_graph(value, graph, is_main=False)


def _read_tensor(tensor: memoryview, graph: _Graph) -> str:
    name = ""
    for number, value in _fields(tensor):
        if not isinstance(value, memoryview):
            continue
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_EXTERNAL:
            entry = {key: _text(part) for key, part in _fields(value) if _is_bytes(part)}
            if entry.get(_ENTRY_KEY) == "location":
                graph.external_files[entry.get(_ENTRY_VALUE, "")] = None
    return name


def _read_value(value: memoryview, any_rank: set[str]) -> TensorSpec:
    name, datatype, shape = "", "", None
    for number, part in _fields(value):
        if number == _VALUE_NAME and isinstance(part, memoryview):
            name = _text(part)
        elif number == _VALUE_TYPE and isinstance(part, memoryview):
            for kind, tensor in _fields(part):
                if kind == _TYPE_TENSOR and isinstance(tensor, memoryview):
                    datatype, shape = _read_tensor_type(tensor)
    if not datatype:
        raise BrokenOnnxError(f"{name} is no tensor of a type that the protocol can carry")
    if shape is None:
        any_rank.add(name)
    return TensorSpec(name=name, datatype=datatype, shape=shape or ())


def _read_tensor_type(tensor: memoryview) -> tuple[str, tuple[int, ...] | None]:
    datatype, shape = "", None
    for number, value in _fields(tensor):
        if number == _TENSOR_TYPE_ELEMENT and isinstance(value, int):
            datatype = _DATATYPES.get(value, "")
        elif number == _TENSOR_TYPE_SHAPE and isinstance(value, memoryview):
            shape = tuple(
                _read_dimension(dimension)
                for inner, dimension in _fields(value)
                if inner == _SHAPE_DIMENSION and isinstance(dimension, memoryview)
            )
    return datatype, shape


def _read_dimension(dimension: memoryview) -> int:
    for number, value in _fields(dimension):
        if number == _DIMENSION_VALUE and isinstance(value, int):
            return value
    return -1


def _is_bytes(value: int | memoryview) -> bool:
    return isinstance(value, memoryview)


def _text(value: int | memoryview) -> str:
    return bytes(value).decode("utf-8", "replace") if isinstance(value, memoryview) else ""


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of each field of a protobuf message. Raises BrokenOnnxError."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if kind == _LENGTH:
            length, at = _read_varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise BrokenOnnxError("it is no protobuf message")
        if at + length > len(data):
            raise BrokenOnnxError(f"it ends {at + length - len(data)} bytes too early")
        yield number, data[at : at + length]
        at += length


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise BrokenOnnxError("it ends in the middle of a number")
