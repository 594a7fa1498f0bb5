"""Model groups as the supervisor drives them: `GroupBackend` and `Backend` for real processes.

Why it exists: it turns the supervisor's wishes (load, restore, run, offload …) into a template, a
GPU process and messages to them, and keeps that true when any of them is killed at any time. Runs
on the supervisor's event loop, starts no threads, and imports neither torch, numpy nor onnxruntime.

Transitions are done one at a time, and to their end: cancelling the caller gives up the answer,
never the transition. What was loaded and not unloaded is remembered by its spec, so a
template that died comes back with the next call that needs it.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from vram_agent.backend import (
    GroupMemory,
    LoadedModel,
    Moved,
    ProcessExit,
    Scrubbed,
    Task,
    TaskResult,
)
from vram_agent.devices.base import Device, MemoryFigures
from vram_agent.errors import (
    AgentError,
    ModelFailedError,
    NotResidentError,
    TaskCancelledError,
    WorkerDiedError,
)
from vram_agent.parts import Parts
from vram_agent.processes.channel import close_fds
from vram_agent.processes.child import Child, ChildDiedError, OnInterim
from vram_agent.processes.interim import Delivery, LoadNotes
from vram_agent.processes.linux import adopt_orphans
from vram_agent.processes.messages import (
    Become,
    Done,
    Failure,
    Load,
    Loaded,
    MovedTo,
    Offload,
    Ran,
    Reply,
    Request,
    Restore,
    Run,
    Scrub,
    ScrubbedTo,
    Unload,
    pack_tensors,
    read_failure,
    unpack_tensors,
)
from vram_agent.processes.pair import TEMPLATE, ProcessPair
from vram_agent.processes.spawn import build_environment, count_threads
from vram_agent.protocol import DeviceReport, LoadProgress, LoadStep, ModelSpec, ResidualSource
from vram_agent.serial import Serial

T = TypeVar("T")


def _is_same_model(one: ModelSpec, other: ModelSpec) -> bool:
    return (one.runtime, one.source, one.options) == (other.runtime, other.source, other.options)


async def _ask(child: Child, request: Request, on_interim: OnInterim | None = None) -> Reply:
    """Call and close the answer's descriptors; a Failure is raised as the error it stands for."""
    reply, received = await child.call(request, on_interim=on_interim)
    close_fds(received)
    if isinstance(reply, Failure):
        raise read_failure(reply)
    return reply


class ProcessGroup:
    """One template and at most one GPU process; see `GroupBackend` for the contract."""

    def __init__(
        self,
        group: str,
        device: Device,
        environment: dict[str, str],
        on_exit: Callable[[ProcessExit], None],
    ) -> None:
        self._group = group
        self._device = device
        self._transitions = Serial()
        self._runs = Serial()
        self._specs: dict[str, ModelSpec] = {}
        self._loaded: dict[str, LoadedModel] = {}
        self._resident: dict[str, int] = {}
        self._pair = ProcessPair(group, environment, on_exit, self._forget_process)
        self._figures = MemoryFigures()
        self._notes = LoadNotes()
        self._streams = 0
        self._arena_bytes = 0
        self._own_arena_bytes = 0
        self.gpu_device = ""

    # --- what is -------------------------------------------------------------------------------

    @property
    def template_pid(self) -> int | None:
        """Process id of the template."""
        return self._pair.template.pid if self._pair.template else None

    @property
    def gpu_pid(self) -> int | None:
        """Process id of the GPU process."""
        return self._pair.gpu.pid if self._pair.gpu else None

    def is_resident(self, name: str) -> bool:
        """Whether the model is wholly in VRAM, of a process that lives."""
        return self._pair.gpu is not None and self._pair.gpu.is_alive and name in self._resident

    def memory(self) -> GroupMemory:
        """Measure now, from outside of the processes."""
        device_bytes = self._device.process_bytes(self._pair.gpu.pid) if self._pair.gpu else 0
        return GroupMemory(
            device_bytes=device_bytes,
            host_bytes=self._arena_bytes + self._own_arena_bytes,
            live_tensor_bytes=self._figures.live_tensor_bytes,
            allocator_cache_bytes=self._figures.allocator_cache_bytes,
            runtime_arena_bytes=self._figures.runtime_arena_bytes,
            context_bytes=self._figures.context_bytes,
        )

    def progress(self, name: str) -> LoadProgress | None:
        """What the process that loads or restores the model has told last."""
        return self._notes.of(name)

    # --- what changes --------------------------------------------------------------------------

    async def load(self, spec: ModelSpec) -> LoadedModel:
        """Load into the template, starting it if there is none."""
        return await self._told(lambda: self._load(spec))

    async def restore(self, name: str, device: str = "") -> Moved:
        """Bring a model into VRAM, making the GPU process if there is none."""
        return await self._told(lambda: self._restore(name, device))

    async def offload(self, name: str) -> Moved:
        """Take a model out of VRAM; the GPU process lives on."""
        return await self._transitions.run(lambda: self._offload(name))

    async def scrub(self) -> Scrubbed:
        """Empty the GPU process's caches."""
        return await self._transitions.run(self._scrub)

    async def unload(self, name: str) -> None:
        """Drop a model; the GPU process ends at once, the template with its last model."""
        self._pair.kill_gpu()
        await self._transitions.run(lambda: self._unload(name))

    async def end_gpu(self) -> None:
        """Kill the GPU process and wait until it is gone."""
        self._pair.kill_gpu()
        await self._transitions.run(self._pair.end_gpu)

    async def close(self) -> None:
        """Kill both processes and wait until they are gone."""
        self._pair.close()
        await self._transitions.run(self._close)

    async def run(self, name: str, task: Task, parts: Parts | None = None) -> TaskResult:
        """Run a task; tasks of the group run one after the other."""
        return await self._runs.run(lambda: self._run(name, task, parts))

    async def _told(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Make a transition that tells how far it is."""

        async def noted() -> T:
            try:
                return await work()
            finally:
                self._notes.clear()

        return await self._transitions.run(noted)

    # --- the transitions, one at a time --------------------------------------------------------

    async def _load(self, spec: ModelSpec) -> LoadedModel:
        """Load a model.

        1. It is loaded, from this source with these options: nothing to do.
        2. A GPU process lives: the caller's error; it would not have the new model.
        3. An older spec of it is loaded: dropped first.
        4. Loaded into the template; if that fails and holds nothing else, the template ends too.
        """
        if spec.name in self._loaded and _is_same_model(self._specs[spec.name], spec):
            self._specs[spec.name] = spec
            return self._loaded[spec.name]
        if self._pair.gpu is not None:
            raise RuntimeError(f"group {self._group}: end the GPU process before a load")
        if spec.name in self._loaded:
            await self._unload(spec.name)
        self._specs[spec.name] = spec
        try:
            return await self._load_into_template(spec)
        except BaseException:
            self._specs.pop(spec.name, None)
            if not self._loaded:
                await self._pair.end_template()
            raise

    async def _load_into_template(self, spec: ModelSpec) -> LoadedModel:
        template = self._pair.ensure_template()
        try:
            reply = await _ask(template, Load(spec=spec), self._notes.listen(spec.name))
        except ChildDiedError as error:
            raise ModelFailedError(
                f"model {spec.name}: the template that loaded {spec.source} died ({error}); if "
                f"memory is out, give the container more"
            ) from error
        assert isinstance(reply, Loaded)  # noqa: S101 - what a template answers
        self._arena_bytes = reply.arena_bytes
        self._loaded[spec.name] = reply.as_model(spec.name)
        return self._loaded[spec.name]

    async def _restore(self, name: str, device: str) -> Moved:
        """Bring a model into VRAM.

        1. It is there: nothing to do.
        2. There is no GPU process: what the group remembers is loaded again if the template died,
           and a GPU process is made.
        3. The GPU process restores it; if that fails, a process made for it ends too.
        """
        if self.is_resident(name):
            return Moved(vram_bytes=self._resident[name], seconds=0.0)
        if name not in self._specs:
            raise ModelFailedError(f"model {name} is not loaded; load it first")
        began = asyncio.get_running_loop().time()
        is_new = self._pair.gpu is None
        message = ""
        try:
            if self._pair.gpu is None:
                self._notes.begin(name, LoadStep.STARTING_PROCESS)
                message = await self._make_gpu_process(name, device or self._specs[name].device)
            assert self._pair.gpu is not None  # noqa: S101 - it was just made
            reply = await _ask(self._pair.gpu, Restore(name=name), self._notes.listen(name))
        except ChildDiedError as error:
            await self._pair.end_gpu()
            raise WorkerDiedError(
                f"model {name}: {error} while the model was restored; try again",
                retry_after_seconds=1,
            ) from error
        except AgentError:
            if is_new:
                await self._pair.end_gpu()
            raise
        assert isinstance(reply, MovedTo)  # noqa: S101 - what a GPU process answers
        self._resident[name] = reply.vram_bytes
        self._figures = reply.figures
        seconds = asyncio.get_running_loop().time() - began
        words = "; ".join(filter(None, (message, reply.message)))
        return Moved(vram_bytes=reply.vram_bytes, seconds=seconds, message=words)

    async def _offload(self, name: str) -> Moved:
        if self._pair.gpu is None or name not in self._resident:
            return Moved(vram_bytes=0, seconds=0.0)
        try:
            reply = await _ask(self._pair.gpu, Offload(name=name))
        except ChildDiedError as error:
            await self._pair.end_gpu()
            return Moved(vram_bytes=0, seconds=0.0, message=f"{error} before the offload")
        assert isinstance(reply, MovedTo)  # noqa: S101 - what a GPU process answers
        self._resident.pop(name, None)
        self._figures = reply.figures
        before_bytes, after_bytes = reply.scrubbed_bytes or (0, 0)
        return Moved(
            vram_bytes=reply.vram_bytes,
            seconds=reply.seconds,
            message=reply.message,
            scrubbed=Scrubbed(before_bytes=before_bytes, after_bytes=after_bytes),
        )

    async def _run(self, name: str, task: Task, parts: Parts | None) -> TaskResult:
        if self._pair.gpu is None or not self.is_resident(name):
            raise NotResidentError(
                f"model {name} left VRAM before the task began", retry_after_seconds=1
            )
        if parts is not None and parts.is_abandoned:
            raise TaskCancelledError(f"nobody waits for this task of model {name} any more")
        headers, fds = pack_tensors(task.tensors)
        self._streams += 1
        request = Run(
            name=name,
            kind=task.kind,
            parameters=dict(task.parameters),
            tensors=headers,
            stream=0 if parts is None else self._streams,
        )
        gpu = self._pair.gpu
        delivery = None if parts is None else Delivery(gpu, request.stream, parts)
        try:
            reply, received = await gpu.call(
                request, fds, None if delivery is None else delivery.take
            )
        except ChildDiedError as error:
            raise WorkerDiedError(
                f"model {name}: {error} while it ran this task; other requests are not affected"
            ) from error
        if isinstance(reply, Failure):
            close_fds(received)
            raise read_failure(reply)
        assert isinstance(reply, Ran)  # noqa: S101 - what a GPU process answers
        self._figures = reply.figures
        return TaskResult(values=reply.values, tensors=unpack_tensors(reply.tensors, received))

    async def _scrub(self) -> Scrubbed:
        if self._pair.gpu is None:
            return Scrubbed(before_bytes=0, after_bytes=0)
        try:
            reply = await _ask(self._pair.gpu, Scrub())
        except ChildDiedError:
            await self._pair.end_gpu()
            return Scrubbed(before_bytes=0, after_bytes=0)
        assert isinstance(reply, ScrubbedTo)  # noqa: S101 - what a GPU process answers
        self._figures = reply.figures
        return Scrubbed(before_bytes=reply.before_bytes, after_bytes=reply.after_bytes)

    async def _unload(self, name: str) -> None:
        await self._pair.end_gpu()
        self._specs.pop(name, None)
        self._loaded.pop(name, None)
        if not self._specs or self._pair.template is None:
            await self._pair.end_template()
            return
        try:
            reply = await _ask(self._pair.template, Unload(name=name))
        except ChildDiedError:
            return
        assert isinstance(reply, Done)  # noqa: S101 - what a template answers
        self._arena_bytes = reply.arena_bytes

    async def _close(self) -> None:
        await self._pair.end_gpu()
        self._specs.clear()
        await self._pair.end_template()

    # --- processes -----------------------------------------------------------------------------

    async def _make_gpu_process(self, name: str, wanted: str) -> str:
        """Fork the GPU process, or start a fresh one where a fork is not safe; return why.

        ``name``: the model that is restored; what is loaded on the way is its progress.
        """
        for remembered in list(self._specs.values()):
            if remembered.name not in self._loaded:
                await self._load_into_template(remembered)
        placement = self._device.place(wanted)
        self.gpu_device = placement.uuid
        threads = count_threads(os.environ)
        reason = await self._pair.fork(placement, threads)
        if not reason:
            return ""
        child = self._pair.start_fresh()
        for spec in list(self._specs.values()):
            await _ask(child, Load(spec=spec), self._notes.listen(name))
        reply = await _ask(child, Become(placement=placement, threads=threads))
        assert isinstance(reply, Done)  # noqa: S101 - what a template answers
        self._own_arena_bytes = reply.arena_bytes
        return f"started a fresh process, since a fork would not be safe: {reason}"

    def _forget_process(self, role: str) -> None:
        """A process ended, asked for or not: what it held is gone."""
        if role == TEMPLATE:
            self._loaded.clear()
            self._arena_bytes = 0
        else:
            self._resident.clear()
            self._figures = MemoryFigures()
            self._own_arena_bytes = 0


class ProcessBackend:
    """Makes process groups on one kind of device. Make it on the thread that runs the loop."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._groups: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()
        self._environment = build_environment(os.environ, device.environment())
        adopt_orphans()

    def open_group(self, group: str, on_exit: Callable[[ProcessExit], None]) -> ProcessGroup:
        """Return a group that owns no process yet."""
        opened = ProcessGroup(group, self._device, self._environment, on_exit)
        self._groups.add(opened)
        return opened

    def devices(self) -> list[DeviceReport]:
        """Return the devices as they are now."""
        places = {group.gpu_pid: group.gpu_device for group in self._groups}
        return self._device.reports({pid: at for pid, at in places.items() if pid is not None})

    def residual_source(self) -> ResidualSource:
        """Return how far the device's figures can be attributed."""
        return self._device.residual_source()

    def device_baseline_bytes(self) -> int:
        """Return what was in use before this agent's first context."""
        return self._device.baseline_bytes()
