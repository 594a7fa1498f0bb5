"""Tensors between the JSON of the Open Inference Protocol and the bytes that runtimes take; pure.

Why it exists: the supervisor has no numpy, and JSON lists must be checked against datatype and
shape before a model sees them. Called by ``oip.py``.

JSON knows no NaN and no infinities: in an output they become null (``answers.json_answer``), in an
input null is refused. The binary extension is what carries them exactly.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

from vram_agent.backend import Tensor
from vram_agent.errors import BadInputError

BYTES = "BYTES"
_BOOL = "BOOL"
_TYPE_CODES = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
_BINARY_ONLY = ("FP16", "BF16")
_DATATYPES = (_BOOL, *_TYPE_CODES, BYTES)
_MAX_DIMENSIONS = 32


def to_tensor(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]) -> Tensor:
    """Return the tensor that a JSON input describes; ``data`` is flat or nested as the shape.

    Raises BadInputError that names the input and what is wrong with it.
    """
    _ensure_json_datatype("input", name, datatype)
    if len(shape) > _MAX_DIMENSIONS or any(dimension < 0 for dimension in shape):
        raise BadInputError(
            f"input {name}: shape {list(shape)[:_MAX_DIMENSIONS]} is not "
            f"at most {_MAX_DIMENSIONS} dimensions of 0 or more",
            param=name,
        )
    flat = _flatten(name, shape, data)
    return Tensor(
        name=name, datatype=datatype, shape=tuple(shape), data=_pack(name, datatype, flat)
    )


def to_list(tensor: Tensor) -> list[Any]:
    """Return the elements in C order, as JSON carries them.

    Raises BadInputError where JSON cannot carry them, and ValueError where the tensor's bytes do
    not fit its shape, which is a fault of the runtime.
    """
    _ensure_json_datatype("output", tensor.name, tensor.datatype)
    if tensor.datatype == BYTES:
        elements: list[Any] = _unpack_bytes(tensor)
    elif tensor.datatype == _BOOL:
        elements = [byte != 0 for byte in bytes(tensor.data)]
    else:
        numbers: array[Any] = array(_TYPE_CODES[tensor.datatype])
        numbers.frombytes(tensor.data)
        elements = _little_endian(numbers).tolist()
    if len(elements) != math.prod(tensor.shape):
        raise ValueError(
            f"output {tensor.name} has {len(elements)} elements, its shape is {tensor.shape}"
        )
    return elements


def _ensure_json_datatype(role: str, name: str, datatype: str) -> None:
    if datatype in _DATATYPES:
        return
    if datatype in _BINARY_ONLY:
        raise BadInputError(
            f"{role} {name}: {datatype} has no JSON form; it needs the binary-tensor extension, "
            "which this agent does not have yet; use FP32",
            param=name,
        )
    raise BadInputError(
        f"{role} {name}: datatype {datatype[:20]!r} is not one of {', '.join(_DATATYPES)}",
        param=name,
    )


def _flatten(name: str, shape: Sequence[int], data: Sequence[Any]) -> Sequence[Any]:
    expected = math.prod(shape)
    if not any(type(element) is list for element in data[:1]):
        if len(data) != expected:
            raise BadInputError(
                f"input {name}: shape {list(shape)} needs {expected} elements, data has "
                f"{len(data)}",
                param=name,
            )
        return data
    level: Sequence[Any] = [data]
    for axis, dimension in enumerate(shape):
        if any(type(row) is not list or len(row) != dimension for row in level):
            raise BadInputError(
                f"input {name}: nested data does not have {dimension} elements everywhere in "
                f"dimension {axis} of shape {list(shape)}",
                param=name,
            )
        level = list(chain.from_iterable(level))
    return level


def _pack(name: str, datatype: str, flat: Sequence[Any]) -> bytes:
    allowed = _element_types(datatype)
    wrong = next((element for element in flat if type(element) not in allowed), None)
    if wrong is not None or not set(map(type, flat)) <= allowed:
        raise BadInputError(
            f"input {name}: {str(wrong)[:40]!r} is no element of datatype {datatype}", param=name
        )
    if datatype == BYTES:
        encoded = [element.encode() for element in flat]
        return b"".join(struct.pack("<I", len(element)) + element for element in encoded)
    if datatype == _BOOL:
        return bytes(flat)
    try:
        numbers: array[Any] = array(_TYPE_CODES[datatype], flat)
    except OverflowError:
        numbers = array("d", [math.inf])
    # array turns what is too large for FP32 into an infinity; JSON itself carries none
    if not math.isfinite(sum(numbers)):
        raise BadInputError(
            f"input {name}: an element is out of the range of {datatype}", param=name
        )
    return _little_endian(numbers).tobytes()


def _element_types(datatype: str) -> set[type]:
    """JSON's booleans are numbers to Python and to no client."""
    if datatype == BYTES:
        return {str}
    if datatype == _BOOL:
        return {bool}
    return {int, float} if datatype.startswith("FP") else {int}


def _unpack_bytes(tensor: Tensor) -> list[str]:
    data, offset, elements = bytes(tensor.data), 0, []
    while offset < len(data):
        (length,) = struct.unpack_from("<I", data, offset)
        element = data[offset + 4 : offset + 4 + length]
        offset += 4 + length
        try:
            elements.append(element.decode())
        except UnicodeDecodeError as error:
            raise BadInputError(
                f"output {tensor.name} holds bytes that are no UTF-8 text; they need the "
                "binary-tensor extension, which this agent does not have yet",
                param=tensor.name,
            ) from error
    return elements


def _little_endian(numbers: array[Any]) -> array[Any]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
