"""What the supervisor asks of the processes that hold models: the seam between policy and memory.

Implemented by processes/ for real processes, and by a recording fake in tests/support. The
supervisor knows nothing else of torch, onnxruntime, CUDA, forks or shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from vram_agent.protocol import DeviceReport, LoadProgress, ModelSpec, ResidualSource

if TYPE_CHECKING:
    from vram_agent.parts import Parts


class TaskKind(StrEnum):
    """What a model can be asked to do."""

    TRANSCRIBE = "transcribe"
    TRANSLATE = "translate"
    SPEECH = "speech"
    INFER = "infer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A named array: OIP v2 datatype (``FP32``, ``INT64``, ``BYTES`` …), shape, raw data.

    ``data`` is little-endian and in C order; BYTES elements carry the four-byte length of the
    OIP binary extension. Audio is one FP32 tensor ``audio`` of shape [samples], 16 kHz mono,
    -1…1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, OIP datatype and shape of an input or output; -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One piece of work for one model. ``parameters`` are small and msgpack-able."""

    kind: TaskKind
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What a task gave. A transcription's ``values``: text, language, duration (seconds), and
    segments, a list of {id, start, end, text, tokens, temperature, avg_logprob,
    compression_ratio, no_speech_prob} (start and end in seconds).
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPart:
    """What is ready of a result before the rest. Of a transcription: ``text``, which goes on from
    the parts before; of speech: ``rate`` (hertz) and the tensor ``audio``.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in host memory: its size, what it can do and, for INFER, its signature.

    ``message`` says what was unusual about the load; empty for nothing.
    """

    name: str
    weight_bytes: int
    tasks: frozenset[TaskKind]
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """What collecting garbage and emptying caches gave back, in bytes of device memory."""

    before_bytes: int
    after_bytes: int

    @property
    def reclaimed_bytes(self) -> int:
        """What came back; 0 where other threads took more meanwhile."""
        return max(0, self.before_bytes - self.after_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A transition's measured effect. ``vram_bytes`` = what the model holds in VRAM afterwards;
    ``scrubbed``: of an offload, what the scrub after it gave back beyond the weights.
    """

    vram_bytes: int
    seconds: float
    message: str = ""
    scrubbed: Scrubbed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExit:
    """A process of a group ended without being asked to. ``signal`` is 0 for a plain exit."""

    group: str
    role: str  # "template" | "gpu"
    pid: int
    exit_code: int
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemory:
    """What a group's processes hold now, in bytes.

    ``device_bytes``: device memory of the GPU process (CPU device: its private anonymous memory);
    None where it cannot be known. ``live_tensor_bytes``/``allocator_cache_bytes``/``arena_bytes``
    are the GPU process's own figures from its last answer. ``host_bytes``: the shared arena.
    """

    device_bytes: int | None
    host_bytes: int
    live_tensor_bytes: int = 0
    allocator_cache_bytes: int = 0
    runtime_arena_bytes: int = 0
    context_bytes: int = 0


class GroupBackend(Protocol):
    """One model group: a template process, and at most one GPU process forked from it.

    The caller serialises the calls of one group, but for ``memory``, ``run`` of several models
    and ``close``. All but ``memory`` may take long and may be cancelled: a cancelled transition
    still runs to its end in the process and leaves a consistent state, which ``is_resident`` tells.
    """

    @property
    def template_pid(self) -> int | None:
        """Process id of the template; None while nothing is loaded."""
        ...

    @property
    def gpu_pid(self) -> int | None:
        """Process id of the GPU process; None in the Host and Disk tiers."""
        ...

    def is_resident(self, name: str) -> bool:
        """Whether the model's weights are wholly in VRAM now."""
        ...

    def progress(self, name: str) -> LoadProgress | None:
        """How far a load or restore of the model has come; None while there is none to tell of."""
        ...

    async def load(self, spec: ModelSpec) -> LoadedModel:
        """Bring the weights into host memory, starting the template if there is none.

        Idempotent. No GPU process of the group may live (end it first). Raises ModelFailedError
        with the loader's reason; nothing is kept then.
        """
        ...

    async def restore(self, name: str, device: str = "") -> Moved:
        """Bring a loaded model into VRAM, forking the GPU process if there is none. Idempotent.

        ``device``: UUID of the device that a new GPU process uses; empty: as the model's spec says.
        Raises ModelFailedError, NoVramError (the device is out of memory) or WorkerDiedError;
        the model is not resident then and holds no VRAM.
        """
        ...

    async def offload(self, name: str) -> Moved:
        """Take the weights out of VRAM and scrub; the GPU process lives on (PinnedHost)."""
        ...

    async def run(self, name: str, task: Task, parts: Parts | None = None) -> TaskResult:
        """Run a task on a resident model; tasks of a group run one after the other.

        With ``parts`` a model that can gives parts of its result as they are made; the result is
        then what they leave unsaid. Raises BadInputError, TaskFailedError or WorkerDiedError, after
        any number of parts. Cancelling gives up the answer; the task itself runs to its end, or, of
        abandoned parts, to its next part.
        """
        ...

    async def end_gpu(self) -> None:
        """End the GPU process: the Host tier. Idempotent; at once, whatever runs in it."""
        ...

    async def unload(self, name: str) -> None:
        """Drop a model from host memory: the Disk tier. Ends the GPU process of the group; ends
        the template with its last model. Idempotent.
        """
        ...

    async def scrub(self) -> Scrubbed:
        """Collect garbage and empty caches in the GPU process; nothing where there is none."""
        ...

    async def close(self) -> None:
        """End both processes. Idempotent; leaves no process and no shared memory behind."""
        ...

    def memory(self) -> GroupMemory:
        """Measure now; never blocks for long (reads /proc and the driver, not the processes)."""
        ...


class Backend(Protocol):
    """Makes groups and looks at the devices they share."""

    def open_group(self, group: str, on_exit: Callable[[ProcessExit], None]) -> GroupBackend:
        """Return a group that owns no process yet; ``on_exit`` is called on the event loop."""
        ...

    def devices(self) -> list[DeviceReport]:
        """Return the devices as they are now. Does not create a CUDA context."""
        ...

    def residual_source(self) -> ResidualSource:
        """Return how far the device figures can be attributed to this pod."""
        ...

    def device_baseline_bytes(self) -> int:
        """Device memory in use before this agent's first context; 0 on the CPU device."""
        ...
