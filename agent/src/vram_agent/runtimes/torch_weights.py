"""Reading weights files of torch without a second copy, and without running what they hold.

Why it exists: a state dict that is read into memory and then copied into a module is held twice.
Here its tensors look into the mapped file until the engine copies them into the arena. Called by
runtimes/torch.py in the template.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vram_agent.runtimes.checkpoints import can_map
from vram_agent.runtimes.torch_sources import UnfitModuleError, find_on_meta

BROKEN_FILE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    OSError,
    RuntimeError,
    KeyError,
    TypeError,
    ValueError,
    EOFError,
    AssertionError,
)
"""What the loaders raise for a file that is cut off or of another kind."""


class UnsafeFileError(Exception):
    """A file that would run code when it is read; the message says which part of it."""


def read_state(path: Path, *, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """Return the state dict of a file, its tensors looking into the mapped file.

    Raises UnsafeFileError, UnfitModuleError where the file holds something else, and BROKEN_FILE.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        found: Any = torch.load(
            path, map_location="cpu", mmap=can_map(path), weights_only=not allow_pickle
        )
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise
        raise UnsafeFileError(f"{path} holds more than tensors") from error
    if isinstance(found, torch.nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in found.values()
    ):
        keys = ", ".join(map(str, found))[:200] if isinstance(found, Mapping) else ""
        raise UnfitModuleError(
            f"{path} holds a {type(found).__name__}{f' of {keys}' if keys else ''} and no state "
            f"dict; save the dict of tensors alone"
        )
    return dict(found)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError  # noqa: PLC0415 - images may lack it
        from safetensors.torch import load_file  # noqa: PLC0415 - images may lack it
    except ImportError as error:
        raise UnfitModuleError(
            f"{path} needs the package safetensors ({error}); install it in the image, or save a "
            f"state dict by torch.save"
        ) from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def build(make: Callable[[], Any], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return the module of a factory with the weights of a state dict.

    1. Made without data where all of its data comes from the state dict. 2. Else made as usual.
    Either way the tensors of the state dict become the module's own. Raises UnfitModuleError.
    """
    # 1
    try:
        with torch.device("meta"):
            module = make()
        _assign(module, state)
        if not find_on_meta(module):
            return module  # type: ignore[no-any-return]
    except UnfitModuleError:
        raise
    except Exception:  # noqa: S110 - a factory may need real data in ways that only it knows
        pass
    # 2
    module = make()
    _assign(module, state)
    return module  # type: ignore[no-any-return]


def _assign(module: object, state: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(module, torch.nn.Module):
        raise UnfitModuleError(f"it returned a {type(module).__name__}, and no torch.nn.Module")
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    whole = dict(state)
    ties: dict[int, list[str]] = defaultdict(list)
    for name, tensor in own.items():
        ties[id(tensor)].append(name)
    # Files name tied weights once: their other names are the same tensors.
    for names in ties.values():
        known = next((name for name in names if name in whole), None)
        whole |= {name: whole[known] for name in names if known and name not in whole}
    # As a copy into the module would: it decides on the dtype.
    for name, tensor in whole.items():
        if name in own and tensor.dtype != own[name].dtype:
            whole[name] = tensor.to(own[name].dtype)
    try:
        module.load_state_dict(whole, assign=True)
    except RuntimeError as error:
        raise UnfitModuleError(f"its weights do not fit: {' '.join(str(error).split())}") from error


def ensure_safe_export(path: Path) -> None:
    """Raise UnsafeFileError for an archive of torch.export that is read by unpickling objects.

    torch.export.load falls back to plain pickle in several places, with no option against it
    (torch/export/pt2_archive/_package.py, torch/_export/serde/serialize.py), so its parts are
    looked at first. Raises UnfitModuleError for tensors that it would put onto a GPU.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.partition("/")[2]
            if name.startswith(("data/weights/", "data/constants/")) and name.endswith(".json"):
                _check_payloads(path, name, json.loads(archive.read(member)))
            elif name.startswith("data/") and name.endswith(".pt"):
                data = archive.read(member)
                try:
                    if data:
                        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                except pickle.UnpicklingError as error:
                    raise UnsafeFileError(f"{path} holds objects in {name}") from error


def _check_payloads(path: Path, name: str, payloads: Mapping[str, Any]) -> None:
    for tensor, payload in payloads["config"].items():
        if payload.get("use_pickle"):
            raise UnsafeFileError(f"{path} holds {tensor} as a pickle ({name})")
        device = ((payload.get("tensor_meta") or {}).get("device") or {}).get("type", "cpu")
        if device != "cpu":
            raise UnfitModuleError(
                f"{path} was exported on {device}; move it to the CPU before saving: "
                f"torch.export.passes.move_to_device_pass(program, 'cpu')"
            )
