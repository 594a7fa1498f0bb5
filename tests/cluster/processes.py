"""Starts and ends the processes of a cluster, and never anybody else's.

A process is known by its pid together with its start time, because pids are used again. Each also
carries the cluster's id in its environment, so that one that was started in the instant before the
caller was killed is found although nobody wrote it down. Knows nothing of Kubernetes.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import ClusterError

MARK = "VRAM_CLUSTER_ID"
TAIL_LINES = 15
POLL_SECONDS = 0.05
END_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class Process:
    """A process that was started: ``started`` is its start time in clock ticks since boot."""

    name: str
    pid: int
    started: int

    def is_alive(self) -> bool:
        """Is it this process that has the pid, and has it not ended? A zombie has ended."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """Field 22 of proc_pid_stat(5); None if there is no such process or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the name in brackets and may itself hold blanks and brackets.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def search_path() -> str:
    """PATH with the sbin folders, which root's own may lack: runc and iptables are there."""
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Inherited:
    """What a started process gets from its starter beside the environment."""

    cluster_id: str
    pass_fds: Sequence[int] = ()


def start(name: str, command: Sequence[str], log: Path, inherited: Inherited) -> Process:
    """Start ``command`` in a session of its own, its output in ``log``; it outlives the caller."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                command,
                env={**os.environ, "PATH": search_path(), MARK: inherited.cluster_id},
                pass_fds=inherited.pass_fds,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ClusterError(f"{name}: cannot start {command[0]}: {error}") from error
    started = start_time(child.pid)
    if started is None:
        raise ClusterError(f"{name} ended at once. End of {log}:\n{tail(log)}")
    # The process outlives this object; without a return code Popen warns when it is collected.
    child.returncode = 0
    return Process(name, child.pid, started)


def find_marked(cluster_id: str) -> list[Process]:
    """Every live process that carries the cluster's id in the environment it was started with."""
    wanted = f"{MARK}={cluster_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        pid = int(entry.name)
        started = start_time(pid)
        with suppress(OSError):
            if started and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(Process("unrecorded", pid, started))
    return found


def end(processes: Sequence[Process]) -> list[Process]:
    """Kill each of ``processes`` that is still itself and wait; return those that would not end.

    SIGKILL, as the data are thrown away and a kube-apiserver takes 61 s to end on SIGTERM. The
    signal goes through a pidfd, which still means the checked process should the pid change hands.
    """
    waiting: list[tuple[Process, int]] = []
    for process in processes:
        with suppress(ProcessLookupError):
            fd = os.pidfd_open(process.pid)
            if process.is_alive():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                waiting.append((process, fd))
            else:
                os.close(fd)
    deadline = time.monotonic() + END_TIMEOUT_SECONDS
    left = dict(waiting)
    while left and time.monotonic() < deadline:
        ended = select.select(list(left.values()), [], [], POLL_SECONDS)[0]
        # All are collected while any is waited for: the init of a process namespace ends only when
        # nothing that entered from outside is left, and a zombie is left.
        reap_adopted()
        for process in list(left):
            reap(process.pid)
            if left[process] in ended:
                del left[process]
    for _, fd in waiting:
        os.close(fd)
    return list(left)


def reap_adopted() -> None:
    """Collect what ended in an inner process namespace and was handed to this very process.

    That happens where this process adopts orphans (PR_SET_CHILD_SUBREAPER, or it is PID 1).
    """
    depth = len(_namespace_pids("self"))
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            is_ours = fields[0] == "Z" and int(fields[1]) == os.getpid()
            if is_ours and len(_namespace_pids(entry.name)) > depth:
                reap(int(entry.name))


def _namespace_pids(pid: str) -> list[str]:
    """The ids of a process in its process namespace and all that enclose it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return line.split()[1:]
    return []


def reap(pid: int) -> None:
    """Collect ``pid`` if it was a child of this very process; no other child is touched."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


Watched = tuple[Process, Path]
"""A process and the log that explains why it ended."""


def wait_until(
    condition: Callable[[], bool], what: str, timeout_seconds: float, watched: Sequence[Watched]
) -> None:
    """Poll until ``condition`` holds; stop early when a ``watched`` process has ended.

    Raises `ClusterError` that quotes the log which explains it.
    """
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        for process, log in watched:
            if not process.is_alive():
                raise ClusterError(
                    f"{process.name} ended while waiting until {what}. End of {log}:\n{tail(log)}"
                )
        if time.monotonic() > deadline:
            logs = "\n".join(f"End of {log}:\n{tail(log)}" for _, log in watched[-1:])
            raise ClusterError(f"waited {timeout_seconds:.0f} s in vain until {what}. {logs}")
        time.sleep(POLL_SECONDS)


def tail(log: Path) -> str:
    """The last lines of a log, indented, for an error message."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"  ({error})"
    return "\n".join(f"  {line[:400]}" for line in lines[-TAIL_LINES:]) or "  (empty)"
