"""Tensors of the Open Inference Protocol as numpy arrays, and back.

Called by the runtimes in the GPU process. Data is little-endian and in C order; a BYTES element
is its length in four bytes and then its bytes.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from vram_agent.backend import Tensor
from vram_agent.errors import BadInputError

SAMPLE_RATE_HERTZ = 16_000
"""Of the tensor ``audio``."""
_DTYPES: dict[str, str] = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_DATATYPES = {np.dtype(code): name for name, code in _DTYPES.items()}

Array = np.ndarray[Any, np.dtype[Any]]


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as an array, without a copy but for BYTES (object array of bytes).

    Raises BadInputError when datatype, shape and data do not agree.
    """
    if any(dimension < 0 for dimension in tensor.shape):
        raise BadInputError(
            f"tensor {tensor.name}: shape {list(tensor.shape)} has a negative dimension",
            param=tensor.name,
        )
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        return _as_bytes_array(tensor, count)
    if tensor.datatype not in _DTYPES:
        raise BadInputError(
            f"tensor {tensor.name}: datatype {tensor.datatype} is unknown; use one of "
            f"{', '.join(_DTYPES)}, BYTES",
            param=tensor.name,
        )
    dtype = np.dtype(_DTYPES[tensor.datatype])
    nbytes = memoryview(tensor.data).nbytes
    if nbytes != count * dtype.itemsize:
        raise BadInputError(
            f"tensor {tensor.name}: {tensor.datatype} of shape {list(tensor.shape)} takes "
            f"{count * dtype.itemsize} bytes, not {nbytes}",
            param=tensor.name,
        )
    return np.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)


def _as_bytes_array(tensor: Tensor, count: int) -> Array:
    items: list[bytes] = []
    data = memoryview(tensor.data).cast("B") if tensor.data else memoryview(b"")
    at = 0
    while at < len(data) and len(items) <= count:
        length = struct.unpack_from("<I", data, at)[0] if at + 4 <= len(data) else len(data)
        if at + 4 + length > len(data):
            break
        items.append(bytes(data[at + 4 : at + 4 + length]))
        at += 4 + length
    if len(items) != count or at != len(data):
        raise BadInputError(
            f"tensor {tensor.name}: BYTES of shape {list(tensor.shape)} needs {count} elements, "
            f"each with its length in four bytes before it",
            param=tensor.name,
        )
    array: Array = np.empty(count, dtype=object)
    array[:] = items
    return array.reshape(tensor.shape)


def as_tensor(name: str, value: Any) -> Tensor:
    """Return an array as a tensor. Raises TypeError for a type that the protocol does not have."""
    array: Array = np.asarray(value)
    if array.dtype.kind in "OSU":
        items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.flat]
        data = b"".join(struct.pack("<I", len(item)) + item for item in items)
        return Tensor(name=name, datatype="BYTES", shape=array.shape, data=data)
    little = np.ascontiguousarray(array).reshape(array.shape)
    little = little.astype(little.dtype.newbyteorder("<"), copy=False)
    datatype = _DATATYPES.get(little.dtype)
    if datatype is None:
        raise TypeError(f"output {name} has dtype {array.dtype}, which no datatype stands for")
    # bytes, not a view: an array of a library may lie in memory that the library reuses.
    return Tensor(name=name, datatype=datatype, shape=array.shape, data=little.tobytes())


def read_audio(tensors: Any) -> Array:
    """Return the FP32 tensor ``audio`` of shape [samples]. Raises BadInputError."""
    for tensor in tensors:
        if tensor.name == "audio":
            array = as_array(tensor)
            if tensor.datatype != "FP32" or array.ndim != 1:
                raise BadInputError(
                    f"audio must be FP32 of shape [samples], 16 kHz mono, not {tensor.datatype} "
                    f"of shape {list(tensor.shape)}",
                    param="audio",
                )
            return array
    raise BadInputError(
        "the task has no tensor audio: FP32 of shape [samples], 16 kHz mono", param="audio"
    )
