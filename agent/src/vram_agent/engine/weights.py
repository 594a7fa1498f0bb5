"""What moves: a model's weights as the GPU process sees them, whatever library they belong to.

Why it exists: processes/gpu.py restores and offloads without knowing torch or ONNX Runtime.
Implemented by engine/torch.py and engine/onnx.py.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class CombinedWeights:
    """Several weights of one model, moved together: all of them, or none."""

    def __init__(self, parts: Sequence[Weights]) -> None:
        self._parts = tuple(parts)

    @property
    def weight_bytes(self) -> int:
        """Size of all parts in host memory."""
        return sum(part.weight_bytes for part in self._parts)

    @property
    def notes(self) -> str:
        """What was unusual about the load of any part."""
        return "; ".join(filter(None, (part.notes for part in self._parts)))

    @property
    def stray_bytes(self) -> int:
        """Device memory that tasks left on any part."""
        return sum(part.stray_bytes for part in self._parts)

    def restore(self, memory: DeviceMemory, threads: int) -> int:
        """Bring every part onto the device; where one fails, the others leave it again."""
        restored: list[Weights] = []
        vram_bytes = 0
        try:
            for part in self._parts:
                vram_bytes += part.restore(memory, threads)
                restored.append(part)
        except BaseException:
            for part in reversed(restored):
                part.offload()
            raise
        return vram_bytes

    def offload(self) -> Offloaded:
        """Take every part off the device. Raises what the first part raises that cannot leave."""
        left = [part.offload() for part in self._parts]
        return Offloaded(
            held_bytes=sum(one.held_bytes for one in left),
            message="; ".join(one.message for one in left if one.message),
        )

    def release(self) -> None:
        """Give the host memory of every part back."""
        for part in self._parts:
            part.release()
