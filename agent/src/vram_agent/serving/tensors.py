"""Tensors between the Open Inference Protocol, JSON or binary, and the bytes runtimes take; pure.

Why it exists: the supervisor has no numpy, and what a client sends must agree with datatype and
shape before a model sees it. Called by ``inference.py``.

JSON knows no NaN and no infinities: in an output they become null (``answers.json_answer``), in an
input null is refused. The binary extension is what carries them exactly. BF16 is refused in both:
runtimes take NumPy arrays, and NumPy has no such type.
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
_HALF = "FP16"  # array has no code for it, struct has
_BRAIN = "BF16"
_DATATYPES = (_BOOL, *_TYPE_CODES, _HALF, BYTES)
_ITEM_BYTES = {_BOOL: 1, _HALF: 2} | {
    datatype: struct.calcsize(f"<{code}") for datatype, code in _TYPE_CODES.items()
}
_LENGTH_BYTES = 4
_MAX_DIMENSIONS = 32


def to_tensor(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]) -> Tensor:
    """Return the tensor that a JSON input describes; ``data`` is flat or nested as the shape.

    Raises BadInputError that names the input and what is wrong with it.
    """
    _ensure_datatype("input", name, datatype)
    _ensure_shape(name, shape)
    flat = _flatten(name, shape, data)
    return Tensor(
        name=name, datatype=datatype, shape=tuple(shape), data=_pack(name, datatype, flat)
    )


def from_binary(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> Tensor:
    """Return the tensor that a binary input is, without a copy.

    Raises BadInputError that names the input and what is wrong with it.
    """
    _ensure_datatype("input", name, datatype)
    _ensure_shape(name, shape)
    count = math.prod(shape)
    if datatype == BYTES:
        found = _count_elements(data)
        if found != count:
            raise BadInputError(
                f"input {name}: BYTES of shape {list(shape)} needs {count} elements, each with its "
                f"length in four bytes before it; the data "
                f"{'breaks off within one' if found is None else f'has {found}'}",
                param=name,
            )
    elif data.nbytes != count * _ITEM_BYTES[datatype]:
        raise BadInputError(
            f"input {name}: {datatype} of shape {list(shape)} takes "
            f"{count * _ITEM_BYTES[datatype]} bytes, binary_data_size is {data.nbytes}",
            param=name,
        )
    return Tensor(name=name, datatype=datatype, shape=tuple(shape), data=data)


def to_list(tensor: Tensor) -> list[Any]:
    """Return the elements in C order, as JSON carries them.

    Raises BadInputError where JSON cannot carry them, and ValueError where the tensor's bytes do
    not fit its shape, which is a fault of the runtime.
    """
    _ensure_datatype("output", tensor.name, tensor.datatype)
    data = to_binary(tensor)
    if tensor.datatype == BYTES:
        return _unpack_bytes(tensor)
    if tensor.datatype == _BOOL:
        return [byte != 0 for byte in data]
    if tensor.datatype == _HALF:
        return list(struct.unpack(f"<{data.nbytes // 2}e", data))
    numbers: array[Any] = array(_TYPE_CODES[tensor.datatype])
    numbers.frombytes(data)
    return _little_endian(numbers).tolist()


def to_binary(tensor: Tensor) -> memoryview:
    """Return the bytes of an output as the binary extension carries them, without a copy.

    Raises BadInputError for a datatype that the protocol does not have, and ValueError where the
    bytes do not fit the shape, which is a fault of the runtime.
    """
    _ensure_datatype("output", tensor.name, tensor.datatype)
    view = memoryview(tensor.data)
    data = view.cast("B") if view.nbytes else memoryview(b"")
    if tensor.datatype == BYTES:
        found = _count_elements(data)
    else:
        found, rest = divmod(data.nbytes, _ITEM_BYTES[tensor.datatype])
        found = None if rest else found
    if found != math.prod(tensor.shape):
        broken = f"{data.nbytes} bytes, which is no whole number of"
        raise ValueError(
            f"output {tensor.name} has {broken if found is None else found} elements, "
            f"its shape is {tensor.shape}"
        )
    return data


def _ensure_datatype(role: str, name: str, datatype: str) -> None:
    if datatype in _DATATYPES:
        return
    if datatype == _BRAIN:
        raise BadInputError(
            f"{role} {name}: BF16 is not carried, since runtimes take NumPy arrays and NumPy has "
            "no such type; use FP32 or FP16",
            param=name,
        )
    raise BadInputError(
        f"{role} {name}: datatype {datatype[:20]!r} is not one of {', '.join(_DATATYPES)}",
        param=name,
    )


def _ensure_shape(name: str, shape: Sequence[int]) -> None:
    if len(shape) > _MAX_DIMENSIONS or any(dimension < 0 for dimension in shape):
        raise BadInputError(
            f"input {name}: shape {list(shape)[:_MAX_DIMENSIONS]} is not "
            f"at most {_MAX_DIMENSIONS} dimensions of 0 or more",
            param=name,
        )


def _count_elements(data: memoryview) -> int | None:
    """Return how many BYTES elements there are; None where the data end within one."""
    count, offset, end = 0, 0, data.nbytes
    while offset + _LENGTH_BYTES <= end:
        offset += _LENGTH_BYTES + int.from_bytes(data[offset : offset + _LENGTH_BYTES], "little")
        count += 1
    return count if offset == end else None


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
        if datatype == _HALF:
            return struct.pack(f"<{len(flat)}e", *flat)
        numbers: array[Any] = array(_TYPE_CODES[datatype], flat)
    except (OverflowError, struct.error):
        numbers = array("d", [math.inf])
    # array turns what is too large for FP32 into an infinity; JSON itself carries none
    if not all(map(math.isfinite, numbers)):
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
                f"output {tensor.name} holds bytes that are no UTF-8 text; ask for it as binary: "
                "binary_data",
                param=tensor.name,
            ) from error
    return elements


def _little_endian(numbers: array[Any]) -> array[Any]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
