"""Checkpoints of ``torch.save``: read without a second copy, into modules that were not drawn.

Why it exists: a library's loader reads a file into memory beside a module whose random weights it
has just drawn, and copies one over the other. Here the file is mapped and the drawing left out.
Called by the runtimes that load a library's checkpoints, in the template. It knows no library.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def can_map(path: str | PathLike[str]) -> bool:
    """Whether torch.load can map a file: a zip, as since torch 1.6, with nothing compressed in it.

    Raises OSError and BadZipFile.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


class Undrawn(TorchFunctionMode):
    """While active, ``torch.nn.init`` draws nothing: new weights are memory that nobody touched.

    Only for modules all of whose parameters come from a state dict afterwards.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the tensor of an initialiser as it is; call everything else."""
        given = dict(kwargs or {})
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a module the tensors of a state dict, in the module's dtypes.

    Those that have them already become the module's own, mapped file or not; nothing is copied.
    Raises RuntimeError for a name or a shape that does not fit.
    """
    own = module.state_dict()
    module.load_state_dict(
        {
            name: tensor.to(own[name].dtype) if name in own else tensor
            for name, tensor in state.items()
        },
        assign=True,
    )
