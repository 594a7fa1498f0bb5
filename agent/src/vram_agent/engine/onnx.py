"""ONNX Runtime sessions that begin and end with a model's time on the device.

Why it exists: a session cannot move: it is made from the model's bytes in the arena, and torn down
to the last reference, since what still refers to it keeps its arena. Called by runtimes/onnx.py (to
hold the bytes) and processes/gpu.py (restore, offload). The only module that imports onnxruntime,
and only in a GPU process.

The options, with what they prevent (microsoft/onnxruntime): no exhaustive search of cuDNN's
algorithms (#7612: 5.0 instead of 0.6 GB), no largest workspace (#20712), no arena that doubles, and
weights outside of the arena, so that it can shrink to nothing after a run.
"""

from __future__ import annotations

import gc
import mmap
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vram_agent.devices.base import DeviceMemory
from vram_agent.engine.arena import Arena, Region
from vram_agent.engine.onnx_file import BrokenOnnxError
from vram_agent.engine.weights import Offloaded
from vram_agent.errors import ModelFailedError
from vram_agent.progress import CHUNK_BYTES, advance, step
from vram_agent.protocol import DeviceKind, LoadStep

_CUDA_PROVIDER = "CUDAExecutionProvider"
_CPU_PROVIDER = "CPUExecutionProvider"
_CUDA_OPTIONS = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "0",
}
_LOG_ERRORS = 3


@dataclass(frozen=True, slots=True)
class SessionChoices:
    """What a user may choose of a session.

    ``gpu_mem_limit_bytes`` 0: no limit of the arena. ``is_on_host``: it runs on the CPU and takes
    no VRAM, whatever the device.
    """

    optimization: str = "ORT_ENABLE_ALL"
    gpu_mem_limit_bytes: int = 0
    is_on_host: bool = False


class OnnxWeights:
    """A model's files in the arena and, while it is on the device, its session."""

    notes = ""
    stray_bytes = 0

    def __init__(
        self,
        model: Path | bytes,
        external_files: Mapping[str, Path],
        arena: Arena,
        choices: SessionChoices,
    ) -> None:
        """Read the files, or take the bytes, into the arena. Raises OSError."""
        files = [*external_files.values(), *([] if isinstance(model, bytes) else [model])]
        with step(LoadStep.READING, sum(path.stat().st_size for path in files)):
            if isinstance(model, bytes):
                self._model = _take_bytes(model, arena)
            else:
                self._model = _read_file(model, arena)
            self._external = {
                name: _read_file(path, arena) for name, path in external_files.items()
            }
        self._choices = choices
        self._session: Any = None
        self._run_options: Any = None
        self._vram_bytes = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files."""
        return sum(region.nbytes for region in (self._model, *self._external.values()))

    def content(self) -> memoryview:
        """Return the model's bytes, without a copy. Release the view when done."""
        return memoryview(self._model.buffer)[: self._model.nbytes]

    def restore(self, memory: DeviceMemory, threads: int) -> int:
        """Make the session; return the device memory it took, as measured. Idempotent.

        Raises ModelFailedError where CUDA is meant and this build of ONNX Runtime would quietly
        use the CPU.
        """
        if self._session is not None:
            return self._vram_bytes
        import onnxruntime  # noqa: PLC0415 - not in the template: it may start threads

        before_bytes = memory.used_bytes()
        is_cuda = memory.placement.kind is not DeviceKind.CPU and not self._choices.is_on_host
        if is_cuda and _CUDA_PROVIDER not in onnxruntime.get_available_providers():
            raise ModelFailedError(
                "this onnxruntime is built for the CPU only; install onnxruntime-gpu in the image, "
                "and not onnxruntime beside it"
            )
        options = self._session_options(onnxruntime, threads)
        providers: list[Any] = [_CPU_PROVIDER]
        if is_cuda:
            providers.insert(0, (_CUDA_PROVIDER, self._cuda_options()))
        else:
            # What malloc gets back it can give to the system; an arena would keep it.
            options.enable_cpu_mem_arena = False
        with step(LoadStep.BUILDING_SESSION), self.content() as content:
            # A protobuf message has less than 2 GiB; ONNX Runtime takes bytes and nothing like it.
            session = onnxruntime.InferenceSession(bytes(content), options, providers=providers)
        # It keeps the bytes for a fallback that is switched off here.
        session._model_bytes = None  # noqa: SLF001 - no public way gives them back
        if is_cuda and session.get_providers()[0] != _CUDA_PROVIDER:
            raise ModelFailedError(
                f"ONNX Runtime fell back to {session.get_providers()[0]}; check that the image has "
                f"the CUDA and cuDNN libraries that onnxruntime-gpu was built for"
            )
        session.disable_fallback()
        self._run_options = onnxruntime.RunOptions()
        if is_cuda:
            # A run option: as a session option it does nothing (microsoft/onnxruntime#22297).
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        self._session = session
        self._vram_bytes = max(0, memory.used_bytes() - before_bytes)
        return self._vram_bytes

    def _session_options(self, onnxruntime: Any, threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, self._choices.optimization
        )
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._external:
            regions = self._external.values()
            options.add_external_initializers_from_files_in_memory(
                list(self._external),
                [memoryview(region.buffer)[: region.nbytes] for region in regions],
                [region.nbytes for region in regions],
            )
        return options

    def _cuda_options(self) -> dict[str, str]:
        if not self._choices.gpu_mem_limit_bytes:
            return _CUDA_OPTIONS
        return {**_CUDA_OPTIONS, "gpu_mem_limit": str(self._choices.gpu_mem_limit_bytes)}

    @property
    def session(self) -> Any:
        """The session. Raises RuntimeError while there is none."""
        if self._session is None:
            raise RuntimeError("the model is not on the device")
        return self._session

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the session; return its outputs by name. Raises RuntimeError without a session."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.run_for(names, feeds), strict=True))

    def run_for(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """Run the session; return the outputs of these names, all for None, in their order."""
        values: list[Any] = self.session.run(names, dict(feeds), self._run_options)
        return values

    def offload(self) -> Offloaded:
        """Drop the session, and prove that it is gone; else say what holds it."""
        if self._session is None:
            return Offloaded(held_bytes=0)
        gone = weakref.ref(self._session)
        held_bytes, self._vram_bytes = self._vram_bytes, 0
        self._session = self._run_options = None
        gc.collect()
        holders = _name_holders(gone)
        if not holders:
            return Offloaded(held_bytes=0)
        return Offloaded(
            held_bytes=held_bytes, message=f"the session is still held by {', '.join(holders)}"
        )

    def release(self) -> None:
        """Give the arena's pages back."""
        for region in (self._model, *self._external.values()):
            region.release()


def _name_holders(gone: weakref.ref[Any]) -> list[str]:
    session = gone()
    if session is None:
        return []
    return sorted(
        f"{type(holder).__module__}.{type(holder).__qualname__}"
        for holder in gc.get_referrers(session)
        if not isinstance(holder, types.FrameType)
    ) or ["something outside of Python"]


def map_model(path: Path) -> memoryview:
    """Return a file's bytes without reading them yet. Raises OSError and BrokenOnnxError."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise BrokenOnnxError("it is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _take_bytes(model: bytes, arena: Arena) -> Region:
    region = arena.allocate(len(model))
    region.buffer[: len(model)] = model
    return region


def _read_file(path: Path, arena: Arena) -> Region:
    with path.open("rb") as file:
        size = path.stat().st_size
        region = arena.allocate(size)
        with memoryview(region.buffer) as view:
            at = 0
            while at < size:
                count = file.readinto(view[at : min(at + CHUNK_BYTES, size)])
                if not count:
                    raise OSError(f"{path} became shorter while it was read")
                at += count
                advance(count)
    return region
