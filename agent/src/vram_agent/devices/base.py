"""What a device is to the supervisor, and what its memory is to the engine.

Why it exists: CUDA and CPU are the same code with another device. `Device` is the supervisor's
side: it reads totals and attribution and never creates a CUDA context. `DeviceMemory` is the GPU
process's side: it allocates, copies and gives back. A `Placement` travels from one to the other.
Knows neither torch nor onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from msgspec import Struct

from vram_agent.protocol import DeviceKind, DeviceReport, ResidualSource

MIB = 1 << 20
ANY_DEVICE = ""
"""Where a process is that may be on any of the devices: one that is not ours to place."""


class OutOfDeviceMemoryError(Exception):
    """The device has no room for an allocation; the message carries the figures."""

    def __init__(self, wanted_bytes: int, free_bytes: int, total_bytes: int) -> None:
        super().__init__(
            f"{wanted_bytes / MIB:.0f} MiB wanted, {max(0, free_bytes) / MIB:.0f} of "
            f"{total_bytes / MIB:.0f} MiB free"
        )
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        self.total_bytes = total_bytes


class Placement(Struct, frozen=True, kw_only=True):
    """Which device a GPU process uses. ``total_bytes`` bounds it where the driver does not."""

    kind: DeviceKind
    index: int
    uuid: str
    total_bytes: int


class MemoryFigures(Struct, frozen=True, kw_only=True):
    """A GPU process's own figures, in bytes of device memory.

    ``live_tensor_bytes``: tensors beyond the weights of its resident models;
    ``allocator_cache_bytes``: held by torch's allocator without a tensor; ``runtime_arena_bytes``:
    arenas of ONNX Runtime; ``context_bytes``: context and libraries, before the first model.
    """

    live_tensor_bytes: int = 0
    allocator_cache_bytes: int = 0
    runtime_arena_bytes: int = 0
    context_bytes: int = 0


class Device(Protocol):
    """The devices of this pod, of one kind. No method blocks for long or makes a context."""

    def reports(self, gpu_pids: Mapping[int, str]) -> list[DeviceReport]:
        """Return the devices as they are now, given the devices of this agent's GPU processes.

        Each carries its baseline: what was in use before this agent's first process there,
        measured anew whenever none of its processes is there.
        """
        ...

    def process_bytes(self, pid: int) -> int | None:
        """Return the device memory that a GPU process holds; None where it cannot be known."""
        ...

    def baseline_bytes(self) -> int:
        """Return the device memory in use before this agent's first context."""
        ...

    def residual_source(self) -> ResidualSource:
        """Return how far the figures can be attributed to this pod."""
        ...

    def place(self, wanted: str) -> Placement:
        """Return the device for a new GPU process: of that UUID or index, or where most is free.

        Raises NoVramError when the pod has no such device.
        """
        ...

    def environment(self) -> Mapping[str, str]:
        """Return variables for the templates, set only where the user has not set them."""
        ...


class Block(Protocol):
    """Memory on a device, in one piece."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        ...

    @property
    def storage(self) -> object:
        """What the engine makes tensors of: a writable buffer, or a flat uint8 tensor."""
        ...

    def free(self) -> bool:
        """Give the memory back; False when something else still holds on to it. Idempotent."""
        ...


class DeviceMemory(Protocol):
    """A device's memory inside of the GPU process. Every method may block."""

    @property
    def placement(self) -> Placement:
        """The device that this is the memory of."""
        ...

    def allocate(self, nbytes: int) -> Block:
        """Return a new block. Raises OutOfDeviceMemoryError."""
        ...

    def upload(self, target: Any, source: Any, address: int) -> None:
        """Copy flat uint8 tensors, from host memory at ``address`` onto the device, to the end."""
        ...

    def unpin(self, address: int, nbytes: int) -> None:
        """Let go of host memory that is about to be given back. Idempotent."""
        ...

    def explain_copies(self) -> str:
        """Why copies are slower than they could be; empty where they are not."""
        ...

    def synchronize(self) -> None:
        """Wait until every copy and kernel has ended."""
        ...

    def empty_cache(self) -> None:
        """Give unused memory of the allocators back to the device."""
        ...

    def used_bytes(self) -> int:
        """Return what this process holds on the device, context included; 0 if unknown."""
        ...

    def figures(self, resident_bytes: int, stray_bytes: int) -> MemoryFigures:
        """Return the figures, ``resident_bytes`` being the weights of resident models.

        ``stray_bytes``: what tasks left on the models, as of their last offload; a device whose
        allocator keeps an account of live tensors knows better.
        """
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error of a library says that the device is out of memory."""
        ...
