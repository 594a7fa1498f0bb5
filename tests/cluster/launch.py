"""Starts the parts of one cluster and writes each down, for both levels.

`Launcher` is the only writer of the state file while a cluster comes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import processes, state
from .errors import ClusterError
from .processes import Inherited, Process, Watched
from .state import State


class Launcher:
    """``prefix`` is what puts a command into the cluster's namespaces; nothing without them."""

    def __init__(self, directory: Path, started: State) -> None:
        self.directory = directory
        self.state = started
        self.prefix: Sequence[str] = ()
        state.save(directory, started)

    def log(self, name: str) -> Path:
        """The log of the part ``name``."""
        return self.directory / "logs" / f"{name}.log"

    def start(self, name: str, command: Sequence[str], pass_fds: Sequence[int] = ()) -> Watched:
        """Start ``command`` inside the namespaces as the part ``name``. Does not wait for it."""
        log = self.log(name)
        full = [*self.prefix, *command]
        process = processes.start(name, full, log, Inherited(self.state.id, pass_fds))
        self._save(self.state.with_process(process))
        return process, log

    def record(self, name: str, pid: int) -> None:
        """Note a process that another one started."""
        started = processes.start_time(pid)
        if started is None:
            raise ClusterError(f"{name} (pid {pid}) ended at once; see {self.directory / 'logs'}")
        self._save(self.state.with_process(Process(name, pid, started)))

    def finish(self) -> None:
        """Note that the cluster is up."""
        self._save(replace(self.state, ready=True))

    def _save(self, changed: State) -> None:
        self.state = changed
        state.save(self.directory, changed)
