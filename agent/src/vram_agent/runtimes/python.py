"""The runtime Python: any object that your own code makes.

``source``: ``module:factory``. ``factory(**options["arguments"])`` returns the model, any object.

Options:
- ``arguments``: keyword arguments of the factory, an object. Default: none.
- ``path``: a folder, or a list of folders, put first on ``sys.path``.
- ``loadsOn``: ``cpu`` (default), or ``cuda`` for code that insists on CUDA while it loads. The
  factory then runs in the GPU process at the first use, and the weights are lost with that process:
  such a model has the tiers PinnedHost and Disk only.

Tasks, by the methods that the object has:
- ``infer(inputs: dict[str, numpy.ndarray], parameters: dict) -> dict[str, numpy.ndarray]``; BYTES
  are object arrays of bytes.
- ``transcribe(audio: numpy.ndarray, parameters: dict)`` and ``translate(...)`` return a text, or a
  dict of text, language and segments; audio is float32, 16 kHz mono.
- ``speech(text: str, parameters: dict) -> (numpy.ndarray, rate_hertz)``.

An object may also have ``inputs`` and ``outputs``: lists of (name, OIP datatype, shape), shown to
clients; and ``forget()``, called when a model leaves the device, to drop caches it keeps there.
Weights are the torch tensors found by walking from the object. A method says that the input is at
fault by raising ``vram_agent.errors.BadInputError``; anything else is the model's own failure.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vram_agent.backend import Task, TaskKind, TaskResult, TensorSpec
from vram_agent.devices.base import DeviceMemory
from vram_agent.engine.arena import Arena
from vram_agent.engine.weights import NoWeights, Offloaded, Weights
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import ModelSpec
from vram_agent.runtimes.arrays import as_array, as_tensor, read_audio
from vram_agent.runtimes.base import Option, check_options

SAMPLE_RATE_HERTZ = 16_000
_PATH = Option(
    lambda value: (
        isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    ),
    "a folder or a list of folders",
)
_OPTIONS = {
    "arguments": Option(lambda value: isinstance(value, dict), "an object of keyword arguments"),
    "path": _PATH,
    "loadsOn": Option(lambda value: value in {"cpu", "cuda"}, "cpu or cuda"),
}


class PythonRuntime:
    """Calls the user's factory."""

    def load(self, spec: ModelSpec, arena: Arena) -> PythonModel:
        """Import the module and call the factory. Raises ModelFailedError."""
        check_options(spec, _OPTIONS)
        paths = spec.options.get("path", [])
        for path in [paths] if isinstance(paths, str) else reversed(paths):
            if path not in sys.path:
                sys.path.insert(0, path)
        if spec.options.get("loadsOn") == "cuda":
            late = LateWeights(spec)
            return PythonModel(spec, late, lambda: late.root)
        root = make_root(spec)
        return PythonModel(spec, adopt_weights(root, arena), lambda: root)


def make_root(spec: ModelSpec) -> object:
    """Call the factory. Raises ModelFailedError: what, where, what to do."""
    module_name, _, factory_name = spec.source.partition(":")
    if not module_name or not factory_name:
        raise ModelFailedError(
            f"model {spec.name}: source {spec.source!r} is not module:factory, such as "
            f"my_models:load_tts"
        )
    try:
        factory: Any = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise ModelFailedError(
            f"model {spec.name}: {spec.source} cannot be imported: {error}; put its folder into "
            f"options.path, or install it in the image"
        ) from error
    try:
        root: object = factory(**spec.options.get("arguments", {}))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelFailedError(
            f"model {spec.name}: {spec.source} raised {type(error).__name__}: {error}"
        ) from error
    return root


def adopt_weights(root: object, arena: Arena) -> Weights:
    """Put the torch tensors that hang off ``root`` into the arena."""
    if "torch" not in sys.modules:
        return NoWeights()
    from vram_agent.engine.torch import TorchWeights  # noqa: PLC0415 - images may lack torch

    return TorchWeights(root, arena)


class LateWeights:
    """Weights of a model that is made in the GPU process, when it is first restored."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._weights: Weights | None = None
        self.root: object = None

    @property
    def weight_bytes(self) -> int:
        """Bytes in host memory; 0 until the model was made."""
        return self._weights.weight_bytes if self._weights else 0

    @property
    def notes(self) -> str:
        """What was unusual about the load; nothing until the model was made."""
        return self._weights.notes if self._weights else ""

    @property
    def stray_bytes(self) -> int:
        """Device memory that tasks left on the model, as of the last offload."""
        return self._weights.stray_bytes if self._weights else 0

    def restore(self, memory: DeviceMemory, threads: int) -> int:
        """Make the model if there is none, then restore it. Raises ModelFailedError."""
        if self._weights is None:
            root = make_root(self._spec)
            # An arena of this process alone: it goes when the process does.
            self._weights = adopt_weights(root, Arena(self._spec.name))
            self.root = root
            # What the loader left in the allocator's cache is room for the weights.
            memory.empty_cache()
        return self._weights.restore(memory, threads)

    def offload(self) -> Offloaded:
        """Take the weights off the device."""
        return self._weights.offload() if self._weights else Offloaded(held_bytes=0)

    def release(self) -> None:
        """Give the host memory back."""
        if self._weights is not None:
            self._weights.release()


class PythonModel:
    """A model that the user's code made. ``find_root`` returns it once it exists."""

    def __init__(self, spec: ModelSpec, weights: Weights, find_root: Callable[[], object]) -> None:
        self._spec = spec
        self._find_root = find_root
        self.weights = weights
        root = find_root()
        # A model that does not exist yet may turn out to have any of them.
        self.tasks = frozenset(
            kind for kind in TaskKind if root is None or callable(getattr(root, kind.value, None))
        )
        self.inputs = _read_specs(getattr(root, "inputs", ()))
        self.outputs = _read_specs(getattr(root, "outputs", ()))

    def run(self, task: Task) -> TaskResult:
        """Call the method of the task's name. Raises BadInputError, and whatever it raises."""
        method: Any = getattr(self._find_root(), task.kind.value, None)
        if method is None:
            raise BadInputError(f"model {self._spec.name} has no method {task.kind.value}")
        parameters = dict(task.parameters)
        if task.kind is TaskKind.INFER:
            outputs: Mapping[str, Any] = method(
                {tensor.name: as_array(tensor) for tensor in task.tensors}, parameters
            )
            return TaskResult(tensors=[as_tensor(name, out) for name, out in outputs.items()])
        if task.kind is TaskKind.SPEECH:
            samples, rate_hertz = method(str(parameters.pop("input", "")), parameters)
            return TaskResult(
                values={"rate": int(rate_hertz)}, tensors=[as_tensor("audio", samples)]
            )
        audio = read_audio(task.tensors)
        found = method(audio, parameters)
        values = {"text": found} if isinstance(found, str) else dict(found)
        values.setdefault("language", parameters.get("language") or "")
        values.setdefault("duration", len(audio) / SAMPLE_RATE_HERTZ)
        values.setdefault("segments", [])
        return TaskResult(values=values)

    def forget(self) -> None:
        """Let the model drop its own caches, if it says that it can."""
        forget = getattr(self._find_root(), "forget", None)
        if callable(forget):
            # A scrub must go on whatever one model does.
            with contextlib.suppress(Exception):
                forget()


def _read_specs(declared: Any) -> tuple[TensorSpec, ...]:
    if not isinstance(declared, Iterable) or isinstance(declared, (str, bytes)):
        return ()
    return tuple(
        TensorSpec(name=str(name), datatype=str(datatype), shape=tuple(map(int, shape)))
        for name, datatype, shape in declared
    )
