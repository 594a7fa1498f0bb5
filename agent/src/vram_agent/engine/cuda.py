"""Memory of a CUDA device through torch: blocks, copies, page-locked host memory, own figures.

Why it exists: it is the CUDA half of what devices/cpu.py does for the CPU, behind the same
`DeviceMemory`. Called by engine/memory.py in the GPU process alone, since making it makes the
context. It knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vram_agent.devices.base import MemoryFigures, OutOfDeviceMemoryError, Placement
from vram_agent.devices.cpu import measure_total_bytes
from vram_agent.engine.pinning import CHUNK_BYTES, PinnedPages
from vram_agent.engine.staging import StagingRing
from vram_agent.progress import advance

RING_SLOTS = 4
SLOT_BYTES = 16 << 20
_PINNED_SHARE = 0.8
"""Of the container's memory: the rest stays for what must be allocated while weights are locked."""


def is_cuda_initialized() -> bool:
    """Whether this process has a CUDA context through torch."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def clear_workspaces() -> None:
    """Free cuBLAS's workspaces, which no other call gives back."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # noqa: SLF001 - pytorch#184084
    if clear is not None and is_cuda_initialized():
        clear()


class GraphWatch:
    """Counts the CUDA graphs that this process captures, from ``begin`` on."""

    def __init__(self) -> None:
        self.captures = 0
        self._watched: set[type] = set()

    def begin(self, graph_class: type) -> None:
        """Have each capture of a class of graphs counted. Idempotent."""
        if graph_class in self._watched:
            return
        self._watched.add(graph_class)
        capture_begin: Any = graph_class.capture_begin  # type: ignore[attr-defined]

        def counted(graph: Any, *args: Any, **options: Any) -> Any:
            self.captures += 1
            return capture_begin(graph, *args, **options)

        graph_class.capture_begin = counted  # type: ignore[attr-defined]


GRAPHS = GraphWatch()
"""Of this process. A graph holds addresses of weights, wherever the graph itself is kept."""


class CudaBlock:
    """A flat uint8 tensor on a CUDA device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._tensor: torch.Tensor | None = torch.empty(nbytes, dtype=torch.uint8, device=device)

    @property
    def storage(self) -> object:
        """The tensor."""
        return self._tensor

    def free(self) -> bool:
        """Drop the tensor; False when its memory is still in use (a view of a weight leaked)."""
        if self._tensor is None:
            return True
        device = self._tensor.device
        before_bytes = torch.cuda.memory_allocated(device)
        self._tensor = None
        return before_bytes - torch.cuda.memory_allocated(device) >= self.nbytes


class CudaRegistrar:
    """Locks pages with ``cudaHostRegister``: our own pages, since torch's pinned allocator rounds
    up to powers of two (pytorch#95823).
    """

    def __init__(self) -> None:
        self._cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def register(self, address: int, nbytes: int) -> str:
        """Lock; return the driver's refusal, empty when done."""
        code = int(self._cudart.cudaHostRegister(address, nbytes, 0))
        return f"cudaHostRegister answers {code}" if code else ""

    def unregister(self, address: int) -> None:
        """Unlock."""
        self._cudart.cudaHostUnregister(address)


class _CudaSlot:
    """A page-locked buffer, and the event that follows its last copy."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def mark(self) -> None:
        self._event.record()


class CudaMemory:
    """Memory of one CUDA device or MIG slice, through torch's allocator.

    Making it makes the context, so only the GPU process does. ``measure_used_bytes`` reads what is
    in use on the whole device, from the driver, without a context.
    """

    def __init__(self, placement: Placement, measure_used_bytes: Callable[[], int | None]) -> None:
        self.placement = placement
        self._measure_used_bytes = measure_used_bytes
        self._before_bytes = measure_used_bytes() or 0
        # The one visible device is cuda:0: the caller has set CUDA_VISIBLE_DEVICES to its UUID.
        self._device = torch.device("cuda", 0)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.empty(1, device=self._device)
        torch.cuda.synchronize(self._device)
        self._context_bytes = self.used_bytes() - torch.cuda.memory_reserved(self._device)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._registrar = CudaRegistrar()
        self._pages = PinnedPages(self._registrar, find_pin_budget_bytes())
        GRAPHS.begin(torch.cuda.CUDAGraph)

    def allocate(self, nbytes: int) -> CudaBlock:
        """Take a block from torch's allocator. Raises OutOfDeviceMemoryError."""
        try:
            return CudaBlock(nbytes, self._device)
        except torch.OutOfMemoryError as error:
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            raise OutOfDeviceMemoryError(nbytes, free_bytes, total_bytes) from error

    def upload(self, target: Any, source: Any, address: int) -> None:
        """Copy host memory onto the device, on a stream of its own, and wait for the end.

        Chunks that are locked by now go at the bus's speed, the others through the ring; what was
        not locked is from then on, in the background.
        """
        chunks = [
            (start, min(start + CHUNK_BYTES, len(source)))
            for start in range(0, len(source), CHUNK_BYTES)
        ]
        loose = {start for start, _ in chunks if not self._pages.is_pinned(address + start)}
        # The block's memory may still be read by kernels that were given it before.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies), self._open_ring(is_wanted=bool(loose)) as ring:
            for start, end in chunks:
                if ring is not None and start in loose:
                    ring.copy(source[start:end], target[start:end])
                else:
                    target[start:end].copy_(source[start:end], non_blocking=True)
            self._copies.synchronize()
        advance(len(source) - (ring.read_bytes if ring is not None else 0))
        self._pages.want(address, len(source))

    @contextmanager
    def _open_ring(self, *, is_wanted: bool) -> Iterator[StagingRing | None]:
        """Yield a ring of locked buffers; None where the driver refuses to lock any."""
        if not is_wanted:
            yield None
            return
        flat = torch.empty(RING_SLOTS * SLOT_BYTES, dtype=torch.uint8)
        if self._registrar.register(flat.data_ptr(), len(flat)):
            yield None
            return
        try:
            slots = [flat[at : at + SLOT_BYTES] for at in range(0, len(flat), SLOT_BYTES)]
            yield StagingRing([_CudaSlot(one) for one in slots])
        finally:
            self._copies.synchronize()
            self._registrar.unregister(flat.data_ptr())

    def unpin(self, address: int, nbytes: int) -> None:
        """Unlock host memory that is about to be given back. Idempotent."""
        self._pages.forget(address, nbytes)

    def explain_copies(self) -> str:
        """Why copies are slower than they could be; empty where they are not."""
        refusal = self._pages.refusal
        return f"some weights stay in pageable memory: {refusal}" if refusal else ""

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)

    def empty_cache(self) -> None:
        """Free cuBLAS's workspaces and every block of the allocator without a tensor."""
        clear_workspaces()
        torch.cuda.empty_cache()

    def used_bytes(self) -> int:
        """Return what came into use on the device since before the context."""
        used_bytes = self._measure_used_bytes()
        own_bytes = torch.cuda.memory_reserved(self._device)
        return max(own_bytes, (used_bytes or 0) - self._before_bytes)

    def figures(self, resident_bytes: int, stray_bytes: int) -> MemoryFigures:  # noqa: ARG002 - counted anew
        """Return torch's own figures."""
        allocated_bytes = torch.cuda.memory_allocated(self._device)
        return MemoryFigures(
            live_tensor_bytes=max(0, allocated_bytes - resident_bytes),
            allocator_cache_bytes=torch.cuda.memory_reserved(self._device) - allocated_bytes,
            context_bytes=max(0, self._context_bytes),
        )

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether torch's allocator, or ONNX Runtime's, failed."""
        return isinstance(error, torch.OutOfMemoryError) or (
            "Failed to allocate memory" in str(error) or "out of memory" in str(error).lower()
        )


class SharedCudaMemory(CudaMemory):
    """The same in a process where other threads may use the device at any time."""

    def __init__(
        self,
        placement: Placement,
        measure_used_bytes: Callable[[], int | None],
        is_shared: Callable[[], bool],
    ) -> None:
        super().__init__(placement, measure_used_bytes)
        self._is_shared = is_shared

    def empty_cache(self) -> None:
        """Free the allocator's blocks; the workspaces only where no model could be using them.

        A thread that is about to launch a kernel of cuBLAS holds the address of its workspace.
        """
        if not self._is_shared():
            clear_workspaces()
        torch.cuda.empty_cache()


def find_pin_budget_bytes() -> int:
    """Return how much host memory may be locked: a share of what the container may use."""
    return int(_PINNED_SHARE * measure_total_bytes())
