"""``plan(snapshot, now)``: the whole decision about one workload, as a story on one screen."""

from __future__ import annotations

from datetime import datetime

from vram_operator.core.plan import (
    Action,
    AnnotateWorkload,
    Blocked,
    CallRecycle,
    CallRestart,
    CreateRestart,
    DeletePod,
    DeleteRestart,
    DryRunEvict,
    EmitEvent,
    EnsureObject,
    EventType,
    Evict,
    PatchRestartStatus,
    PatchWorkloadStatus,
    Plan,
    PushConfig,
)
from vram_operator.core.snapshot import Snapshot

__all__ = [
    "Action",
    "AnnotateWorkload",
    "Blocked",
    "CallRecycle",
    "CallRestart",
    "CreateRestart",
    "DeletePod",
    "DeleteRestart",
    "DryRunEvict",
    "EmitEvent",
    "EnsureObject",
    "EventType",
    "Evict",
    "PatchRestartStatus",
    "PatchWorkloadStatus",
    "Plan",
    "PushConfig",
    "plan",
]


def plan(snapshot: Snapshot, now: datetime) -> Plan:
    """Return what to do for the workload at ``now``: pure, total and safe to repeat."""
    del now
    return Plan(actions=(), status=snapshot.workload.status, requeue_at=None)
