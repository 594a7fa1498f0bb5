"""A process of a group as the supervisor sees it: calls, answers, and its end.

Why it exists: calls carry numbers, so several can be under way; the end of the process is seen
through its pidfd, whatever else has ended. Runs on the event loop, without threads. Called by
group.py. It knows messages, not what they mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from vram_agent.processes.channel import AsyncChannel, ChannelClosedError, Packet, close_fds
from vram_agent.processes.messages import (
    Answer,
    Call,
    Partial,
    Progressed,
    Reply,
    Request,
    decode_answer,
    encode,
)

STATUS_TIMEOUT_SECONDS = 5.0
"""How long a message waits for the exit status, which only the process's parent can know."""


class ChildDiedError(Exception):
    """The process ended before it answered."""


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended. ``exit_code`` is -1 when nobody could reap it."""

    exit_code: int
    signal: int = 0

    def __str__(self) -> str:
        if self.signal == signal.SIGKILL:
            return "killed by signal 9, as the kernel does when memory is out"
        if self.signal:
            return f"killed by signal {self.signal}"
        return f"exit code {self.exit_code}" if self.exit_code >= 0 else "exit code unknown"


OnInterim = Callable[[Reply, tuple[int, ...]], None]
"""Gets what a call says before its answer, in its order; it owns the descriptors."""


@dataclass(frozen=True, slots=True)
class _Pending:
    answer: asyncio.Future[tuple[Reply, tuple[int, ...]]]
    on_interim: OnInterim | None


def decode_wait_status(status: int) -> ExitStatus:
    """Return what a status of waitpid says."""
    if os.WIFSIGNALED(status):
        return ExitStatus(exit_code=0, signal=os.WTERMSIG(status))
    return ExitStatus(exit_code=os.WEXITSTATUS(status))


class Child:
    """One process and the supervisor's end of its channel.

    ``on_event`` gets what it says unasked, ``on_end`` is called once, when it has ended. Owns the
    socket and the pidfd. Its exit status is known once it is reaped, by its own parent: here, or
    by a template that says so (`set_status`). ``is_orphan``: its parent has ended, so nobody else
    will reap it.
    """

    def __init__(
        self,
        pid: int,
        sock: socket.socket,
        on_event: Callable[[Reply], None],
        on_end: Callable[[Child], None],
        pidfd: int | None = None,
    ) -> None:
        self.pid = pid
        self.is_expected_to_end = False
        self.is_orphan = False
        self._pidfd = os.pidfd_open(pid) if pidfd is None else pidfd
        self._on_event = on_event
        self._on_end = on_end
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._has_ended = False
        self._loop = asyncio.get_running_loop()
        self._status: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._channel = AsyncChannel(sock, self._take, self._lose_channel)
        self._loop.add_reader(self._pidfd, self._end)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended and still listens."""
        return not self._has_ended and self._channel.is_open

    @property
    def status(self) -> ExitStatus | None:
        """How it ended; None while nobody knows."""
        return self._status.result() if self._status.done() else None

    async def call(
        self,
        request: Request,
        fds: Sequence[int] = (),
        on_interim: OnInterim | None = None,
    ) -> tuple[Reply, tuple[int, ...]]:
        """Send a request with ``fds`` (taken) and wait for the answer; the caller owns its fds.

        Raises ChildDiedError. Cancelling gives up the answer; the request is carried out.
        """
        self._last_id += 1
        number = self._last_id
        future: asyncio.Future[tuple[Reply, tuple[int, ...]]] = self._loop.create_future()
        try:
            self._channel.send(encode(Call(number, request)), fds)
        except ChannelClosedError as error:
            raise ChildDiedError(await self.describe_end()) from error
        self._pending[number] = _Pending(future, on_interim)
        try:
            return await future
        except ChildDiedError as error:
            raise ChildDiedError(await self.describe_end()) from error
        except asyncio.CancelledError:
            self._pending.pop(number, None)
            if future.done() and not future.cancelled() and future.exception() is None:
                close_fds(future.result()[1])
            raise

    def tell(self, request: Request) -> None:
        """Send what has no answer; nothing where it has ended."""
        with contextlib.suppress(ChannelClosedError):
            self._channel.send(encode(Call(0, request)))

    async def describe_end(self) -> str:
        """Return how it ended, in words, waiting a little for its parent to know."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATUS_TIMEOUT_SECONDS):
                await asyncio.shield(self._status)
        return f"process {self.pid} ended: {self.status or ExitStatus(-1)}"

    def kill(self) -> None:
        """End it at once, as asked for. Idempotent."""
        self.is_expected_to_end = True
        self._kill()

    def _kill(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait_reaped(self) -> None:
        """Wait until it has ended and is no zombie."""
        await asyncio.shield(self._status)

    def set_status(self, status: ExitStatus) -> None:
        """Note how it ended; its parent has reaped it. Idempotent."""
        if not self._status.done():
            self._status.set_result(status)

    def ensure_reaped(self) -> None:
        """Reap it if it has ended and is this process's child, by birth or as an orphan."""
        if self._status.done() or not self._has_ended:
            return
        try:
            _, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            if self.is_orphan:
                self.set_status(ExitStatus(-1))
            return
        self.set_status(decode_wait_status(status))

    def _take(self, packet: Packet) -> None:
        try:
            answer: Answer = decode_answer(packet.body)
        except msgspec.DecodeError:
            close_fds(packet.fds)
            self._kill()
            return
        if answer.id == 0:
            close_fds(packet.fds)
            self._on_event(answer.reply)
            return
        if isinstance(answer.reply, Progressed | Partial):
            pending = self._pending.get(answer.id)
            if pending is None or pending.on_interim is None:
                close_fds(packet.fds)
            else:
                pending.on_interim(answer.reply, packet.fds)
            return
        pending = self._pending.pop(answer.id, None)
        if pending is None or pending.answer.done():
            close_fds(packet.fds)
        else:
            pending.answer.set_result((answer.reply, packet.fds))

    def _lose_channel(self) -> None:
        # A process that no longer listens is of no use; its end follows.
        self._kill()
        self._fail_pending()

    def _fail_pending(self) -> None:
        pending, self._pending = self._pending, {}
        for one in pending.values():
            if not one.answer.done():
                one.answer.set_exception(ChildDiedError())

    def _end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        # Answers that it sent before it ended still count.
        self._channel.receive_waiting()
        self._has_ended = True
        self._channel.close()
        self.ensure_reaped()
        os.close(self._pidfd)
        self._pidfd = -1
        self._fail_pending()
        self._on_end(self)
