"""What is said of objects that no plan can be made for.

A workload may be unreadable, and a GPUPodRestart written by hand may name a workload that does not
exist. Called by `apply`. Pure. Of a workload only the conditions Accepted and Ready are touched, so
the rest of the status stays what it was when the workload was last understood.
"""

from __future__ import annotations

from datetime import datetime

from msgspec.structs import replace

from vram_operator.api import (
    ConditionStatus,
    Reason,
    RestartCondition,
    RestartStatus,
    WorkloadCondition,
    WorkloadStatus,
)
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


def orphaned_status(
    status: RestartStatus, workload: str, generation: int, now: datetime
) -> RestartStatus:
    """Return the status of a restart whose workload does not exist: open, and not admitted."""
    finding = Finding(
        RestartCondition.ADMITTED,
        ConditionStatus.FALSE,
        Reason.WORKLOAD_NOT_FOUND,
        f"there is no GPUModelWorkload {workload}",
    )
    conditions = with_findings(status.conditions, (finding,), generation, now)
    return replace(status, conditions=conditions, observed_generation=generation)
