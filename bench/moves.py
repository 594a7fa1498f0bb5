"""Offload and restore in one process, sample by sample beside real copies and the bare limit.

The limit. On CUDA: copies from pinned into preallocated memory (a buffer of 1 GiB at most, over and
over, since pinning is slow). On the CPU memory that was given back must be mapped anew, so that the
limit is one memcpy into a fresh anonymous mapping, with huge pages where the kernel has them; the
same with the kernel's default pages and into memory that is mapped already are measured beside it.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vram_agent.devices import select_device
from vram_agent.devices.base import DeviceMemory
from vram_agent.engine.arena import Arena
from vram_agent.engine.memory import open_memory
from vram_agent.engine.torch import TorchWeights
from vram_agent.protocol import DevicePreference

from bench.layers import check_layers, make_layers

PINNED_BYTES = 1 << 30
Tensors = list[torch.Tensor]


class Clock:
    """Samples by name. The first round of each is not kept: it maps, pins and warms up."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.samples: dict[str, list[float]] = {}
        self._wait = wait

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Time ``work`` until the device has finished; return what it returns."""
        self._wait()
        began = time.perf_counter()
        result = work()
        self._wait()
        self.samples.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def kept(self) -> dict[str, list[float]]:
        """Return the samples but for the first of each."""
        return {name: samples[1:] for name, samples in self.samples.items()}


def measure(device: str, size_bytes: int, samples: int, threads: int) -> dict[str, Any]:
    """Return the samples in seconds by name, and the bytes that were moved."""
    torch.set_num_threads(threads)
    memory = open_memory(select_device(DevicePreference(device)).place(""))
    layers = make_layers(size_bytes)
    arena = Arena("bench")
    weights = TorchWeights(layers, arena)
    tensors = [tensor for layer in layers for tensor in layer.values()]
    clock = Clock(memory.synchronize)
    for _ in range(samples + 1):
        clock.time("restore", lambda: weights.restore(memory, threads))
        check_layers(layers)
        copies = clock.time("copy out", lambda: [tensor.to("cpu", copy=True) for tensor in tensors])
        clock.time("offload", partial(_offload, weights, memory))
        check_layers(layers)
        _time_copies_in(clock, copies, device)
        memory.empty_cache()
        if device == DevicePreference.CPU:
            _time_mapped_copies(clock, tensors, weights.weight_bytes)
        else:
            _time_pinned_copy(clock, weights.weight_bytes)
            memory.empty_cache()
    return {"weightBytes": weights.weight_bytes, "samples": clock.kept()}


def _offload(weights: TorchWeights, memory: DeviceMemory) -> None:
    weights.offload()
    # Part of it: until then the bytes are in torch's cache, and in nobody else's reach.
    memory.empty_cache()


def _time_copies_in(clock: Clock, copies: Tensors, device: str) -> None:
    clock.time("copy in", lambda: [one.to(device.lower(), copy=True) for one in copies])
    # The caller's list is the last to hold them.
    copies.clear()


def _time_mapped_copies(clock: Clock, tensors: Tensors, nbytes: int) -> None:
    # Offloaded, the tensors lie one after the other in the arena.
    source = min(tensor.data_ptr() for tensor in tensors)
    for name, advice in (
        ("bare, fresh huge pages", mmap.MADV_HUGEPAGE),
        ("bare, fresh default pages", None),
    ):
        clock.time(name, partial(_copy_into_fresh, source, nbytes, advice)).close()
    mapping = _copy_into_fresh(source, nbytes, mmap.MADV_HUGEPAGE)
    clock.time("bare, mapped already", lambda: _copy_into(mapping, source, nbytes))
    mapping.close()


def _copy_into_fresh(source: int, nbytes: int, advice: int | None) -> mmap.mmap:
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if advice is not None:
        mapping.madvise(advice)
    _copy_into(mapping, source, nbytes)
    return mapping


def _copy_into(mapping: mmap.mmap, source: int, nbytes: int) -> None:
    target = ctypes.c_char.from_buffer(mapping)
    ctypes.memmove(ctypes.addressof(target), source, nbytes)
    # Its export would keep the mapping from being closed.
    del target


def _time_pinned_copy(clock: Clock, nbytes: int) -> None:
    pinned = torch.empty(min(nbytes, PINNED_BYTES), dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        for start in range(0, nbytes, PINNED_BYTES):
            end = min(start + PINNED_BYTES, nbytes)
            target[start:end].copy_(pinned[: end - start], non_blocking=True)

    clock.time("bare, pinned", copy)
