"""An ONNX Runtime session with the options it has by default, and what its process then holds."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import onnxruntime
from vram_agent.devices import select_device
from vram_agent.devices.cpu import measure_private_anonymous_bytes
from vram_agent.devices.cuda import measure_used_bytes
from vram_agent.protocol import DeviceKind, DevicePreference

from bench.matmul import BATCHES, ROWS


def measure(device: str, path: str) -> dict[str, Any]:
    """Return the process's device bytes with the session after its runs, and without it."""
    chosen = select_device(DevicePreference(device))
    baseline_bytes = chosen.baseline_bytes()
    placement = chosen.place("")

    def used_bytes() -> int:
        if placement.kind is DeviceKind.CPU:
            return measure_private_anonymous_bytes(os.getpid()) or 0
        return (measure_used_bytes(placement.uuid) or 0) - baseline_bytes

    providers = (
        ["CPUExecutionProvider"]
        if device == DevicePreference.CPU
        else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    session = onnxruntime.InferenceSession(path, providers=providers)
    for batch in BATCHES:
        session.run(None, {"input": np.ones((batch, ROWS), np.float32)})
    gc.collect()
    loaded_bytes = used_bytes()
    del session
    gc.collect()
    return {"loadedBytes": loaded_bytes, "droppedBytes": used_bytes()}
