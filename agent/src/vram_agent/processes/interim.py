"""What a process says before it answers: how far a load has come.

Why it exists: a call has one answer, and its caller waits for that alone; what comes earlier is
noted here, and read by whoever asks meanwhile. Called by group.py on the event loop.
"""

from __future__ import annotations

from vram_agent.processes.channel import close_fds
from vram_agent.processes.child import OnInterim
from vram_agent.processes.messages import Progressed, Reply
from vram_agent.protocol import LoadProgress, LoadStep


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
