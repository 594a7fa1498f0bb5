"""Keeps the command running: starts it, starts it again, and ends it.

Why it exists: the one writer of the application's state. ``keep`` is its life from the first start
to the last exit; everything else is a wish that ``keep`` fulfils when the process has ended. Called
by wrapper.py on its loop. It knows no HTTP, no memory and no action.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from vram_agent.core.wrapping import (
    Backoff,
    ChildEvent,
    ChildExit,
    ChildState,
    Wish,
    decide_after_exit,
    decide_child_state,
)
from vram_agent.errors import AgentError, DrainingError
from vram_agent.protocol import AfterCrash
from vram_agent.supervision.ports import Clock
from vram_agent.wrapping.process import CannotStartError, WrappedProcess
from vram_agent.wrapping.tree import end_descendants

_MAY_STOP: Final = frozenset({ChildState.STARTING, ChildState.RUNNING, ChildState.DRAINING})
_log = structlog.get_logger("vram_agent.run")


class Keeper:
    """The application. ``on_start`` is called each time that its command runs."""

    def __init__(self, command: Sequence[str], after_crash: AfterCrash, clock: Clock) -> None:
        self._command = command
        self._after_crash = after_crash
        self._clock = clock
        self._wish = Wish.KEEP
        self._backoff = Backoff()
        self._started_at = 0.0
        self._process: WrappedProcess | None = None
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._renewal: asyncio.Future[None] | None = None
        self.on_start: Callable[[], None] = lambda: None
        self.on_crash: Callable[[], None] = lambda: None
        self.state = ChildState.STARTING
        self.epoch = 0

    @property
    def pid(self) -> int:
        """The command's process; 0 where there is none."""
        return 0 if self._process is None else self._process.pid

    @property
    def is_draining(self) -> bool:
        """Whether it was told to take no new requests."""
        return self.state is ChildState.DRAINING

    @property
    def is_ending(self) -> bool:
        """Whether it ends for good."""
        return self._wish is Wish.END or self.state is ChildState.ENDED

    async def keep(self) -> int:
        """Run the command until it or the agent is to end; return the exit code to end with.

        Raises CannotStartError where the command cannot be run.
        """
        while True:
            if self._wish is Wish.END:
                self._advance(ChildEvent.END)
                return 0
            exit_ = await self._run()
            event = decide_after_exit(exit_, self._wish, self._after_crash)
            self._advance(event, exit=str(exit_))
            if event is ChildEvent.CRASHED:
                self.on_crash()
                event = await self._pause(exit_)
                self._advance(event)
            if event is ChildEvent.END:
                self._fail_renewal(AgentError(f"the command ended: {exit_}"))
                return exit_.shell_code

    async def renew(self, grace_seconds: float) -> None:
        """End the process and return when the next one runs.

        Raises DrainingError where the agent ends, AgentError where the command does not run again.
        """
        if self.is_ending:
            raise DrainingError("the agent is about to end")
        self._wish = Wish.RENEW
        self._renewal = asyncio.get_running_loop().create_future()
        await self._stop(signal.SIGTERM, grace_seconds)
        await self._renewal

    async def end(self, number: signal.Signals, grace_seconds: float) -> None:
        """End the process for good; ``keep`` then returns. Idempotent."""
        self._wish = Wish.END
        await self._stop(number, grace_seconds)

    def send(self, number: int) -> None:
        """Pass a signal on to the command; nothing where there is no process."""
        if self._process is not None:
            self._process.send(number)

    def note_ready(self) -> None:
        """Take note that it takes requests."""
        if self.state is ChildState.STARTING:
            self._advance(ChildEvent.READY)

    def begin_drain(self) -> bool:
        """Take note that it is told to take no new requests; False where there is no process."""
        if self.pid and self.state in {ChildState.STARTING, ChildState.RUNNING}:
            self._advance(ChildEvent.DRAIN)
        return self.state is ChildState.DRAINING

    def end_drain(self) -> bool:
        """Take note that it may take requests again; False where it did not drain."""
        if self.state is not ChildState.DRAINING:
            return False
        self._advance(ChildEvent.RESUME)
        return True

    async def wait_running(self, timeout_seconds: float) -> None:
        """Return when it is ready or the time is over. Raises AgentError where it crashed."""
        epoch = self.epoch
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.state is ChildState.STARTING and self.epoch == epoch:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return
        if self.state in {ChildState.BACKING_OFF, ChildState.ENDED}:
            raise AgentError("the command was started again and ended before it was ready")

    async def _run(self) -> ChildExit:
        """Run the command once; return how it ended, when nothing of it is left."""
        self._process = WrappedProcess(self._command)
        self._started_at = self._clock.monotonic()
        try:
            await self._process.ensure_started()
        except CannotStartError as error:
            self._process = None
            self.state = ChildState.ENDED
            self._changed.set()
            self._fail_renewal(error)
            raise
        _log.info("started", pid=self._process.pid, command=self._command[0], epoch=self.epoch)
        if self.state is ChildState.STARTING:
            self._note_started()
        exit_ = await self._process.wait()
        self._process = None
        await end_descendants()
        return exit_

    def _note_started(self) -> None:
        if self._wish is Wish.RENEW:
            self._wish = Wish.KEEP
            self.epoch += 1
        if self._renewal is not None and not self._renewal.done():
            self._renewal.set_result(None)
        self.on_start()

    async def _pause(self, exit_: ChildExit) -> ChildEvent:
        """Wait after a crash, unless somebody wants something else; return what comes next."""
        ran = self._clock.monotonic() - self._started_at
        self._backoff, pause = self._backoff.after_crash(ran)
        _log.warning(
            "crashed", exit=str(exit_), crashes=self._backoff.crashes, next_start_seconds=pause
        )
        self._wake.clear()
        try:
            async with asyncio.timeout(pause):
                await self._wake.wait()
        except TimeoutError:
            return ChildEvent.RETRY
        return ChildEvent.END if self._wish is Wish.END else ChildEvent.RENEW

    async def _stop(self, number: signal.Signals, grace_seconds: float) -> None:
        if self.state in _MAY_STOP and self._process is not None:
            self._advance(ChildEvent.STOP)
        self._wake.set()
        if self._process is not None and await self._process.end(number, grace_seconds):
            _log.warning("killed", after_seconds=grace_seconds)

    def _fail_renewal(self, error: AgentError) -> None:
        if self._renewal is not None and not self._renewal.done():
            self._renewal.set_exception(error)
            self._renewal.exception()  # whoever waited may have been cancelled

    def _advance(self, event: ChildEvent, **words: str) -> None:
        before, self.state = self.state, decide_child_state(self.state, event)
        _log.info("child", was=before.value, state=self.state.value, cause=event.value, **words)
        self._changed.set()
