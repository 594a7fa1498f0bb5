"""A ring of small buffers carries any amount, and no buffer is written before it was read."""

from __future__ import annotations

import pytest
import torch
from vram_agent.engine.staging import StagingRing


class LateDevice:
    """Carries out the copies from a slot only when somebody waits for them, as a device may."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []


class LateTarget:
    """A slice of device memory: copies into it are under way until the slot is waited for."""

    def __init__(self, device: LateDevice, memory: torch.Tensor) -> None:
        self._device = device
        self._memory = memory

    def __getitem__(self, part: slice) -> LateTarget:
        return LateTarget(self._device, self._memory[part])

    def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self._device.pending.append((self._memory, source))


class Slot:
    def __init__(self, device: LateDevice, nbytes: int) -> None:
        self.buffer = torch.zeros(nbytes, dtype=torch.uint8)
        self._device = device
        self._marked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def wait(self) -> None:
        for target, source in self._marked:
            target.copy_(source)
        self._marked.clear()

    def mark(self) -> None:
        self._marked += self._device.pending
        self._device.pending.clear()


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_byte_arrives_in_its_place(nbytes: int, slots: int) -> None:
    device = LateDevice()
    memory = torch.full((nbytes,), 255, dtype=torch.uint8)
    ring_slots = [Slot(device, 8) for _ in range(slots)]
    ring = StagingRing(ring_slots)
    source = torch.arange(nbytes, dtype=torch.uint8)
    ring.copy(source, LateTarget(device, memory))
    # A second copy goes on with the next slot, while the first is still under way.
    again = torch.full((nbytes,), 255, dtype=torch.uint8)
    ring.copy(source, LateTarget(device, again))
    for slot in ring_slots:
        slot.wait()
    assert memory.tolist() == list(range(nbytes))
    assert again.tolist() == list(range(nbytes))
