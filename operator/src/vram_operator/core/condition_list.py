"""Lists of conditions as the Kubernetes API conventions want them.

Why it exists: lastTransitionTime moves only when the status does, in one place. Called by the
conditions of workloads and of restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from vram_operator.api import Condition, ConditionStatus, Reason
from vram_operator.core.figures import whole_seconds

_MESSAGE_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to be said under one condition type."""

    type: str
    status: ConditionStatus
    reason: Reason
    message: str = ""


def find_condition(conditions: Sequence[Condition], type_: str) -> Condition | None:
    """Return the condition of this type."""
    return next((condition for condition in conditions if condition.type == type_), None)


def is_true(conditions: Sequence[Condition], type_: str) -> bool:
    """Is the condition of this type there, and True?"""
    found = find_condition(conditions, type_)
    return found is not None and found.status is ConditionStatus.TRUE


def with_findings(
    conditions: Sequence[Condition],
    findings: Sequence[Finding],
    generation: int,
    now: datetime,
) -> list[Condition]:
    """Return the conditions with these findings, old ones in their place, new ones at the end."""
    fresh = {finding.type: finding for finding in findings}
    kept = [
        _updated(old, fresh.pop(old.type), generation, now) if old.type in fresh else old
        for old in conditions
    ]
    return kept + [_updated(None, finding, generation, now) for finding in fresh.values()]


def _updated(old: Condition | None, finding: Finding, generation: int, now: datetime) -> Condition:
    same = old is not None and old.status is finding.status
    return Condition(
        type=finding.type,
        status=finding.status,
        reason=finding.reason,
        message=finding.message[:_MESSAGE_CHARACTERS],
        last_transition_time=old.last_transition_time if same and old else whole_seconds(now),
        observed_generation=generation,
    )
