"""Moving torch weights between the arena and a device.

Why it exists: weights are frozen, so an offload need not copy anything back: it points
``tensor.data`` at the arena again and frees the device's block. A restore is one flat allocation
and copies at the speed of the bus. Called by the runtimes (adopt) in the template and by
processes/gpu.py (restore, offload) in the GPU process.

Limits, on purpose: a weight changed through ``.data`` leaves no trace in ``_version`` and is lost
at offload, and one that was made in inference mode has no version and is copied back each time; all
weights of a model share one storage while they are on the device, so
``copy.deepcopy`` of one of them copies them all; a model with captured CUDA graphs is not
offloaded, since a graph replays with the addresses that it was captured with.
"""

from __future__ import annotations

from typing import Any

import torch

from vram_agent.devices.base import Block, DeviceMemory
from vram_agent.engine.arena import Arena
from vram_agent.engine.cuda import GRAPHS
from vram_agent.engine.discovery import Found
from vram_agent.engine.rules import NO_RULES, TensorRules
from vram_agent.engine.strays import Strays
from vram_agent.engine.tensors import (
    WANTED,
    LeftAlone,
    Member,
    SharedStorage,
    as_bytes,
    describe_view,
    explain_unmovable,
    find_graph,
    find_tensors,
    group_tensors,
    read_version,
)
from vram_agent.engine.weights import Offloaded
from vram_agent.pages import align
from vram_agent.progress import advance, step
from vram_agent.protocol import DeviceKind, LoadStep

ALIGNMENT_BYTES = 512
"""What torch's CUDA allocator aligns to; enough for every vector instruction of a CPU."""
_NAMED = 3


class CapturedGraphError(Exception):
    """A model cannot be offloaded: this process holds CUDA graphs with its addresses."""


class TorchWeights:
    """The tensors of one model: in the arena from the start, on the device while resident."""

    def __init__(self, root: object, arena: Arena, rules: TensorRules = NO_RULES) -> None:
        """Move every tensor that hangs off ``root`` into the arena, but for what ``rules`` say.

        Raises OSError when host memory is out; ``root`` is then of no use.
        """
        self._root: object = root
        found = list(find_tensors(root))
        tensors = group_tensors(found, rules)
        self.left_alone: list[LeftAlone] = tensors.left
        self.notes = _describe_left(tensors.left)
        self._moved, self._dropped = tensors.moved, tensors.dropped
        self.weight_bytes = _lay_out(self._moved, 0)
        self._device_bytes = _lay_out(self._dropped, self.weight_bytes)
        self._is_cpu = True
        self._strays = Strays(rules, self._is_on_device)
        self._strays.note_loaded(found)
        self._region = arena.allocate(self.weight_bytes)
        self._host = as_bytes(self._region.buffer)
        self._views: list[Member] = []
        self._memory: DeviceMemory | None = None
        self._device: torch.Tensor | None = None
        self._block: Block | None = None
        self._vram_bytes: int | None = None
        with step(LoadStep.COPYING_TO_HOST, sum(shared.nbytes for shared in self._moved)):
            self._take_in()
        for shared in self._dropped:
            shared.source = None
            shared.empty()

    def _take_in(self) -> None:
        for shared in self._moved:
            # The old storage is freed here, before the next is copied: one is held twice.
            self._region.populate(shared.offset_bytes, shared.nbytes)
            shared.slice_of(self._host).copy_(shared.take_source())
            shared.point(self._host)
            advance(shared.nbytes)

    @property
    def stray_bytes(self) -> int:
        """Device memory of tensors that tasks left on the model, as of the last offload."""
        return self._strays.staying_bytes

    def restore(self, memory: DeviceMemory, threads: int) -> int:  # noqa: ARG002 - the protocol's
        """Copy the weights into one block on the device; return its bytes. Idempotent."""
        if self._vram_bytes is not None:
            return self._vram_bytes
        self._memory = memory
        self._is_cpu = memory.placement.kind is DeviceKind.CPU
        if self._device_bytes == 0:
            self._strays.bring_back()
            self._vram_bytes = 0
            return 0
        block = memory.allocate(self._device_bytes)
        device = _as_tensor(block)
        try:
            weights = device[: self.weight_bytes]
            with step(LoadStep.COPYING_TO_DEVICE, self.weight_bytes):
                memory.upload(weights, self._host[: self.weight_bytes], self._region.address)
            device[self.weight_bytes :].zero_()
            self._strays.bring_back()
            memory.synchronize()
        except BaseException:
            # Without its tensors the block is free to go.
            del device, weights
            block.free()
            raise
        self._block, self._device = block, device
        for shared in (*self._moved, *self._dropped):
            shared.point(device)
        for view in self._views:
            view.tensor.data = view.view_of(device, 0)
        self._views.clear()
        self._vram_bytes = block.nbytes
        return block.nbytes

    def offload(self) -> Offloaded:
        """Point the tensors at the arena and free the block; changed weights are copied first.

        All or nothing. Raises CapturedGraphError where a CUDA graph was captured, and OSError when
        host memory for strays is out.
        """
        if self._vram_bytes is None:
            return Offloaded(held_bytes=0)
        self._ensure_no_graph()
        notes: list[str] = []
        if self._memory is not None and (words := self._memory.explain_copies()):
            notes.append(words)
        found = list(find_tensors(self._root, reads_graphs=False))
        self._views = self._find_views(found)
        is_view = {id(view.tensor) for view in self._views}
        if words := self._strays.park(one for one in found if id(one.value) not in is_view):
            notes.append(words)
        if self._block is None or self._device is None:
            self._vram_bytes = None
            return Offloaded(held_bytes=0, message="; ".join(notes))
        for shared in self._moved:
            self._keep_changes(shared, self._device, notes)
        self._vram_bytes = None
        for shared in self._moved:
            shared.point(self._host)
        for shared in self._dropped:
            shared.empty()
        for view in self._views:
            view.tensor.data = view.view_of(self._host, 0)
        block, self._block, self._device = self._block, None, None
        if block.free():
            return Offloaded(held_bytes=0, message="; ".join(notes))
        notes.append("something still looks into the weights on the device")
        return Offloaded(held_bytes=block.nbytes, message="; ".join(notes))

    def _ensure_no_graph(self) -> None:
        if not GRAPHS.captures:
            return
        where = find_graph(self._root) or "a place outside of the model"
        raise CapturedGraphError(
            f"{GRAPHS.captures} CUDA graphs were captured ({where} holds one), and they replay "
            f"with the addresses of the weights; switch graphs off in the model's code, or name "
            f"offloadTier Host, which ends the process"
        )

    def _find_views(self, found: list[Found]) -> list[Member]:
        """Return what looks into the weights and is none of them: it goes where they go."""
        if self._device is None:
            return []
        own = {id(member.tensor) for shared in self._moved for member in shared.members}
        begin = self._device.data_ptr()
        return [
            describe_view(one, one.value.data_ptr() - begin)
            for one in found
            if id(one.value) not in own
            and not explain_unmovable(one.value)
            and one.value.device == self._device.device
            and begin <= one.value.data_ptr() < begin + self.weight_bytes
        ]

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == ("cpu" if self._is_cpu else "cuda")

    def _keep_changes(self, shared: SharedStorage, device: torch.Tensor, notes: list[str]) -> None:
        is_changed = False
        for member in shared.members:
            expected = member.view_of(device, shared.offset_bytes)
            tensor = member.tensor
            if tensor.data_ptr() != expected.data_ptr():
                if tensor.shape == member.shape and tensor.dtype == member.dtype:
                    with torch.inference_mode(mode=member.is_inference):
                        member.view_of(self._host, shared.offset_bytes).copy_(tensor.detach())
                    notes.append(f"{member.path} was replaced; its new values were kept")
                else:
                    notes.append(f"{member.path} was replaced; its loaded values are back")
            elif member.version is None or read_version(tensor) != member.version:
                is_changed = True
        if is_changed:
            shared.slice_of(self._host).copy_(shared.slice_of(device))

    def release(self) -> None:
        """Give the arena's pages back."""
        self._root = None
        self._moved.clear()
        self._dropped.clear()
        self._strays.release()
        if self._memory is not None:
            self._memory.unpin(self._region.address, self._region.reserved_bytes)
        self._host = torch.empty(0, dtype=torch.uint8)
        self._region.release()


def _describe_left(left: list[LeftAlone]) -> str:
    """Say what does not move, and nobody asked to be left; empty for nothing."""
    odd = [one for one in left if one.reason != WANTED]
    named = "; ".join(f"{one.path.removeprefix('model.')}: {one.reason}" for one in odd[:_NAMED])
    more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
    return f"{len(odd)} tensors do not move ({named}{more})" if odd else ""


def _lay_out(storages: list[SharedStorage], offset_bytes: int) -> int:
    """Give each storage its place, from an offset on; return where the last one ends."""
    for shared in storages:
        shared.offset_bytes = offset_bytes
        offset_bytes += align(shared.nbytes, ALIGNMENT_BYTES)
    return offset_bytes


def _as_tensor(block: Block) -> torch.Tensor:
    storage: Any = block.storage
    return storage if isinstance(storage, torch.Tensor) else as_bytes(storage)


def set_threads(threads: int) -> None:
    """Let torch's operators use this many threads."""
    torch.set_num_threads(threads)
