"""The wrapped application as one process: start, signals, end, exit status.

Why it exists: the command runs in a session of its own, dies with the agent, and its end is seen
through its pidfd. Runs on the event loop, without threads. Called by keeper.py. It knows neither
why the process is ended nor what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vram_agent.core.wrapping import ChildExit
from vram_agent.errors import AgentError

_LAUNCH: Final = str(Path(__file__).with_name("launch.py"))
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # as a shell would exit


class CannotStartError(AgentError):
    """The command cannot be run at all; ``exit_code`` is the one that a shell would give."""

    code = "cannot_start"

    def __init__(self, command: Sequence[str], number: int) -> None:
        super().__init__(
            f"cannot run {command[0]!r}: {os.strerror(number)}; write a program that is in the "
            "container, by its path or by a name that PATH finds"
        )
        missing = number in {errno.ENOENT, errno.ENOTDIR}
        self.exit_code = _NOT_FOUND if missing else _NOT_EXECUTABLE


class WrappedProcess:
    """One run of the command. Owns its pidfd and its exit status."""

    def __init__(self, command: Sequence[str]) -> None:
        """Fork, in milliseconds; ``ensure_started`` tells whether the command could be run."""
        self._command = command
        self._report_fd, theirs = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", _LAUNCH, str(os.getpid()), str(theirs), *command],
                pass_fds=(theirs,),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        # It is reaped through its pidfd; Popen would take it for forgotten otherwise.
        process.returncode = 0
        self.pid = process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[ChildExit] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)

    async def ensure_started(self) -> None:
        """Return when the command runs. Raises CannotStartError; the process has ended then."""
        readable = asyncio.Event()
        self._loop.add_reader(self._report_fd, readable.set)
        try:
            await readable.wait()
            text = os.read(self._report_fd, 16)
        finally:
            self._loop.remove_reader(self._report_fd)
            os.close(self._report_fd)
        if text:
            await self.wait()
            raise CannotStartError(self._command, int(text))

    def send(self, number: signal.Signals | int) -> None:
        """Send a signal; nothing when it has ended."""
        if not self._exit.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> ChildExit:
        """Return how it ended, when it has."""
        return await asyncio.shield(self._exit)

    async def end(self, number: signal.Signals | int, grace_seconds: float) -> bool:
        """Send the signal and, when the grace is over, SIGKILL; True when that was needed."""
        self.send(number)
        try:
            async with asyncio.timeout(max(0.0, grace_seconds)):
                await self.wait()
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.wait()
            return True
        return False

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            self._exit.set_result(ChildExit(0, os.WTERMSIG(status)))
        else:
            self._exit.set_result(ChildExit(os.WEXITSTATUS(status)))
