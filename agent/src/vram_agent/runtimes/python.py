"""The runtime Python: any object that your own code makes.

Why it exists: models come in shapes that no library's loader knows. The object does the tasks whose
methods it has (docs/runtimes.md says which arguments and results); its weights are the torch
tensors found by walking from it. Imported by templates; it needs no torch. ``find_factory`` is for
the runtime Torch too.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from vram_agent.backend import Task, TaskKind, TaskResult, TensorSpec
from vram_agent.devices.base import DeviceMemory
from vram_agent.engine.arena import Arena
from vram_agent.engine.deferred import defer_sessions
from vram_agent.engine.rules import read_rules
from vram_agent.engine.weights import CombinedWeights, Offloaded, Weights
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.progress import step
from vram_agent.protocol import LoadStep, ModelSpec
from vram_agent.runtimes.arrays import SAMPLE_RATE_HERTZ, as_array, as_tensor, read_audio
from vram_agent.runtimes.base import (
    OBJECT,
    TENSORS,
    Emit,
    Option,
    Reference,
    check_options,
    one_of,
)
from vram_agent.runtimes.python_answers import (
    is_generator,
    one_by_one,
    read_speech,
    read_transcript,
)

FACTORY_OPTIONS = {
    "arguments": OBJECT.means("keyword arguments of the factory", "none"),
    "path": Option(
        lambda value: (
            isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        ),
        "a folder or a list of folders",
    ).means("folders put first on `sys.path`", "none"),
}
_OPTIONS = {
    **FACTORY_OPTIONS,
    "tensors": TENSORS,
    "loadsOn": one_of("cpu", "cuda").means(
        "`cuda` for code that insists on CUDA while it loads: the factory then runs in the GPU "
        "process at the first use, and the weights go with that process, so the model has the "
        "tiers PinnedHost and Disk only",
        "cpu",
    ),
}


class PythonRuntime:
    """Calls the user's factory."""

    reference = Reference(
        library="your own code, with torch or without",
        extra="torch, where the code uses it",
        sources=("`module:factory`; `factory(**arguments)` returns the model, any object",),
        tasks={
            TaskKind.INFER: "method `infer`: a dict of arrays in, a dict of arrays out",
            TaskKind.TRANSCRIBE: "method `transcribe`: 16 kHz mono in, a text or a dict out",
            TaskKind.TRANSLATE: "method `translate`, likewise",
            TaskKind.SPEECH: "method `speech`: a text in, samples and their rate out",
        },
        options=_OPTIONS,
        note="Parameters are passed to the method as they are.",
    )

    def load(self, spec: ModelSpec, arena: Arena) -> PythonModel:
        """Import the module and call the factory. Raises ModelFailedError."""
        check_options(spec, _OPTIONS)
        extend_path(spec)
        if spec.options.get("loadsOn") == "cuda":
            late = LateWeights(spec)
            return PythonModel(spec, late, lambda: late.root)
        root, weights = make_model(spec, arena)
        return PythonModel(spec, weights, lambda: root)


def extend_path(spec: ModelSpec) -> None:
    """Put the folders of ``options.path`` first on ``sys.path``, in their order."""
    paths = spec.options.get("path", [])
    for path in [paths] if isinstance(paths, str) else reversed(paths):
        if path not in sys.path:
            sys.path.insert(0, path)


def find_factory(spec: ModelSpec) -> Callable[..., Any]:
    """Return what ``module:factory`` names. Raises ModelFailedError."""
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
    if not callable(factory):
        raise ModelFailedError(f"model {spec.name}: {spec.source} is no function and no class")
    return factory  # type: ignore[no-any-return]


def call_factory(spec: ModelSpec, factory: Callable[..., Any]) -> Any:
    """Call the factory with ``options.arguments``. Raises ModelFailedError."""
    try:
        return factory(**spec.options.get("arguments", {}))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelFailedError(
            f"model {spec.name}: {spec.source} raised {type(error).__name__}: {error}"
        ) from error


def make_root(spec: ModelSpec) -> object:
    """Make the object. Raises ModelFailedError where it cannot do a task."""
    root: object = call_factory(spec, find_factory(spec))
    methods = {kind: getattr(root, kind.value, None) for kind in TaskKind}
    if not any(map(callable, methods.values())):
        raise ModelFailedError(
            f"model {spec.name}: {spec.source} returned a {type(root).__name__}, which has none of "
            f"the methods {', '.join(methods)}; give it one"
        )
    for kind, method in methods.items():
        if inspect.iscoroutinefunction(method):
            raise ModelFailedError(
                f"model {spec.name}: method {kind.value} is async, and the GPU process has no "
                f"event loop; make it a plain method, with asyncio.run inside where it needs one, "
                f"or an async generator"
            )
    return root


def make_model(spec: ModelSpec, arena: Arena) -> tuple[object, Weights]:
    """Return the object and what moves of it: torch tensors, and the ONNX sessions that it made.

    Raises ModelFailedError.
    """
    with defer_sessions(arena) as sessions:
        root = make_root(spec)
    parts: list[Weights] = list(sessions)
    if "torch" in sys.modules:
        from vram_agent.engine.torch import TorchWeights  # noqa: PLC0415 - images may lack torch

        parts.append(TorchWeights(root, arena, read_rules(spec.options.get("tensors", {}))))
    return root, CombinedWeights(parts)


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
            # An arena of this process alone: it goes when the process does.
            with step(LoadStep.READING):
                self.root, self._weights = make_model(self._spec, Arena(self._spec.name))
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
        return self._run(task, None)

    def run_in_parts(self, task: Task, emit: Emit) -> TaskResult:
        """The same, and give away what a generator yields as it comes."""
        return self._run(task, emit)

    def _run(self, task: Task, emit: Emit | None) -> TaskResult:
        method: Any = getattr(self._find_root(), task.kind.value, None)
        if method is None:
            raise BadInputError(f"model {self._spec.name} has no method {task.kind.value}")
        parameters = dict(task.parameters)
        if task.kind is TaskKind.INFER:
            found = method({tensor.name: as_array(tensor) for tensor in task.tensors}, parameters)
            # Of a mapping or of pairs, which a generator may yield.
            outputs: dict[str, Any] = dict(one_by_one(found) if is_generator(found) else found)
            return TaskResult(tensors=[as_tensor(name, out) for name, out in outputs.items()])
        if task.kind is TaskKind.SPEECH:
            return read_speech(method(str(parameters.pop("input", "")), parameters), emit)
        audio = read_audio(task.tensors)
        values = read_transcript(method(audio, parameters), emit)
        values.setdefault("language", parameters.get("language") or "")
        values.setdefault("duration", len(audio) / SAMPLE_RATE_HERTZ)
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
