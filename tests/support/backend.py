"""A recording fake of the process backend: scripted sizes, delays, failures and deaths.

Why it exists: the supervisor is tested against every order of events without a process. It keeps
the contract of ``vram_agent.backend``: what it cannot do in a state, it refuses loudly, so that a
supervisor that breaks the contract fails its test. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

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
from vram_agent.errors import NotResidentError, WorkerDiedError
from vram_agent.parts import Parts
from vram_agent.protocol import DeviceKind, DeviceReport, LoadProgress, ModelSpec, ResidualSource

GIB = 1 << 30
CONTEXT_BYTES = 100 << 20


class ContractError(AssertionError):
    """The supervisor broke a rule of GroupBackend."""


@dataclass
class Script:
    """What the next calls do. Keys are (call, model) or (call, ""), for any model."""

    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[tuple[str, str], deque[Exception]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    weights: dict[str, int] = field(default_factory=dict)
    vram: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    progress: dict[str, LoadProgress] = field(default_factory=dict)
    scrubbed: Scrubbed = field(default_factory=lambda: Scrubbed(before_bytes=2, after_bytes=1))

    def fail(self, call: str, model: str, *errors: Exception) -> None:
        self.failures[(call, model)].extend(errors)

    def take_failure(self, call: str, model: str) -> Exception | None:
        for key in ((call, model), (call, "")):
            if self.failures[key]:
                return self.failures[key].popleft()
        return None


class FakeGroup:
    """One group's processes."""

    def __init__(
        self, backend: FakeBackend, group: str, on_exit: Callable[[ProcessExit], None]
    ) -> None:
        self.backend = backend
        self.group = group
        self.on_exit = on_exit
        self.loaded: dict[str, LoadedModel] = {}
        self.pinned: set[str] = set()
        self.resident: dict[str, int] = {}
        self.template_pid: int | None = None
        self.gpu_pid: int | None = None
        self.is_closed = False
        self.device = 0
        self.transitions = 0
        self.runs = 0
        self.died = asyncio.Event()

    def is_resident(self, name: str) -> bool:
        return self.gpu_pid is not None and name in self.resident

    def progress(self, name: str) -> LoadProgress | None:
        return self.backend.script.progress.get(name)

    async def load(self, spec: ModelSpec) -> LoadedModel:
        if self.gpu_pid is not None:
            raise ContractError("load while a GPU process lives")
        async with self._transition("load", spec.name):
            weights = self.backend.script.weights.get(spec.name, GIB)
            self.template_pid = self.template_pid or next(self.backend.pids)
            self.loaded[spec.name] = LoadedModel(
                name=spec.name,
                weight_bytes=weights,
                tasks=frozenset({TaskKind.INFER}),
                message=self.backend.script.messages.get(spec.name, ""),
            )
            return self.loaded[spec.name]

    async def restore(self, name: str, device: str = "") -> Moved:
        if name not in self.loaded:
            raise ContractError(f"restore of {name}, which is not loaded")
        index = int(device.rpartition("-")[2] or 0)
        if self.gpu_pid is not None and index != self.device:
            raise ContractError(f"restore of {name} to another device than its GPU process's")
        self.device = index
        async with self._transition("restore", name):
            self.gpu_pid = self.gpu_pid or next(self.backend.pids)
            vram = self.backend.script.vram.get(name, self.loaded[name].weight_bytes)
            self.resident[name] = vram
            self.pinned.discard(name)
            self.backend.note_peak()
            return Moved(vram_bytes=vram, seconds=0.1)

    async def offload(self, name: str) -> Moved:
        if self.runs:
            raise ContractError(f"offload of {name} while a task runs")
        async with self._transition("offload", name):
            self.resident.pop(name, None)
            self.pinned.add(name)
            return Moved(vram_bytes=0, seconds=0.1, scrubbed=self.backend.script.scrubbed)

    async def run(self, name: str, task: Task, parts: Parts | None = None) -> TaskResult:
        if not self.is_resident(name):
            raise NotResidentError(f"{name} is not resident")
        if self.transitions:
            raise ContractError(f"run of {name} during a transition")
        self.backend.record("run", name)
        self.runs += 1
        died = self.died
        try:
            seconds = float(task.parameters.get("seconds", self._seconds("run")))
            try:
                async with asyncio.timeout(seconds):
                    await died.wait()
            except TimeoutError:
                pass
            else:
                raise WorkerDiedError(f"the GPU process of {name} died")
            if error := self.backend.script.take_failure("run", name):
                if isinstance(error, WorkerDiedError):
                    self.kill_gpu()
                raise error
            return TaskResult(values={"model": name, **task.parameters})
        finally:
            self.runs -= 1

    async def end_gpu(self) -> None:
        self._die()
        async with self._transition("end_gpu", self.group):
            self.gpu_pid = None
            self.resident.clear()
            self.pinned.clear()

    async def unload(self, name: str) -> None:
        self._die()
        async with self._transition("unload", name):
            self.gpu_pid = None
            self.resident.clear()
            self.pinned.clear()
            self.loaded.pop(name, None)
            if not self.loaded:
                self.template_pid = None

    async def scrub(self) -> Scrubbed:
        async with self._transition("scrub", self.group):
            return self.backend.script.scrubbed

    async def close(self) -> None:
        self._die()
        self.is_closed = True
        self.template_pid = self.gpu_pid = None
        self.loaded.clear()
        self.resident.clear()
        self.backend.record("close", self.group)

    def memory(self) -> GroupMemory:
        device = sum(self.resident.values()) + (CONTEXT_BYTES if self.gpu_pid else 0)
        return GroupMemory(
            device_bytes=device,
            host_bytes=sum(m.weight_bytes for m in self.loaded.values()),
            context_bytes=CONTEXT_BYTES if self.gpu_pid else 0,
        )

    def kill_gpu(self, signal: int = 9) -> None:
        """The GPU process ends unasked."""
        pid, self.gpu_pid = self.gpu_pid, None
        self.resident.clear()
        self.pinned.clear()
        self._die()
        if pid is not None:
            self._tell("gpu", pid, signal)

    def kill_template(self, signal: int = 9) -> None:
        """The template ends unasked, and its child with it."""
        pid, self.template_pid = self.template_pid, None
        self.loaded.clear()
        self.kill_gpu(signal)
        if pid is not None:
            self._tell("template", pid, signal)

    def _tell(self, role: str, pid: int, signal: int) -> None:
        self.on_exit(
            ProcessExit(group=self.group, role=role, pid=pid, exit_code=-signal, signal=signal)
        )

    def _die(self) -> None:
        self.died.set()
        self.died = asyncio.Event()

    def _seconds(self, call: str) -> float:
        return self.backend.script.seconds.get(call, 0.0)

    def _transition(self, call: str, model: str) -> _Transition:
        return _Transition(self, call, model)


class _Transition:
    """One transition at a time; a scripted delay, then a scripted failure."""

    def __init__(self, group: FakeGroup, call: str, model: str) -> None:
        self.group, self.call, self.model = group, call, model

    async def __aenter__(self) -> None:
        group = self.group
        if group.is_closed:
            raise ContractError(f"{self.call} on a closed group")
        if group.transitions and self.call != "end_gpu":
            raise ContractError(f"{self.call} of {self.model} during another transition")
        group.backend.record(self.call, self.model)
        group.transitions += 1
        try:
            await self._pass_time()
        except BaseException:
            group.transitions -= 1
            raise

    async def _pass_time(self) -> None:
        group = self.group
        died = group.died
        if seconds := group._seconds(self.call):
            try:
                async with asyncio.timeout(seconds):
                    await died.wait()
            except TimeoutError:
                pass
            else:
                raise WorkerDiedError(f"a process died during {self.call} of {self.model}")
        if error := group.backend.script.take_failure(self.call, self.model):
            raise error

    async def __aexit__(self, *_: object) -> None:
        self.group.transitions -= 1


class FakeBackend:
    """Makes fake groups on devices with scripted figures."""

    def __init__(self, total_bytes: int = 100 * GIB, devices: int = 1) -> None:
        self.script = Script()
        self.groups: dict[str, FakeGroup] = {}
        self.calls: list[tuple[str, str]] = []
        self.pids = itertools.count(1000)
        self.totals = [total_bytes] * devices
        self.kind = DeviceKind.CPU
        self.foreign_bytes = 0
        self.baselines: dict[int, int] = {}
        self.later_bytes: dict[int, int] = {}
        self.peak_bytes = 0
        self.source = ResidualSource.PROCESS

    def open_group(self, group: str, on_exit: Callable[[ProcessExit], None]) -> FakeGroup:
        self.groups[group] = FakeGroup(self, group, on_exit)
        return self.groups[group]

    def devices(self) -> list[DeviceReport]:
        used = [
            self.foreign_bytes + self.baselines.get(n, 0) + self.later_bytes.get(n, 0)
            for n in range(len(self.totals))
        ]
        for group in self.groups.values():
            used[group.device] += group.memory().device_bytes or 0
        return [
            DeviceReport(
                uuid=f"FAKE-{index}",
                index=index,
                kind=self.kind,
                total_bytes=total_bytes,
                used_bytes=used[index],
                exclusive=self.source is not ResidualSource.SELF,
                baseline_bytes=self.baselines.get(index, 0),
            )
            for index, total_bytes in enumerate(self.totals)
        ]

    def residual_source(self) -> ResidualSource:
        return self.source

    def device_baseline_bytes(self) -> int:
        return sum(self.baselines.values())

    def record(self, call: str, model: str) -> None:
        self.calls.append((call, model))

    def note_peak(self) -> None:
        held = sum(sum(g.resident.values()) for g in self.groups.values())
        self.peak_bytes = max(self.peak_bytes, held)

    def count(self, call: str, model: str | None = None) -> int:
        return sum(1 for c, m in self.calls if c == call and model in (None, m))
