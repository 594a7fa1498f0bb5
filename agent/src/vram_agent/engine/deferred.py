"""ONNX Runtime sessions that somebody else's code makes while a model loads.

Why it exists: wrappers such as funasr-onnx make sessions in their constructors, with options that
bloat (an exhaustive search of cuDNN's algorithms, an arena that doubles), and a template may hold
no session, whose threads would not survive the fork. So ``onnxruntime.InferenceSession`` is, in a
template, `DeferredSession`: it reads the model into the arena, answers what a file can answer, and
has a session with our options while its model is on the device. Called by runtimes/python.py. It
never imports onnxruntime: it takes effect when the model's code does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from vram_agent.engine.arena import Arena
from vram_agent.engine.onnx import OnnxWeights, SessionChoices, map_model
from vram_agent.engine.onnx_file import Signature, find_beside, read_signature
from vram_agent.errors import ModelFailedError

_MODULE = "onnxruntime"
_TYPES = {
    "FP32": "tensor(float)",
    "FP16": "tensor(float16)",
    "FP64": "tensor(double)",
    "BYTES": "tensor(string)",
}


@dataclass(slots=True)
class _Loading:
    """A load that is under way, and the sessions that it has made."""

    arena: Arena
    sessions: list[OnnxWeights] = field(default_factory=list)


class _Loads(threading.local):
    """The loads under way in a thread, the innermost last.

    By thread: in a process that embeds the agent, others may make sessions of their own meanwhile.
    """

    def __init__(self) -> None:
        self.stack: list[_Loading] = []


_loads = _Loads()


@contextmanager
def defer_sessions(arena: Arena) -> Iterator[list[OnnxWeights]]:
    """Have the sessions that are made inside of the block deferred; yields their weights.

    The caller owns the weights, also when the block raises. Sessions that are made outside of a
    block, such as by a task, are ONNX Runtime's own.
    """
    loading = _Loading(arena)
    _loads.stack.append(loading)
    finder = _Finder()
    if _MODULE in sys.modules:
        _replace_session(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, finder)
    try:
        yield loading.sessions
    finally:
        _loads.stack.pop()
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Replaces the session's class as soon as onnxruntime has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute: Callable[[ModuleType], None] = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _replace_session(module)

            loader.exec_module = exec_module
        return spec


def _replace_session(module: ModuleType) -> None:
    original: Any = module.InferenceSession
    if not issubclass(original, DeferredSession):
        made = type("InferenceSession", (DeferredSession,), {"original": original})
        module.InferenceSession = made  # type: ignore[attr-defined]


class DeferredSession:
    """What model code gets for ``onnxruntime.InferenceSession``.

    Device and options are the agent's; of the caller's options only the level of graph optimisation
    counts, and that it names no GPU provider: such a session stays on the CPU.
    """

    original: Callable[..., Any]
    """The class that this one stands in for."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Return a session of ONNX Runtime's own outside of a load."""
        if not _loads.stack:
            return cls.original(*args, **options)
        return super().__new__(cls)

    def __init__(
        self,
        path_or_bytes: Any,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        **_: Any,
    ) -> None:
        loading = _loads.stack[-1]
        self._providers = [one if isinstance(one, str) else one[0] for one in providers or ()]
        choices = SessionChoices(
            optimization=getattr(
                getattr(sess_options, "graph_optimization_level", None), "name", "ORT_ENABLE_ALL"
            ),
            is_on_host=bool(self._providers) and set(self._providers) == {"CPUExecutionProvider"},
        )
        if isinstance(path_or_bytes, bytes):
            self._signature = read_signature(memoryview(path_or_bytes))
            if self._signature.external_files:
                raise ModelFailedError(
                    "an ONNX model given as bytes keeps weights in files beside it; give its path"
                )
            self._weights = OnnxWeights(path_or_bytes, {}, loading.arena, choices)
        else:
            path = Path(path_or_bytes)
            self._signature = read_signature(map_model(path))
            external = {name: _find_external(path, name) for name in self._signature.external_files}
            self._weights = OnnxWeights(path, external, loading.arena, choices)
        loading.sessions.append(self._weights)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, Any],
        run_options: Any = None,  # noqa: ARG002 - the run's options are the agent's
    ) -> list[Any]:
        """Run the session. Raises RuntimeError while the model is off the device."""
        return self._weights.run_for(output_names or None, input_feed)

    def get_inputs(self) -> list[Any]:
        """Return the inputs, with name, type and shape; a free dimension is None."""
        return _describe(self._signature, self._signature.inputs)

    def get_outputs(self) -> list[Any]:
        """Return the outputs, likewise."""
        return _describe(self._signature, self._signature.outputs)

    def get_modelmeta(self) -> Any:
        """Return the file's own metadata."""
        return SimpleNamespace(custom_metadata_map=dict(self._signature.metadata))

    def get_providers(self) -> list[str]:
        """Return the session's providers; those that were asked for while there is none."""
        try:
            return list(self._weights.session.get_providers())
        except RuntimeError:
            return list(self._providers)

    def disable_fallback(self) -> None:
        """Do nothing: there is none."""

    def __getattr__(self, name: str) -> Any:
        """Return whatever else a session has, from the session. Raises RuntimeError without one."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._weights.session, name)


def _find_external(model: Path, name: str) -> Path:
    path = find_beside(model, name)
    if path is None:
        raise ModelFailedError(
            f"{model}: its weights lie in {name}, which is no file in {model.parent}; put it "
            f"beside the .onnx file"
        )
    return path


def _describe(signature: Signature, specs: Sequence[Any]) -> list[Any]:
    return [
        SimpleNamespace(
            name=spec.name,
            type=_TYPES.get(spec.datatype, f"tensor({spec.datatype.lower()})"),
            shape=[]
            if spec.name in signature.any_rank
            else [None if size < 0 else size for size in spec.shape],
        )
        for spec in specs
    ]
