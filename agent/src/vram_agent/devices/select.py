"""Picking the device that an agent runs on."""

from __future__ import annotations

from vram_agent.devices.base import Device
from vram_agent.devices.cpu import CpuDevice
from vram_agent.devices.cuda import CudaDevice, NoCudaDeviceError
from vram_agent.errors import NotSupportedError
from vram_agent.protocol import DevicePreference


def select_device(preference: DevicePreference) -> Device:
    """Return the device of this pod. Call before any CUDA context exists: it takes the baseline.

    1. CPU wanted: the CPU.
    2. CUDA wanted: the NVIDIA devices; NotSupportedError when there is none.
    3. Auto: the NVIDIA devices where there are any, else the CPU.
    """
    if preference is DevicePreference.CPU:
        return CpuDevice()
    try:
        return CudaDevice()
    except NoCudaDeviceError as error:
        if preference is DevicePreference.CUDA:
            raise NotSupportedError(
                f"device CUDA was asked for, but {error}; request nvidia.com/gpu for the "
                f"container, or set device: CPU"
            ) from error
        return CpuDevice()
