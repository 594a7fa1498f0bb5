"""Moving torch weights between the arena and a device.

Why it exists: weights are frozen, so an offload need not copy anything back: it points
``tensor.data`` at the arena again and frees the device's block. A restore is one flat allocation
and chunked copies. Called by the runtimes (adopt) in the template and by processes/gpu.py
(restore, offload) in the GPU process. The only module of the engine that imports torch.

Limits, on purpose: a weight changed through ``.data`` leaves no trace in ``_version`` and is lost
at offload; all weights of a model share one storage while they are on the device, so
``copy.deepcopy`` of one of them copies them all; CUDA graphs do not survive an offload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vram_agent.devices.base import (
    Block,
    DeviceMemory,
    MemoryFigures,
    OutOfDeviceMemoryError,
    Placement,
)
from vram_agent.engine.arena import Arena, align
from vram_agent.engine.discovery import Found, walk
from vram_agent.engine.weights import Offloaded

ALIGNMENT_BYTES = 512
"""What torch's CUDA allocator aligns to; enough for every vector instruction of a CPU."""
COPY_CHUNK_BYTES = 64 << 20


@dataclass(slots=True)
class _Member:
    """One tensor object that looks into a storage."""

    path: str
    tensor: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset_items: int
    dtype: torch.dtype
    version: int = 0

    def view_of(self, flat: torch.Tensor, offset_bytes: int) -> torch.Tensor:
        """Return the same view, of the storage that lies at ``offset_bytes`` of ``flat``."""
        typed = flat.view(self.dtype)
        items = offset_bytes // self.dtype.itemsize + self.offset_items
        return torch.as_strided(typed, self.shape, self.stride, items)


@dataclass(slots=True)
class _Shared:
    """One storage, and every tensor that looks into it: tied weights stay tied."""

    nbytes: int
    source: torch.UntypedStorage | None
    members: list[_Member]
    offset_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A tensor that is not moved, and why."""

    path: str
    reason: str


def is_tensor(value: object) -> bool:
    """Whether discovery stops at a value: it is a tensor."""
    return isinstance(value, torch.Tensor)


def find_tensors(root: object) -> Iterator[Found]:
    """Yield every tensor object that hangs off ``root``, each once."""
    seen: set[int] = set()
    for found in walk(root, is_tensor):
        seen.add(id(found.value))
        yield found
    # A ScriptModule keeps its tensors in C++, where no walk over attributes comes.
    if isinstance(root, torch.jit.ScriptModule):
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            if id(tensor) not in seen:
                yield Found(f"model.{name}", tensor)


_UNMOVABLE: tuple[tuple[Callable[[torch.Tensor], bool], str], ...] = (
    (lambda t: t.layout != torch.strided, "its layout has no flat storage"),
    (lambda t: t.is_quantized, "quantised tensors carry their scales outside of the storage"),
    (lambda t: t.device.type not in {"cpu", "cuda"}, "its device holds no bytes that could move"),
    (
        lambda t: type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl,  # noqa: SLF001 - torch has no public test for this
        "its class decides itself what its data is",
    ),
    (lambda t: t.is_inference(), "tensors made in inference mode cannot be pointed elsewhere"),
    (lambda t: t.is_conj() or t.is_neg(), "it is a lazy conjugate or negative"),
)


def explain_unmovable(tensor: torch.Tensor) -> str:
    """Return why a tensor must stay where it is; empty when it can be moved."""
    return next((words for applies, words in _UNMOVABLE if applies(tensor)), "")


class TorchWeights:
    """The tensors of one model: in the arena from the start, on the device while resident."""

    def __init__(self, root: object, arena: Arena) -> None:
        """Move every tensor that hangs off ``root`` into the arena.

        Raises OSError when host memory is out; ``root`` is then of no use.
        """
        self.left_alone: list[LeftAlone] = []
        self._storages = self._discover(root)
        self.weight_bytes = 0
        for shared in self._storages:
            shared.offset_bytes = self.weight_bytes
            self.weight_bytes += align(shared.nbytes, ALIGNMENT_BYTES)
        self._region = arena.allocate(self.weight_bytes)
        self._host = _over(self._region.buffer)
        self._device: torch.Tensor | None = None
        self._block: Block | None = None
        for shared in self._storages:
            self._adopt(shared)

    def _discover(self, root: object) -> list[_Shared]:
        by_storage: dict[int, _Shared] = {}
        fixed: dict[int, str] = {}
        for found in find_tensors(root):
            tensor: torch.Tensor = found.value
            reason = explain_unmovable(tensor)
            if reason:
                self.left_alone.append(LeftAlone(found.path, reason))
                if tensor.layout == torch.strided and tensor.device.type != "meta":
                    fixed[_storage_key(tensor)] = found.path
                continue
            if tensor.untyped_storage().nbytes() == 0:
                continue
            shared = by_storage.setdefault(
                _storage_key(tensor),
                _Shared(tensor.untyped_storage().nbytes(), tensor.untyped_storage(), []),
            )
            shared.members.append(
                _Member(
                    found.path,
                    tensor,
                    tensor.shape,
                    tensor.stride(),
                    int(tensor.storage_offset()),
                    tensor.dtype,
                )
            )
        for key, path in fixed.items():
            for member in by_storage.pop(key).members if key in by_storage else ():
                self.left_alone.append(LeftAlone(member.path, f"it shares its storage with {path}"))
        return list(by_storage.values())

    def _adopt(self, shared: _Shared) -> None:
        assert shared.source is not None  # noqa: S101 - only a new entry is adopted
        source = torch.empty(0, dtype=torch.uint8, device=shared.source.device)
        source.set_(shared.source)
        self._slice(self._host, shared).copy_(source)
        # The old storage is freed here, before the next is copied: one storage is held twice.
        shared.source = None
        self._point(shared, self._host)

    @staticmethod
    def _slice(flat: torch.Tensor, shared: _Shared) -> torch.Tensor:
        return flat[shared.offset_bytes : shared.offset_bytes + shared.nbytes]

    @staticmethod
    def _point(shared: _Shared, flat: torch.Tensor) -> None:
        for member in shared.members:
            member.tensor.data = member.view_of(flat, shared.offset_bytes)
            member.version = member.tensor._version  # noqa: SLF001 - torch's only sign of a write

    def restore(self, memory: DeviceMemory, threads: int) -> int:  # noqa: ARG002 - the protocol's
        """Copy the weights into one block on the device; return its bytes. Idempotent."""
        if self._block is not None:
            return self._block.nbytes
        if self.weight_bytes == 0:
            return 0
        block = memory.allocate(self.weight_bytes)
        device = _as_tensor(block)
        try:
            address = self._region.address
            for start in range(0, self.weight_bytes, COPY_CHUNK_BYTES):
                end = min(start + COPY_CHUNK_BYTES, self.weight_bytes)
                # While this chunk is pinned, the copy of the one before is under way.
                memory.pin(address + start, end - start)
                device[start:end].copy_(self._host[start:end], non_blocking=True)
            memory.synchronize()
        except BaseException:
            # Without its tensor the block is free to go.
            del device
            block.free()
            raise
        self._block, self._device = block, device
        for shared in self._storages:
            self._point(shared, device)
        return block.nbytes

    def offload(self) -> Offloaded:
        """Point the tensors at the arena and free the block; changed weights are copied first."""
        if self._block is None or self._device is None:
            return Offloaded(held_bytes=0)
        notes: list[str] = []
        for shared in self._storages:
            self._keep_changes(shared, self._device, notes)
            self._point(shared, self._host)
        block, self._block, self._device = self._block, None, None
        if block.free():
            return Offloaded(held_bytes=0, message="; ".join(notes))
        notes.append("something still looks into the weights on the device")
        return Offloaded(held_bytes=block.nbytes, message="; ".join(notes))

    def _keep_changes(self, shared: _Shared, device: torch.Tensor, notes: list[str]) -> None:
        is_changed = False
        for member in shared.members:
            expected = member.view_of(device, shared.offset_bytes)
            tensor = member.tensor
            if tensor.data_ptr() != expected.data_ptr():
                if tensor.shape == member.shape and tensor.dtype == member.dtype:
                    member.view_of(self._host, shared.offset_bytes).copy_(tensor.detach())
                    notes.append(f"{member.path} was replaced; its new values were kept")
                else:
                    notes.append(f"{member.path} was replaced; its loaded values are back")
            elif tensor._version != member.version:  # noqa: SLF001 - torch's only sign of a write
                is_changed = True
        if is_changed:
            self._slice(self._host, shared).copy_(self._slice(device, shared))

    def release(self) -> None:
        """Give the arena's pages back."""
        self._storages.clear()
        self._host = torch.empty(0, dtype=torch.uint8)
        self._region.release()


def _storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - data_ptr is 0 for every empty storage


def _as_tensor(block: Block) -> torch.Tensor:
    storage: Any = block.storage
    return storage if isinstance(storage, torch.Tensor) else _over(storage)


def _over(buffer: Any) -> torch.Tensor:
    # frombuffer keeps the object alive and not its export; only a memoryview between the two keeps
    # a mapping from being closed under a tensor that still looks into it.
    return torch.frombuffer(memoryview(buffer), dtype=torch.uint8)


def set_threads(threads: int) -> None:
    """Let torch's operators use this many threads."""
    torch.set_num_threads(threads)


def is_cuda_initialized() -> bool:
    """Whether this process has a CUDA context through torch."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def clear_workspaces() -> None:
    """Free cuBLAS's workspaces, which no other call gives back."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # noqa: SLF001 - pytorch#184084
    if clear is not None and is_cuda_initialized():
        clear()


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
        self._pinned: set[int] = set()
        self._can_pin = True

    def allocate(self, nbytes: int) -> CudaBlock:
        """Take a block from torch's allocator. Raises OutOfDeviceMemoryError."""
        try:
            return CudaBlock(nbytes, self._device)
        except torch.OutOfMemoryError as error:
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            raise OutOfDeviceMemoryError(nbytes, free_bytes, total_bytes) from error

    def pin(self, address: int, nbytes: int) -> None:
        """Register host memory with the driver, once; without it copies are pageable."""
        if not self._can_pin or address in self._pinned:
            return
        # Where the driver refuses (a locked-memory limit), every later chunk would be refused too.
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._can_pin = int(cudart.cudaHostRegister(address, nbytes, 0)) == 0
        if self._can_pin:
            self._pinned.add(address)

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

    def figures(self, resident_bytes: int) -> MemoryFigures:
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
