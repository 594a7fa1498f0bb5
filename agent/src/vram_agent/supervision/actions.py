"""Drain, recycle and restart: what the operator asks of the agent as a whole.

Why it exists: an action outlives the call that asked for it. It drains first, goes on past its
deadline, is remembered on disk, and the same ID never acts twice. Called by the supervisor on its
loop. It knows no model; what acting means is the supervisor's ``Acting``.

An action ends every GPU process and leaves each model that has a template in the Host tier; the
next request restores it. Models that are Eager and kept after a task are restored at once, since
their owner asked for them to be resident before a request comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import msgspec
import structlog

from vram_agent.errors import DrainingError
from vram_agent.protocol import ActionReport, ActionState, ActionStep, RestartRequest
from vram_agent.supervision.ports import Surroundings, format_time

CALL = "call"
STOP = "stop"
_RETRY_SECONDS = 5.0
_OPEN = frozenset({ActionState.DRAINING, ActionState.ACTING})
_log = structlog.get_logger("vram_agent.action")


class Drain:
    """Who wants no new requests, and whether the accepted ones are answered."""

    def __init__(self) -> None:
        self._wishes: set[str] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._admitted = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.is_over = False
        """The time of the last drain was over before all was answered."""

    @property
    def is_on(self) -> bool:
        """Whether new requests are refused."""
        return bool(self._wishes)

    def begin(self, wish: str) -> None:
        """Refuse new requests until this wish, and all others, have ended."""
        self._wishes.add(wish)

    def end(self, wish: str) -> None:
        """Take a wish back. Idempotent."""
        self._wishes.discard(wish)

    def note_requests(self, *, has_requests: bool) -> None:
        """Take note whether an accepted request is without its answer."""
        if has_requests:
            self._quiet.clear()
        else:
            self._quiet.set()

    @property
    def admitted(self) -> int:
        """Requests in the house, those that are still received or answered included."""
        return self._admitted

    def ensure_off(self) -> None:
        """Raise DrainingError where new requests are refused."""
        if self.is_on:
            raise DrainingError(
                "the agent takes no new requests; ask another replica, or later",
                retry_after_seconds=_RETRY_SECONDS,
            )

    def admit(self) -> AbstractContextManager[None]:
        """Count a request as in the house for as long as the block lasts.

        Raises DrainingError, at once.
        """
        self.ensure_off()
        return self._hold()

    @contextmanager
    def _hold(self) -> Iterator[None]:
        self._admitted += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if not self._admitted:
                self._empty.set()

    async def wait_empty(self, timeout_seconds: float) -> bool:
        """As ``wait``, and until the last answer is sent; afterwards nothing is taken any more."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not (self._quiet.is_set() and self._empty.is_set()):
                    await self._quiet.wait()
                    await self._empty.wait()
        except TimeoutError:
            self.is_over = True
            return False
        return True

    async def wait(self, timeout_seconds: float | None) -> bool:
        """Wait until every accepted request is answered; False when the time is over first."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Acting:
    """What the supervisor does for an action.

    ``cut`` answers what is still open past the deadline and says which requests those were, empty
    for none. ``recycle`` ends the GPU processes. ``leave`` lets PID 1 exit.
    """

    cut: Callable[[], str]
    recycle: Callable[[], Awaitable[None]]
    leave: Callable[[], None]


class Actions:
    """The last action; at most one is under way."""

    def __init__(self, surroundings: Surroundings, drain: Drain, acting: Acting) -> None:
        self._clock = surroundings.clock
        self._journal = surroundings.journal
        self._drain = drain
        self._acting = acting
        self._task: asyncio.Task[None] | None = None
        self._action = self._read_journal()

    @property
    def last(self) -> ActionReport | None:
        """The last action of this boot, or the one that an earlier boot ended with."""
        return self._action

    def begin(self, request: RestartRequest, step: ActionStep) -> ActionReport:
        """Begin an action and return at once; the last ID again changes nothing.

        Raises DrainingError while another one is under way: two at a time could not both be told
        apart in the report.
        """
        last = self._action
        if last is not None and last.restart_id == request.restart_id:
            return last
        if last is not None and last.state in _OPEN:
            raise DrainingError(
                f"{last.step} {last.restart_id} is under way; try again when the report says "
                "that it is done",
                retry_after_seconds=1.0,
            )
        self._drain.begin(_wish(request.restart_id))
        self._set(
            ActionReport(
                restart_id=request.restart_id,
                step=step,
                state=ActionState.DRAINING,
                at=format_time(self._clock.now()),
            )
        )
        assert self._action is not None  # noqa: S101 - it was just set
        self._task = asyncio.create_task(
            self._carry_out(self._action, request.drain_timeout_seconds), name="action"
        )
        return self._action

    async def close(self) -> None:
        """Give an action up; the process is about to end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _carry_out(self, action: ActionReport, drain_seconds: float) -> None:
        """1. Write down, so that a crash does not act twice. 2. Drain. 3. Act. 4. Say so."""
        # 1
        note = await self._persist()
        # 2
        cut = "" if await self._drain.wait(drain_seconds) else self._acting.cut()
        if cut:
            cut = f"cut after {drain_seconds:g} s: {cut}"
        words = "; ".join(filter(None, (cut, note)))
        # 3
        self._advance(ActionState.ACTING, words)
        await self._persist()
        if action.step is ActionStep.IN_PLACE:
            self._acting.leave()
            return
        try:
            await self._acting.recycle()
        except Exception as fault:
            # Whatever went wrong, the ladder must learn of it and take its next step.
            self._advance(ActionState.FAILED, "; ".join(filter(None, (str(fault), words))))
        else:
            self._advance(ActionState.DONE, words)
        # 4
        self._drain.end(_wish(action.restart_id))
        await self._persist()

    def _advance(self, state: ActionState, message: str) -> None:
        assert self._action is not None  # noqa: S101 - only called while one is under way
        at = format_time(self._clock.now())
        self._set(msgspec.structs.replace(self._action, state=state, at=at, message=message))

    def _set(self, action: ActionReport) -> None:
        self._action = action
        _log.info(
            "action",
            restart_id=action.restart_id,
            step=action.step.value,
            state=action.state.value,
            message=action.message,
        )

    async def _persist(self) -> str:
        """Write the action to disk; return why that failed, empty when it did not."""
        assert self._action is not None  # noqa: S101 - only called while one is under way
        try:
            await self._journal.write(self._action)
        except OSError as error:
            message = f"not remembered across a restart: {error}"
            _log.warning("journal unwritable", error=str(error))
            return message
        return ""

    def _read_journal(self) -> ActionReport | None:
        """An action that an earlier boot did not finish is finished by this boot's existence."""
        action = self._journal.read()
        if action is None or action.state not in _OPEN:
            return action
        words = "the container was restarted"
        if action.step is ActionStep.RECYCLE or action.state is ActionState.DRAINING:
            words += f" while the action was {action.state}"
        return msgspec.structs.replace(
            action,
            state=ActionState.DONE,
            at=format_time(self._clock.now()),
            message="; ".join(filter(None, (words, action.message))),
        )


def _wish(restart_id: str) -> str:
    """An ID may be any text, also one of the words above."""
    return f"action {restart_id}"
