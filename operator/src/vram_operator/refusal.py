"""The status of a workload that cannot be planned for: refused by the apiserver, or unreadable.

Called by `reconcile`. Pure. Only the conditions Accepted and Ready are touched, so the rest of the
status stays what it was when the workload was last understood.
"""

from __future__ import annotations

from datetime import datetime

from msgspec.structs import replace

from vram_operator.api import ConditionStatus, Reason, WorkloadCondition, WorkloadStatus
from vram_operator.core.condition_list import Finding, with_findings


def refused_status(
    status: WorkloadStatus, finding: tuple[Reason, str], generation: int, now: datetime
) -> WorkloadStatus:
    """Return ``status`` with Accepted=False for the reason and message of ``finding``."""
    reason, message = finding
    accepted = Finding(WorkloadCondition.ACCEPTED, ConditionStatus.FALSE, reason, message)
    ready = Finding(
        WorkloadCondition.READY, ConditionStatus.FALSE, Reason.NOT_ACCEPTED, "see Accepted"
    )
    conditions = with_findings(status.conditions, (accepted, ready), generation, now)
    return replace(status, conditions=conditions, observed_generation=generation)
