"""The first load of a checkpoint onto the device, beside plain torch.load and safetensors.

The files are in the page cache for all of them. What the agent does more is on purpose: the weights
come to lie in the arena, so that this load is the only one.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from vram_agent.devices import select_device
from vram_agent.engine.arena import Arena
from vram_agent.engine.memory import open_memory
from vram_agent.engine.torch import TorchWeights
from vram_agent.protocol import DevicePreference

from bench.layers import check_layers, make_layers
from bench.moves import Clock


def measure(device: str, size_bytes: int, samples: int, threads: int) -> dict[str, Any]:
    """Return the samples in seconds by name, and the size of the weights."""
    torch.set_num_threads(threads)
    memory = open_memory(select_device(DevicePreference(device)).place(""))
    clock = Clock(memory.synchronize)
    has_safetensors = importlib.util.find_spec("safetensors") is not None
    arena = Arena("bench")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, flat = Path(folder) / "layers.pt", Path(folder) / "layers.safetensors"
        layers = make_layers(size_bytes)
        weight_bytes = sum(one.nbytes for layer in layers for one in layer.values())
        torch.save(layers, checkpoint)
        if has_safetensors:
            _save_flat(layers, flat)
        del layers

        def load() -> TorchWeights:
            root = torch.load(checkpoint, mmap=True, weights_only=True)
            weights = TorchWeights(root, arena)
            weights.restore(memory, threads)
            check_layers(root)
            return weights

        def load_plainly() -> None:
            check_layers(torch.load(checkpoint, map_location=device.lower(), weights_only=True))

        for _ in range(samples + 1):
            weights = clock.time("vram-agent", load)
            weights.offload()
            weights.release()
            del weights
            clock.time("torch.load", load_plainly)
            if has_safetensors:
                clock.time("safetensors", lambda: _load_flat(flat, device.lower()))
            gc.collect()
            memory.empty_cache()
    return {"weightBytes": weight_bytes, "samples": clock.kept()}


def _save_flat(layers: list[dict[str, Any]], path: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 - may be missing

    flat = {f"{i}.{name}": one for i, layer in enumerate(layers) for name, one in layer.items()}
    save_file(flat, path)


def _load_flat(path: Path, device: str) -> None:
    from safetensors.torch import load_file  # noqa: PLC0415 - may be missing

    flat = load_file(path, device=device)
    check_layers([{"weight": flat[f"{i}.weight"]} for i in range(len(flat) // 2)])
    # On the CPU safetensors only maps the file: a copy is what makes the weights one's own.
    for name, tensor in flat.items():
        flat[name] = tensor.clone() if device == "cpu" else tensor
