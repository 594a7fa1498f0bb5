"""The GPU process: context, weights in device memory, tasks.

Why it exists: what touches the device is a process that can be ended without losing the model. It
is a fork of the template (or, when forking is not safe, a process that loaded the models itself)
and answers the supervisor's calls one after the other, in their order; more may wait meanwhile.
It ends with its channel. Called by template.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial

import msgspec

from vram_agent.backend import Task
from vram_agent.devices.base import (
    DeviceMemory,
    MemoryFigures,
    OutOfDeviceMemoryError,
    Placement,
)
from vram_agent.engine.memory import open_memory
from vram_agent.engine.scrub import scrub
from vram_agent.errors import (
    AgentError,
    BadInputError,
    ModelFailedError,
    NoVramError,
    TaskFailedError,
)
from vram_agent.processes.channel import Channel, ChannelClosedError, close_fds
from vram_agent.processes.inbox import Inbox, Outlet
from vram_agent.processes.messages import (
    Answer,
    Call,
    Failure,
    MovedTo,
    Offload,
    Progressed,
    Ran,
    Reply,
    Restore,
    Run,
    Scrub,
    ScrubbedTo,
    encode,
    pack_tensors,
    unpack_tensors,
)
from vram_agent.progress import measuring, step
from vram_agent.protocol import LoadProgress, LoadStep
from vram_agent.runtimes.base import HostedModel, PartialModel


def describe_failure(error: AgentError) -> Failure:
    """Return an error as it travels."""
    return Failure(
        error=type(error).__name__,
        message=error.message,
        param=getattr(error, "param", None),
        retry_after_seconds=error.retry_after_seconds,
    )


def raise_threads(threads: int) -> None:
    """Let the libraries use this many threads; until here they had one."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        from vram_agent.engine.torch import set_threads  # noqa: PLC0415 - only where torch is

        set_threads(threads)


class GpuProcess:
    """Holds the models of a group on one device and serves calls until its channel ends."""

    def __init__(
        self,
        channel: Channel,
        models: Mapping[str, HostedModel],
        placement: Placement,
        threads: int,
    ) -> None:
        self._channel = channel
        self._inbox = Inbox(channel)
        self._models = models
        self._placement = placement
        self._threads = threads
        self._memory: DeviceMemory | None = None
        self._resident: dict[str, int] = {}
        raise_threads(threads)

    def serve(self) -> None:
        """Answer calls until the supervisor closes the channel, or ends."""
        with contextlib.suppress(ChannelClosedError):
            while True:
                call, given = self._inbox.next()
                reply, fds = self._answer(call, given)
                self._channel.send(encode(Answer(call.id, reply)), fds)

    def _answer(self, call: Call, fds: tuple[int, ...]) -> tuple[Reply, list[int]]:
        request = call.request
        try:
            if isinstance(request, Run):
                return self._run(call, request, fds)
            close_fds(fds)
            if isinstance(request, Restore):
                with measuring(partial(self._tell, call.id)):
                    return self._restore(request.name), []
            if isinstance(request, Offload):
                return self._offload(request.name), []
            if isinstance(request, Scrub):
                before_bytes, after_bytes = self._scrub()
                return ScrubbedTo(
                    before_bytes=before_bytes, after_bytes=after_bytes, figures=self._figures()
                ), []
        except AgentError as error:
            return describe_failure(error), []
        message = f"a GPU process cannot {type(request).__name__}"
        return Failure(error="AgentError", message=message), []

    def _ensure_memory(self) -> DeviceMemory:
        # Not before the first restore: opening makes the context, and may fail.
        if self._memory is None:
            try:
                with step(LoadStep.STARTING_PROCESS):
                    self._memory = open_memory(self._placement)
            except Exception as error:
                raise ModelFailedError(
                    f"device {self._placement.uuid} cannot be used: {error}; check the driver and "
                    f"that the container may use the device"
                ) from error
        return self._memory

    def _figures(self) -> MemoryFigures:
        if self._memory is None:
            return MemoryFigures()
        return self._memory.figures(
            sum(self._resident.values()),
            sum(model.weights.stray_bytes for model in self._models.values()),
        )

    def _scrub(self) -> tuple[int, int]:
        forget = [model.forget for model in self._models.values()]
        return scrub(self._ensure_memory(), forget)

    def _tell(self, call_id: int, progress: LoadProgress) -> None:
        self._channel.send(encode(Answer(call_id, Progressed(progress=progress))))

    def _restore(self, name: str) -> MovedTo:
        """Bring a model onto the device, or leave everything as it was and raise."""
        began = time.monotonic()
        memory = self._ensure_memory()
        try:
            vram_bytes = self._models[name].weights.restore(memory, self._threads)
        except Exception as error:  # whatever a library raises is the caller's answer
            failure = self._explain_restore(name, error)
            _clear_frames(error)
            self._scrub()
            raise failure from None
        self._resident[name] = vram_bytes
        return MovedTo(
            vram_bytes=vram_bytes,
            seconds=time.monotonic() - began,
            figures=self._figures(),
            message=memory.explain_copies(),
        )

    def _explain_restore(self, name: str, error: Exception) -> AgentError:
        memory = self._ensure_memory()
        if isinstance(error, AgentError):
            return error
        if isinstance(error, OutOfDeviceMemoryError) or memory.is_out_of_memory(error):
            return NoVramError(
                f"model {name} does not fit on device {self._placement.uuid}: {error}"
            )
        return ModelFailedError(
            f"model {name} could not be brought onto device {self._placement.uuid}: "
            f"{type(error).__name__}: {error}"
        )

    def _offload(self, name: str) -> MovedTo:
        began = time.monotonic()
        model = self._models[name]
        try:
            left = model.weights.offload()
        except Exception as error:  # a failed offload leaves the model where it was
            raise ModelFailedError(
                f"model {name} could not be offloaded: {type(error).__name__}: {error}; end its "
                f"GPU process"
            ) from error
        self._resident.pop(name, None)
        scrubbed_bytes = self._scrub()
        return MovedTo(
            vram_bytes=left.held_bytes,
            seconds=time.monotonic() - began,
            figures=self._figures(),
            message=left.message,
            scrubbed_bytes=scrubbed_bytes,
        )

    def _run(self, call: Call, request: Run, fds: tuple[int, ...]) -> tuple[Reply, list[int]]:
        tensors = unpack_tensors(request.tensors, fds)
        model = self._models[request.name]
        task = Task(kind=request.kind, parameters=request.parameters, tensors=tensors)
        if request.kind not in model.tasks:
            raise BadInputError(f"model {request.name} cannot {request.kind.value}")
        try:
            self._inbox.begin(request.stream)
            if request.stream and isinstance(model, PartialModel):
                outlet = Outlet(self._channel, self._inbox, call)
                result = model.run_in_parts(task, outlet.send)
            else:
                result = model.run(task)
            values = msgspec.to_builtins(dict(result.values))
            headers, out = pack_tensors(result.tensors)
        except (AgentError, ChannelClosedError):
            raise
        except (Exception, SystemExit) as error:  # a model's own code may raise anything
            failure = self._explain_run(request.name, error)
            _clear_frames(error)
            model.forget()
            raise failure from None
        return Ran(values=values, tensors=headers, figures=self._figures()), out

    def _explain_run(self, name: str, error: BaseException) -> AgentError:
        if self._memory is not None and self._memory.is_out_of_memory(error):
            return NoVramError(
                f"model {name} ran out of memory on device {self._placement.uuid} during a task: "
                f"{error}"
            )
        return TaskFailedError(f"model {name}: {type(error).__name__}: {error}")


def _clear_frames(error: BaseException) -> None:
    """Free the locals of the frames an error came through: they hold tensors on the device."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
