"""Lists of conditions as the Kubernetes API conventions want them.

Why it exists: lastTransitionTime moves only when the status does, in one place. Called by the
conditions of workloads and of restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vram_operator.api import Condition, ConditionStatus, Reason
from vram_operator.core.figures import whole_seconds

_MESSAGE_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to be said under one condition type.

    ``figures`` follow the message after a colon. They may move with every report, so they are those
    of when the rest was said first.
    """

    type: str
    status: ConditionStatus
    reason: Reason
    message: str = ""
    figures: str = ""

    @property
    def text(self) -> str:
        """Message and figures."""
        return f"{self.message}: {self.figures}" if self.figures else self.message


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
    *,
    fresh_figures: bool = False,
) -> list[Condition]:
    """Return the conditions with these findings, old ones in their place, new ones at the end.

    ``fresh_figures`` has figures said anew although nothing else has changed.
    """
    fresh = {finding.type: finding for finding in findings}
    kept = []
    for old in conditions:
        finding = fresh.pop(old.type, None)
        if finding is None:
            kept.append(old)
            continue
        text = finding.text if fresh_figures else _steady_text(old, finding)
        kept.append(_updated(old, replace(finding, message=text), generation, now))
    added = (replace(finding, message=finding.text) for finding in fresh.values())
    return kept + [_updated(None, finding, generation, now) for finding in added]


def _steady_text(old: Condition, finding: Finding) -> str:
    """Return what is said already while only its figures have moved."""
    same = (old.status, old.reason) == (finding.status, finding.reason)
    if finding.figures and same and old.message.startswith(f"{finding.message}: "):
        return old.message
    return finding.text


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
