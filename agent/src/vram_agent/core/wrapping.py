"""A wrapped application's life as a table, what its end means, and when it is started again.

Why it exists: ``vram-agent run`` starts, drains, recycles and ends a process that it did not write,
and a signal may come in any of these. Every step is asked here first. Called by wrapping/ alone. It
knows no process, clock or signal handler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from vram_agent.core.lifecycle import IllegalTransitionError
from vram_agent.protocol import AfterCrash

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 60.0
STABLE_SECONDS: Final = 60.0
"""A child that ran this long did not crash at its start: the next pause is the first again."""
_SIGNALLED: Final = 128


class ChildState(StrEnum):
    """Where the application is in its life."""

    STARTING = "Starting"
    """Its process runs, and has not said yet that it is ready."""
    RUNNING = "Running"
    DRAINING = "Draining"
    """It was told to take no new requests."""
    STOPPING = "Stopping"
    """It was told to end."""
    BACKING_OFF = "BackingOff"
    """It crashed; there is no process until the pause is over."""
    ENDED = "Ended"


class ChildEvent(StrEnum):
    """What can happen to it."""

    READY = "Ready"
    DRAIN = "Drain"
    RESUME = "Resume"
    """A drain was taken back; it is to say anew that it is ready."""
    STOP = "Stop"
    RENEW = "Renew"
    """Its process has ended for a recycle, or waits after a crash, and is started again."""
    CRASHED = "Crashed"
    RETRY = "Retry"
    """The pause after a crash is over."""
    END = "End"
    """Its process has ended, and the agent ends with it."""


_S, _E = ChildState, ChildEvent

TABLE: Final[Mapping[tuple[ChildState, ChildEvent], ChildState]] = MappingProxyType(
    {
        (_S.STARTING, _E.READY): _S.RUNNING,
        (_S.STARTING, _E.DRAIN): _S.DRAINING,
        (_S.STARTING, _E.STOP): _S.STOPPING,
        (_S.STARTING, _E.CRASHED): _S.BACKING_OFF,
        (_S.STARTING, _E.END): _S.ENDED,
        (_S.RUNNING, _E.DRAIN): _S.DRAINING,
        (_S.RUNNING, _E.STOP): _S.STOPPING,
        (_S.RUNNING, _E.CRASHED): _S.BACKING_OFF,
        (_S.RUNNING, _E.END): _S.ENDED,
        (_S.DRAINING, _E.RESUME): _S.STARTING,
        (_S.DRAINING, _E.STOP): _S.STOPPING,
        (_S.DRAINING, _E.CRASHED): _S.BACKING_OFF,
        (_S.DRAINING, _E.END): _S.ENDED,
        (_S.STOPPING, _E.RENEW): _S.STARTING,
        (_S.STOPPING, _E.END): _S.ENDED,
        (_S.BACKING_OFF, _E.RETRY): _S.STARTING,
        (_S.BACKING_OFF, _E.RENEW): _S.STARTING,
        (_S.BACKING_OFF, _E.END): _S.ENDED,
    }
)

ALIVE: Final = frozenset({_S.STARTING, _S.RUNNING, _S.DRAINING, _S.STOPPING})
"""The states in which there is a process."""


def decide_child_state(state: ChildState, event: ChildEvent) -> ChildState:
    """Return where the event leads. Raises IllegalTransitionError and changes nothing."""
    after = TABLE.get((state, event))
    if after is None:
        raise IllegalTransitionError(f"{event} is not possible in {state}")
    return after


class Wish(StrEnum):
    """What the agent wants of the application."""

    KEEP = "Keep"
    RENEW = "Renew"
    END = "End"


@dataclass(frozen=True, slots=True)
class ChildExit:
    """How its process ended. ``signal`` is 0 for a plain exit."""

    exit_code: int
    signal: int = 0

    @property
    def shell_code(self) -> int:
        """The exit code by which a shell, and the agent, pass this on: 128 and the signal."""
        return _SIGNALLED + self.signal if self.signal else self.exit_code

    def __str__(self) -> str:
        return f"signal {self.signal}" if self.signal else f"exit code {self.exit_code}"


def decide_after_exit(exit_: ChildExit, wish: Wish, after_crash: AfterCrash) -> ChildEvent:
    """Return what the end of the process means. Pure.

    1. The agent is about to end: End.
    2. A recycle asked for it: Renew.
    3. It ended by itself with exit code 0: it has finished, and so has the agent.
    4. It ended by itself with anything else: what the config says of a crash.
    """
    # 1
    if wish is Wish.END:
        return ChildEvent.END
    # 2
    if wish is Wish.RENEW:
        return ChildEvent.RENEW
    # 3
    if exit_.shell_code == 0:
        return ChildEvent.END
    # 4
    return ChildEvent.CRASHED if after_crash is AfterCrash.RESTART else ChildEvent.END


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses between a crash and the next start; ``crashes`` in a row so far."""

    crashes: int = 0

    def after_crash(self, ran_seconds: float) -> tuple[Backoff, float]:
        """Return the next value and the pause in seconds: 1, doubled each time, at most 60.

        A run of STABLE_SECONDS begins anew.
        """
        crashes = 0 if ran_seconds >= STABLE_SECONDS else self.crashes
        # The bound on the exponent keeps the power finite however often it crashes.
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(crashes, 16))
        return Backoff(crashes + 1), pause
