"""The circuit breaker: how many restarts in a row did not help, and whether that is enough.

Why it exists: a restart that does not help costs requests for nothing, and so will the next. Called
by ``triggers`` before a restart is decided, by ``admission`` before a decided one takes its first
step, by ``retention``, and by what tells of it.
"""

from __future__ import annotations

from vram_operator.api import RestartOutcome
from vram_operator.core.snapshot import Restart
from vram_operator.core.visit import Visit

GENERATION_ANNOTATION = "vram.dev/workload-generation"
"""On a GPUPodRestart: the workload's generation when it was decided."""
_COUNTED = frozenset({RestartOutcome.NOT_RECOVERED, RestartOutcome.FAILED})


def count_failures(visit: Visit) -> int:
    """Return how many restarts in a row did not help, under the spec as it is now."""
    return len(failure_streak(visit))


def failure_streak(visit: Visit) -> tuple[Restart, ...]:
    """Return the newest restarts that did not help, newest first, up to one that did.

    Skipped and dry runs say nothing, and neither do restarts of another generation of the spec.
    """
    generation = str(visit.snapshot.workload.generation)
    ended = [
        restart
        for restart in visit.snapshot.restarts
        if restart.status.completion_time is not None
        and restart.annotations.get(GENERATION_ANNOTATION) == generation
    ]
    ended.sort(key=lambda one: (one.status.completion_time or visit.now, one.name), reverse=True)
    streak = []
    for restart in ended:
        if restart.status.outcome is RestartOutcome.RECOVERED:
            break
        if restart.status.outcome in _COUNTED:
            streak.append(restart)
    return tuple(streak)


def is_degraded(visit: Visit) -> bool:
    """Did so many restarts in a row not help that no further residual one is worth it?"""
    return count_failures(visit) >= visit.policy.max_consecutive_failures


def say_degraded(visit: Visit) -> str:
    """Return why an open breaker keeps a restart from beginning."""
    return f"{visit.policy.max_consecutive_failures} restarts in a row did not help"
