"""Tensors that tasks left on the model: what holds device memory beside the weights.

Why it exists: attention maps, position tables and caches that code keeps on its modules stay on
the device when the weights leave it. They are named, so that a residual can be understood, and
moved or dropped where the model's rules say so; without a rule they stay, since a leak must be
seen and not carried along. Called by engine/torch.py.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable

import torch

from vram_agent.devices.base import MIB
from vram_agent.engine.arena import Arena, Region
from vram_agent.engine.discovery import Found
from vram_agent.engine.rules import TensorRules
from vram_agent.engine.tensors import SharedStorage, as_bytes, group_tensors, storage_key
from vram_agent.pages import align

NOTED_BYTES = 1 << 20
_ITEM_BYTES = 16
"""The largest item of any dtype: a flat storage is viewed as whole items."""
_NAMED = 3


class Strays:
    """The tensors of one model that are no weights of it.

    ``is_on_device`` tells whether a tensor's bytes are device memory.
    """

    def __init__(self, rules: TensorRules, is_on_device: Callable[[torch.Tensor], bool]) -> None:
        self._rules = rules
        self._is_on_device = is_on_device
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        self._arena: Arena | None = None
        self._parked: list[tuple[SharedStorage, Region | None, torch.device]] = []
        self.staying_bytes = 0
        """What stays on the device, as of the last offload."""

    def note_loaded(self, tensors: Iterable[Found]) -> None:
        """Take note of what the model had when it was loaded: those are no strays."""
        self._known = {id(one.value): weakref.ref(one.value) for one in tensors}

    def park(self, tensors: Iterable[Found]) -> str:
        """Move and drop what the rules name; return words on what stays, empty for little.

        All or nothing. Raises OSError when host memory is out.
        """
        strays = [one for one in tensors if self._is_stray(one.value)]
        named = [one for one in strays if self._rules.find(one.path) is not None]
        grouped = group_tensors(named, self._rules)
        parked = {id(m.tensor) for s in [*grouped.moved, *grouped.dropped] for m in s.members}
        try:
            for shared in grouped.moved:
                self._park(shared, self._keep(shared))
        except BaseException:
            self.bring_back()
            raise
        for shared in grouped.dropped:
            self._park(shared, None)
        return self._describe([one for one in strays if id(one.value) not in parked])

    def bring_back(self) -> None:
        """Bring what was parked back to its device. On failure the rest stays parked."""
        while self._parked:
            shared, region, device = self._parked[-1]
            flat = torch.zeros(align(shared.nbytes, _ITEM_BYTES), dtype=torch.uint8, device=device)
            if region is not None:
                shared.slice_of(flat).copy_(shared.slice_of(as_bytes(region.buffer)))
            shared.point(flat)
            self._parked.pop()
            if region is not None:
                region.release()

    def release(self) -> None:
        """Forget what was parked, and give its memory back."""
        self._parked.clear()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _is_stray(self, tensor: torch.Tensor) -> bool:
        known = self._known.get(id(tensor))
        if known is not None and known() is tensor:
            return False
        return tensor.layout == torch.strided and self._is_on_device(tensor)

    def _keep(self, shared: SharedStorage) -> Region:
        # An arena of this process alone: strays end with it.
        self._arena = self._arena or Arena(f"strays-{os.getpid()}")
        region = self._arena.allocate(shared.nbytes)
        region.populate(0, shared.nbytes)
        return region

    def _park(self, shared: SharedStorage, region: Region | None) -> None:
        source = shared.take_source()
        if region is not None:
            shared.slice_of(as_bytes(region.buffer)).copy_(source)
        self._parked.append((shared, region, source.device))
        shared.empty()

    def _describe(self, staying: list[Found]) -> str:
        sizes = {storage_key(one.value): one.value.untyped_storage().nbytes() for one in staying}
        self.staying_bytes = sum(sizes.values())
        if self.staying_bytes < NOTED_BYTES:
            return ""
        staying.sort(key=lambda one: -one.value.untyped_storage().nbytes())
        names = [one.path.removeprefix("model.") for one in staying[:_NAMED]]
        more = f" and {len(staying) - _NAMED} more" if len(staying) > _NAMED else ""
        return (
            f"{self.staying_bytes / MIB:.0f} MiB of tensors that tasks made stay on the device: "
            f"{', '.join(names)}{more}; options.tensors can have them moved or dropped"
        )
