"""What a reconcile wants done: the actions, and the plan that carries them.

Why it exists: the shell carries out exactly these and decides nothing itself. Each action says
what it needs, what makes it safe to repeat, and what it must check live before it acts. Called by
everything in ``core`` and by ``apply``. Knows no client and no clock.

Order matters: the shell carries the actions out in order. A failed write to the apiserver ends
the plan (the next reconcile starts over); what an agent or the Eviction API answers is no failure
but a fact for the next snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from vram_agent.protocol import AgentConfig

from vram_operator.api import (
    FIELD_MANAGER,
    Condition,
    EventReason,
    Reason,
    RestartOutcome,
    RestartStatus,
    WorkloadStatus,
)
from vram_operator.core.snapshot import Pod


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureObject:
    """Server-side apply ``manifest`` with ``force``, as ``field_manager``. Idempotent."""

    manifest: dict[str, Any]
    field_manager: str = FIELD_MANAGER


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateWorkload:
    """Merge-patch these annotations onto the workload. Idempotent."""

    annotations: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig:
    """``PUT /config`` to the pod's agent; the answer becomes ``Agent.push``. Idempotent."""

    pod: Pod
    config: AgentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRestart:
    """Create a GPUPodRestart. ``AlreadyExists`` is success: the deterministic name is the lock."""

    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRestartStatus:
    """Write the whole status of a GPUPodRestart, with its ``resource_version`` as precondition.

    A conflict ends the plan. ``finished`` is the outcome that this write settles, for the metrics.
    """

    name: str
    uid: str
    resource_version: str
    status: RestartStatus
    finished: RestartOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Knock:
    """Send a signed call that changes nothing: does the agent still refuse ours?"""

    pod: Pod


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecycle:
    """``POST /recycle``; re-read pod and restart live first. The agent ignores a repeated ID."""

    pod: Pod
    restart_name: str
    restart_id: str
    drain_timeout_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRestart:
    """``POST /restart``; re-read pod and restart live first. The agent ignores a repeated ID."""

    pod: Pod
    restart_name: str
    restart_id: str
    drain_timeout_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRunEvict:
    """Evict with ``dryRun: [All]`` and preconditions; the answer becomes an EvictionAnswer."""

    pod: Pod


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """Evict with preconditions on UID and resourceVersion; the answer becomes an EvictionAnswer.

    Re-read the pod live first: a real eviction that fails its precondition still spends the budget
    for 120 s.
    """

    pod: Pod
    restart_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePod:
    """Delete with preconditions on UID and resourceVersion. Planned with --allow-delete only."""

    pod: Pod
    restart_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteRestart:
    """Delete a finished GPUPodRestart, with its UID as precondition. NotFound is success."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchWorkloadStatus:
    """Write the whole status of the workload, with its ``resource_version`` as precondition."""

    status: WorkloadStatus
    resource_version: str


class EventType(StrEnum):
    """Kinds of Events in Kubernetes."""

    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitEvent:
    """Write an Event about the workload. ``pod`` names the pod it is about, empty for none."""

    reason: EventReason
    message: str
    type: EventType = EventType.NORMAL
    pod: str = ""


Action = (
    EnsureObject
    | AnnotateWorkload
    | PushConfig
    | Knock
    | CreateRestart
    | PatchRestartStatus
    | CallRecycle
    | CallRestart
    | DryRunEvict
    | Evict
    | DeletePod
    | DeleteRestart
    | PatchWorkloadStatus
    | EmitEvent
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """A restart that waits, for which pod, and for what. ``restart`` is empty before it exists.

    ``figures`` go with the message as in a condition: they are those of when it was said first.
    """

    pod: str
    restart: str
    reason: Reason
    message: str
    figures: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one reconcile does, in order, and when to look again.

    ``status`` is the workload's status as it should read; it is written by an action among
    ``actions`` when it differs. ``blocked`` is for the gauge ``restarts_blocked``, ``missed_run``
    for the counter ``schedule_missed_total``: set in the one plan that gives a run up.
    """

    actions: tuple[Action, ...]
    status: WorkloadStatus
    requeue_at: datetime | None
    blocked: tuple[Blocked, ...] = ()
    missed_run: datetime | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The workload's conditions as they should read."""
        return tuple(self.status.conditions)

    @property
    def events(self) -> tuple[EmitEvent, ...]:
        """The Events among the actions."""
        return tuple(action for action in self.actions if isinstance(action, EmitEvent))
