"""Which runtimes there are. The libraries are imported when a model first needs them."""

from __future__ import annotations

import importlib

from vram_agent.errors import ModelFailedError
from vram_agent.protocol import ModelSpec, Runtime
from vram_agent.runtimes.base import ModelRuntime

_MODULES: dict[Runtime, tuple[str, str, str]] = {
    Runtime.WHISPER: ("vram_agent.runtimes.whisper", "WhisperRuntime", "whisper"),
    Runtime.FUNASR: ("vram_agent.runtimes.funasr", "FunasrRuntime", "funasr"),
    Runtime.ONNX: ("vram_agent.runtimes.onnx", "OnnxRuntime", "onnx"),
    Runtime.TORCH: ("vram_agent.runtimes.torch", "TorchRuntime", "torch"),
    Runtime.TRANSFORMERS: (
        "vram_agent.runtimes.transformers",
        "TransformersRuntime",
        "transformers",
    ),
    Runtime.PYTHON: ("vram_agent.runtimes.python", "PythonRuntime", "torch"),
}


def list_runtimes() -> tuple[Runtime, ...]:
    """Return the runtimes of this build, in the order of the documentation."""
    return tuple(_MODULES)


def find_runtime(spec: ModelSpec) -> ModelRuntime:
    """Return the runtime of a model, importing its library (seconds).

    Raises ModelFailedError when its library is not installed.
    """
    module, name, extra = _MODULES[spec.runtime]
    try:
        runtime: ModelRuntime = getattr(importlib.import_module(module), name)()
    except ImportError as error:
        raise ModelFailedError(
            f"model {spec.name}: runtime {spec.runtime.value} cannot be imported ({error}); "
            f"install vram-agent[{extra}] in the image"
        ) from error
    return runtime
