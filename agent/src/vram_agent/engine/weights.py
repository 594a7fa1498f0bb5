"""What moves: a model's weights as the GPU process sees them, whatever library they belong to.

Why it exists: processes/gpu.py restores and offloads without knowing torch or ONNX Runtime.
Implemented by engine/torch.py and engine/onnx.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vram_agent.devices.base import DeviceMemory


@dataclass(frozen=True, slots=True)
class Offloaded:
    """What an offload left behind: bytes still held on the device, and words on anything odd."""

    held_bytes: int
    message: str = ""


class Weights(Protocol):
    """The weights of one model. Made in the template, moved in the GPU process."""

    @property
    def weight_bytes(self) -> int:
        """Size in host memory."""
        ...

    @property
    def notes(self) -> str:
        """What was unusual about the load, such as tensors that cannot move; empty for nothing."""
        ...

    @property
    def stray_bytes(self) -> int:
        """Device memory that tasks left on the model, as of the last offload."""
        ...

    def restore(self, memory: DeviceMemory, threads: int) -> int:
        """Bring the weights onto the device; return the bytes they hold there.

        All or nothing. Raises OutOfDeviceMemoryError, or what the library raises.
        """
        ...

    def offload(self) -> Offloaded:
        """Take the weights off the device; outputs after the next restore are the same bits."""
        ...

    def release(self) -> None:
        """Give the host memory back; the model is of no use afterwards."""
        ...


class NoWeights:
    """A model without weights that this agent could move."""

    weight_bytes = 0
    notes = ""
    stray_bytes = 0

    def restore(self, memory: DeviceMemory, threads: int) -> int:  # noqa: ARG002 - the protocol's
        """Do nothing: there is nothing to move."""
        return 0

    def offload(self) -> Offloaded:
        """Do nothing: there is nothing to move."""
        return Offloaded(held_bytes=0)

    def release(self) -> None:
        """Do nothing: there is nothing to give back."""
