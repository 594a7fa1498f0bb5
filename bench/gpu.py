"""The GPUs of this machine for the record: name, driver, memory and the link they hang on."""

from __future__ import annotations

from typing import Any

import pynvml


def describe_gpus() -> list[dict[str, Any]]:
    """Return what NVML says of each GPU; a link that it will not tell is left out."""
    pynvml.nvmlInit()
    driver = _text(pynvml.nvmlSystemGetDriverVersion())
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        gpu = {
            "name": _text(pynvml.nvmlDeviceGetName(handle)),
            "driver": driver,
            "memoryBytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        }
        try:
            generation = pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)
            width = pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)
            gpu["pcieLink"] = f"Gen{generation} x{width}"
        except pynvml.NVMLError:  # virtual machines hide it
            pass
        found.append(gpu)
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
