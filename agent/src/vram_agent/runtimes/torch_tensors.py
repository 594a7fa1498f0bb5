"""Tensors of the Open Inference Protocol as torch tensors, and back; outputs and their names.

Called by the runtimes Torch and Transformers in the GPU process. numpy has no bfloat16, torch does:
BF16 travels as its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from vram_agent.backend import Tensor, TensorSpec
from vram_agent.errors import BadInputError
from vram_agent.runtimes.arrays import as_array, as_tensor

DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Return a tensor of the protocol as one of torch, on the CPU and its own to write to.

    Raises BadInputError for texts, and when datatype, shape and data do not agree.
    """
    if tensor.datatype == "BYTES":
        raise BadInputError(
            f"tensor {tensor.name}: BYTES are no tensor to torch; use one of "
            f"{', '.join(DATATYPES.values())}",
            param=tensor.name,
        )
    if tensor.datatype == "BF16":
        bits = as_array(replace(tensor, datatype="INT16"))
        return torch.from_numpy(bits.copy()).view(torch.bfloat16)
    return torch.from_numpy(as_array(tensor).copy())


def from_torch(name: str, value: object) -> Tensor:
    """Return an output as a tensor of the protocol. Raises TypeError for what is none."""
    if isinstance(value, (bool, int, float)):
        return as_tensor(name, value)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"output {name} is a {type(value).__name__}, and no tensor")
    host = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if host.dtype != torch.bfloat16:
        return as_tensor(name, host.numpy())
    bits = as_tensor(name, host.view(torch.int16).numpy())
    return replace(bits, datatype="BF16")


def name_outputs(found: object, above: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of what a module returned, each with its name.

    A mapping names its items, a named tuple its fields; other lists and tuples number theirs:
    output0, output1 …; a single tensor is output. Inner ones follow a dot. None is left out.
    """
    if isinstance(found, Mapping):
        parts = [(str(key), item) for key, item in found.items()]
    elif isinstance(found, tuple) and hasattr(found, "_fields"):
        parts = list(zip(found._fields, found, strict=True))
    elif isinstance(found, (list, tuple)):
        word = "" if above else "output"
        parts = [(f"{word}{index}", item) for index, item in enumerate(found)]
    else:
        if found is not None:
            yield above or "output", found
        return
    for name, item in parts:
        yield from name_outputs(item, f"{above}.{name}" if above else name)


def spec_of(name: str, value: Any) -> TensorSpec:
    """Return the spec of a tensor, fake ones too; symbolic sizes are free dimensions.

    Raises TypeError for a dtype that the protocol does not have.
    """
    datatype = DATATYPES.get(value.dtype)
    if datatype is None:
        raise TypeError(f"{name} has dtype {value.dtype}, which no datatype stands for")
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(name=name, datatype=datatype, shape=shape)


def find_device(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return the device of the first tensor; the CPU where there is none."""
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
