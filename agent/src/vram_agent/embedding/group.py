"""Models of this very process as the supervisor drives them: `GroupBackend` and `Backend`.

Why it exists: the supervisor keeps the same account and policy whether a model lives in a process
of its own or beside the application's code. Here it is a group of its own without a template, like
a model that loads on CUDA: the "GPU process" is this one while the object exists, and leaving it
means Disk. Runs on the Manager's loop; what blocks goes to two worker threads, one that calls
factories and one that moves weights.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog
from msgspec.structs import replace

from vram_agent.backend import (
    GroupMemory,
    LoadedModel,
    Moved,
    ProcessExit,
    Scrubbed,
    Task,
    TaskKind,
    TaskResult,
)
from vram_agent.devices.base import Device, DeviceMemory, MemoryFigures
from vram_agent.embedding.model import EmbeddedModel
from vram_agent.embedding.uses import Uses
from vram_agent.embedding.worker import Worker
from vram_agent.engine.memory import open_shared_memory
from vram_agent.errors import ModelFailedError, NotResidentError
from vram_agent.parts import Parts
from vram_agent.processes.spawn import count_threads
from vram_agent.protocol import (
    DeviceKind,
    DeviceReport,
    LoadProgress,
    ModelSpec,
    ResidualSource,
)
from vram_agent.serial import Serial

FIRST_DEVICE = "0"
"""All models of a process are on the first device that it sees: code that embeds says "cuda"."""
T = TypeVar("T")
_log = structlog.get_logger("vram_agent.embed")


@dataclass(slots=True)
class Workers:
    """The threads that block, so that the loop does not."""

    factories: Worker = field(default_factory=lambda: Worker("vram-agent-load"))
    moves: Worker = field(default_factory=lambda: Worker("vram-agent-move"))


class EmbeddedGroup:
    """One model of this process; see `GroupBackend` for the contract."""

    template_pid: int | None = None

    def __init__(self, backend: EmbeddedBackend, model: EmbeddedModel) -> None:
        self._backend = backend
        self._model = model
        self._transitions = Serial()

    @property
    def gpu_pid(self) -> int | None:
        """The id of this process while the object exists."""
        return self._backend.pid if self._model.is_made else None

    @property
    def is_on_device(self) -> bool:
        """Whether the model's weights are on the device."""
        return self._model.vram_bytes is not None

    @property
    def vram_bytes(self) -> int:
        """What the model's weights hold on the device."""
        return self._model.vram_bytes or 0

    @property
    def stray_bytes(self) -> int:
        """Device memory that uses left on the model, as of its last offload."""
        return self._model.stray_bytes

    def is_resident(self, name: str) -> bool:  # noqa: ARG002 - a group has one model
        """Whether the model's weights are wholly on the device."""
        return self.is_on_device

    def progress(self, name: str) -> LoadProgress | None:  # noqa: ARG002 - the protocol's
        """Return None: the application's own factory tells nobody how far it is."""
        return None

    async def load(self, spec: ModelSpec) -> LoadedModel:
        """Say what there is: the factory is called by ``restore``, once room was reserved."""
        return LoadedModel(name=spec.name, weight_bytes=0, tasks=frozenset({TaskKind.INFER}))

    async def restore(self, name: str, device: str = "") -> Moved:  # noqa: ARG002 - one of each
        """Bring the model onto the device; call its factory first if there is no object."""
        return await self._transitions.run(self._restore)

    async def offload(self, name: str) -> Moved:  # noqa: ARG002 - a group has one model
        """Take the weights off the device and scrub; the object stays."""
        return await self._transitions.run(lambda: self._move(self._model.offload))

    async def scrub(self) -> Scrubbed:
        """Collect garbage and empty caches."""
        before_bytes, after_bytes = await self._transitions.run(
            lambda: self._move(self._model.scrub)
        )
        return Scrubbed(before_bytes=before_bytes, after_bytes=after_bytes)

    async def unload(self, name: str) -> None:  # noqa: ARG002 - a group has one model
        """Drop the object."""
        await self._transitions.run(self._drop)

    async def end_gpu(self) -> None:
        """Drop the object: there is no process to end."""
        await self._transitions.run(self._drop)

    async def close(self) -> None:
        """Drop the object, but for one in use: whoever has it keeps it, and its memory."""
        await self._transitions.run(self._drop)
        self._backend.forget_group(self)

    async def run(
        self,
        name: str,
        task: Task,
        parts: Parts | None = None,  # noqa: ARG002 - a use gives nothing back
    ) -> TaskResult:
        """Hand the object to whoever waits with this task; return when nobody uses it any more."""
        if not self.is_on_device:
            raise NotResidentError(
                f"model {name} left the device before the use began", retry_after_seconds=1
            )
        await self._backend.uses.hold(name, self._model.value, task)
        return TaskResult()

    def memory(self) -> GroupMemory:
        """Measure now. What the process holds as a whole is said by one group, once."""
        is_spokesman = self._backend.find_spokesman() is self
        figures = self._backend.figures() if is_spokesman else MemoryFigures()
        return GroupMemory(
            device_bytes=self._backend.measure_device_bytes() if is_spokesman else 0,
            host_bytes=self._model.host_bytes,
            live_tensor_bytes=figures.live_tensor_bytes,
            allocator_cache_bytes=figures.allocator_cache_bytes,
            runtime_arena_bytes=figures.runtime_arena_bytes,
            context_bytes=figures.context_bytes,
        )

    async def _restore(self) -> Moved:
        loop = asyncio.get_running_loop()
        began = loop.time()
        memory = await self._backend.ensure_memory()
        notes = ""
        if not self._model.is_made:
            make = self._model.make
            notes = await self._backend.workers.factories.run(lambda: make(memory))
        moved = await self._move(lambda opened: self._model.restore(opened, self._backend.threads))
        return Moved(
            vram_bytes=moved.vram_bytes,
            seconds=loop.time() - began,
            message="; ".join(filter(None, (notes, moved.message))),
        )

    async def _drop(self) -> None:
        if not self._model.is_made or self._backend.uses.count(self._model.name):
            return
        words = await self._move(self._model.drop)
        if words:
            _log.warning("not all dropped", model=self._model.name, message=words)

    async def _move(self, work: Callable[[DeviceMemory], T]) -> T:
        memory = await self._backend.ensure_memory()
        return await self._backend.workers.moves.run(lambda: work(memory))


class EmbeddedBackend:
    """The models of this process, and the devices as seen from it. Make it before any CUDA call."""

    def __init__(self, device: Device) -> None:
        self.pid = os.getpid()
        self.workers = Workers()
        self.threads = count_threads(os.environ)
        self.factories: dict[str, Callable[[], object]] = {}
        self.uses: Uses
        self._device = device
        self._placement = device.place(FIRST_DEVICE)
        self._is_cpu = self._placement.kind is DeviceKind.CPU
        self._own_before_bytes = (device.process_bytes(self.pid) or 0) if self._is_cpu else 0
        self._groups: list[EmbeddedGroup] = []
        self._memory: DeviceMemory | None = None
        self._opening = asyncio.Lock()

    def open_group(self, group: str, on_exit: Callable[[ProcessExit], None]) -> EmbeddedGroup:  # noqa: ARG002 - no process ends
        """Return the group of one model; nothing is loaded yet."""
        opened = EmbeddedGroup(self, EmbeddedModel(group, self.factories[group]))
        self._groups.append(opened)
        return opened

    def forget_group(self, group: EmbeddedGroup) -> None:
        """Take note that a group was closed. Idempotent."""
        if group in self._groups:
            self._groups.remove(group)

    def devices(self) -> list[DeviceReport]:
        """Return the one device; on the CPU, what this process took since it was made."""
        uuid = self._placement.uuid
        reports = [one for one in self._device.reports({self.pid: uuid}) if one.uuid == uuid]
        if not self._is_cpu:
            return reports
        return [replace(one, used_bytes=self._beyond_start(one.used_bytes)) for one in reports]

    def residual_source(self) -> ResidualSource:
        """Return how far the device figures are this process's."""
        return self._device.residual_source()

    def device_baseline_bytes(self) -> int:
        """Return what was in use on the device when this was made."""
        return sum(one.baseline_bytes for one in self.devices())

    def find_spokesman(self) -> EmbeddedGroup | None:
        """Return the group that reports what the process holds: one with a resident model first.

        A group without one may be ended to get its context back, and there is none to get.
        """
        return min(self._groups, key=lambda group: not group.is_on_device, default=None)

    def measure_device_bytes(self) -> int | None:
        """Return what the process holds; None on CUDA, where the driver speaks for the device."""
        if not self._is_cpu:
            return None
        return self._beyond_start(self._device.process_bytes(self.pid) or 0)

    def figures(self) -> MemoryFigures:
        """Return the process's own figures; nothing before the device was opened."""
        if self._memory is None:
            return MemoryFigures()
        figures = self._memory.figures(
            sum(group.vram_bytes for group in self._groups),
            sum(group.stray_bytes for group in self._groups),
        )
        # On the CPU what the process held before is no part of what it reports.
        return replace(figures, context_bytes=0) if self._is_cpu else figures

    async def ensure_memory(self) -> DeviceMemory:
        """Open the device, once: on CUDA this makes the context.

        Raises ModelFailedError where it cannot be used.
        """
        async with self._opening:
            if self._memory is None:
                try:
                    self._memory = await self.workers.moves.run(
                        lambda: open_shared_memory(self._placement, self._is_shared)
                    )
                except Exception as error:
                    raise ModelFailedError(
                        f"device {self._placement.uuid} cannot be used: {error}; check the driver "
                        f"and that the process may use the device"
                    ) from error
            return self._memory

    def _is_shared(self) -> bool:
        """A use can only begin on a model that is on the device already."""
        return any(group.is_on_device for group in self._groups)

    def _beyond_start(self, used_bytes: int) -> int:
        return max(0, used_bytes - self._own_before_bytes)
