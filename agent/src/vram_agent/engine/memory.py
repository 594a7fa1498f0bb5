"""Opening a device's memory in the GPU process. On CUDA this makes the context."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from vram_agent.devices.base import DeviceMemory, Placement
from vram_agent.devices.cpu import AnonymousMemory
from vram_agent.protocol import DeviceKind


def open_memory(placement: Placement) -> DeviceMemory:
    """Return the placement's memory; call once in a process, before any CUDA call."""
    if placement.kind is DeviceKind.CPU:
        return AnonymousMemory(placement)
    # The driver reads this at its first call: from here on there is one device, number 0.
    os.environ["CUDA_VISIBLE_DEVICES"] = placement.uuid
    from vram_agent.devices.cuda import DriverMemory, measure_used_bytes  # noqa: PLC0415 - CUDA only

    if importlib.util.find_spec("torch") is None:
        return DriverMemory(placement)
    from vram_agent.engine.cuda import CudaMemory  # noqa: PLC0415 - takes seconds to import

    return CudaMemory(placement, lambda: measure_used_bytes(placement.uuid))


def open_shared_memory(placement: Placement, is_shared: Callable[[], bool]) -> DeviceMemory:
    """Return the placement's memory in a process that other code uses too.

    It sets no variable: the placement is the first device that the process sees. ``is_shared``
    tells whether a model that is on the device may be used meanwhile.
    """
    if placement.kind is DeviceKind.CPU:
        return AnonymousMemory(placement)
    from vram_agent.devices.cuda import DriverMemory, measure_used_bytes  # noqa: PLC0415 - CUDA only

    if importlib.util.find_spec("torch") is None:
        return DriverMemory(placement)
    from vram_agent.engine.cuda import SharedCudaMemory  # noqa: PLC0415 - takes seconds to import

    return SharedCudaMemory(placement, lambda: measure_used_bytes(placement.uuid), is_shared)
