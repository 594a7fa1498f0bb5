"""The life of a GPUPodRestart: its phases, what may follow what, and the ladder it climbs.

Why it exists: a restart survives crashes of the operator because its phase is read from its
status and from nothing else. Called by ``restarts`` and everything below it, and by ``gather`` for
:func:`is_active`. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from vram_operator.api import (
    Attempt,
    RestartCondition,
    RestartMethod,
    RestartStatus,
    RestartTrigger,
)
from vram_operator.core.condition_list import is_true
from vram_operator.core.snapshot import Pod, Restart

_LONGEST_NAME = 200


class Phase(StrEnum):
    """Where a restart is."""

    QUEUED = "Queued"  # waits for its first step, or for leave to take the next one
    ACTING = "Acting"  # a step was admitted and is being carried out, draining included
    VERIFYING = "Verifying"  # the step was carried out; the agent measures again
    FINISHED = "Finished"  # it has an outcome


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.ACTING, Phase.FINISHED}),
    Phase.ACTING: frozenset({Phase.VERIFYING, Phase.QUEUED, Phase.FINISHED}),
    Phase.VERIFYING: frozenset({Phase.QUEUED, Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}
"""Phase → the phases that may follow; every phase may also stay."""


class IllegalTransitionError(RuntimeError):
    """A decision would take a restart from one phase to another that cannot follow: our bug."""


def phase_of(status: RestartStatus) -> Phase:
    """Read the phase from a status: from its outcome, its open attempt and ``Restarted``."""
    if status.outcome is not None:
        return Phase.FINISHED
    if not status.attempts or status.attempts[-1].end_time is not None:
        return Phase.QUEUED
    if is_true(status.conditions, RestartCondition.RESTARTED):
        return Phase.VERIFYING
    return Phase.ACTING


def is_active(status: RestartStatus) -> bool:
    """Does the restart take a place under the caps?"""
    return phase_of(status) in {Phase.ACTING, Phase.VERIFYING}


def is_finished(status: RestartStatus) -> bool:
    """Has the restart an outcome?"""
    return phase_of(status) is Phase.FINISHED


def concerns(restart: Restart, pod: Pod) -> bool:
    """Is this the pod that is meant?

    Without a UID it is the pod of that name that was there when the restart was created.
    """
    wanted = restart.spec.pod
    if wanted.uid:
        return pod.uid == wanted.uid
    return pod.name == wanted.name and pod.created <= restart.created


def check_transition(before: RestartStatus, after: RestartStatus) -> None:
    """Raise IllegalTransitionError if ``after`` may not follow ``before``."""
    old, new = phase_of(before), phase_of(after)
    if new is not old and new not in TRANSITIONS[old]:
        raise IllegalTransitionError(f"a restart cannot go from {old} to {new}")
    if old is Phase.FINISHED and after != before:
        raise IllegalTransitionError("a restart that has ended does not change")


def open_attempt(status: RestartStatus) -> Attempt:
    """Return the step that runs; for the phases Acting and Verifying."""
    return status.attempts[-1]


def rungs(
    method: RestartMethod, trigger: RestartTrigger, *, allow_delete: bool
) -> tuple[RestartMethod, ...]:
    """Return the steps of a restart, mildest first.

    ``Auto`` begins a Residual restart with Recycle, which can give the memory back without the
    kubelet, and the others with InPlace, since they are to renew the process.
    """
    if method is not RestartMethod.AUTO:
        return (method,)
    first = (RestartMethod.RECYCLE,) if trigger is RestartTrigger.RESIDUAL else ()
    last = (RestartMethod.DELETE,) if allow_delete else ()
    return (*first, RestartMethod.IN_PLACE, RestartMethod.EVICT, *last)


def next_rung(restart: Restart, *, allow_delete: bool) -> RestartMethod | None:
    """Return the step after the last one taken; None when the ladder is at its end."""
    ladder = rungs(restart.spec.method, restart.spec.trigger, allow_delete=allow_delete)
    if not restart.status.attempts:
        return ladder[0]
    last = restart.status.attempts[-1].method
    after = ladder[ladder.index(last) + 1 :] if last in ladder else ()
    return after[0] if after else None


def restart_id(restart: Restart, method: RestartMethod) -> str:
    """Return what the agent remembers a step by: one per restart object and step."""
    return f"{restart.name[:_LONGEST_NAME]}.{restart.uid}.{method.lower()}"


def boot_before(status: RestartStatus) -> str:
    """Return the boot of the agent when the open attempt began; empty if it was not known."""
    figures = status.after or status.before
    return "" if figures is None else figures.boot_id
