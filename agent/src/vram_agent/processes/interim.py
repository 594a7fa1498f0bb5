"""What a process says before it answers: how far a load has come, and parts of a result.

Why it exists: a call has one answer, and its caller waits for that alone; what comes earlier is
noted here or handed on. Called by group.py on the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vram_agent.backend import TaskPart, Tensor
from vram_agent.parts import Parts
from vram_agent.processes.channel import close_fds
from vram_agent.processes.child import Child, OnInterim
from vram_agent.processes.messages import (
    Cancel,
    Partial,
    Progressed,
    Reply,
    Taken,
    unpack_tensors,
)
from vram_agent.protocol import LoadProgress, LoadStep

_SMALL_BYTES = 256 * 1024


class LoadNotes:
    """How far the one load or restore that a group carries out has come."""

    def __init__(self) -> None:
        self._name = ""
        self._progress: LoadProgress | None = None

    def of(self, name: str) -> LoadProgress | None:
        """Return what was told last of this model."""
        return self._progress if self._name == name else None

    def begin(self, name: str, step: LoadStep) -> None:
        """Note what this side does itself."""
        self._name, self._progress = name, LoadProgress(step=step)

    def listen(self, name: str) -> OnInterim:
        """Return what notes the progress of a call for a model."""

        def note(reply: Reply, fds: tuple[int, ...]) -> None:
            close_fds(fds)
            if isinstance(reply, Progressed):
                self._name, self._progress = name, reply.progress

        return note

    def clear(self) -> None:
        """Forget it: the load has ended."""
        self._name, self._progress = "", None


class Delivery:
    """Hands the parts of one task to who reads them, and says to the process what was taken."""

    def __init__(self, child: Child, stream: int, parts: Parts) -> None:
        self._child = child
        self._stream = stream
        self._parts = parts
        self._taken = 0
        parts.attach(self)

    def note_taken(self) -> None:
        """Let the process send one more."""
        self._taken += 1
        self._child.tell(Taken(stream=self._stream, parts=self._taken))

    def abandon(self) -> None:
        """Have the task end at its next part."""
        self._child.tell(Cancel(stream=self._stream))

    def take(self, reply: Reply, fds: tuple[int, ...]) -> None:
        """Hand one part on."""
        if not isinstance(reply, Partial):
            close_fds(fds)
            return
        tensors = unpack_tensors(reply.tensors, fds)
        self._parts.put(TaskPart(values=reply.values, tensors=_without_descriptors(tensors)))


def _without_descriptors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy what is small: each mapping holds a descriptor, and many small parts may wait."""
    return [
        replace(tensor, data=bytes(tensor.data))
        if memoryview(tensor.data).nbytes <= _SMALL_BYTES
        else tensor
        for tensor in tensors
    ]
