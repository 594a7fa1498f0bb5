"""Constants and enums of the custom resources: what never changes without an issue.

Why it exists: names that users, manifests and tests rely on stand in one place. Called by
everything in the operator through ``vram_operator.api``. It knows no types of the objects, no
I/O and no clock.
"""

from __future__ import annotations

from enum import StrEnum

from vram_agent.protocol import CONTROL_PORT_ANNOTATION, RESTART_ANNOTATION, WORKLOAD_LABEL

GROUP = "vram.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
CATEGORY = "gpu"

WORKLOAD_KIND = "GPUModelWorkload"
WORKLOAD_PLURAL = "gpumodelworkloads"
WORKLOAD_SHORT_NAME = "gmw"
RESTART_KIND = "GPUPodRestart"
RESTART_PLURAL = "gpupodrestarts"
RESTART_SHORT_NAME = "gpr"

TRUST_CONFIG_MAP = "vram-agent-trust"
TRUST_KEY = "keys.pem"
FIELD_MANAGER = "vram-operator"
AGENT_CONTAINER = "agent"

# The kubelet resets its back-off after 600 s of running; below this a second exit in place would
# end in CrashLoopBackOff (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/).
MINIMUM_IN_PLACE_COOLDOWN_SECONDS = 630


class TargetKind(StrEnum):
    """Kinds in ``apps/v1`` whose pods a workload may refer to."""

    DEPLOYMENT = "Deployment"
    STATEFUL_SET = "StatefulSet"


class RestartMethod(StrEnum):
    """How a pod is restarted. ``AUTO`` climbs the ladder; the others are one step of it."""

    AUTO = "Auto"
    RECYCLE = "Recycle"
    IN_PLACE = "InPlace"
    EVICT = "Evict"
    DELETE = "Delete"


class RestartTrigger(StrEnum):
    """Why a restart was asked for."""

    SCHEDULED = "Scheduled"
    RESIDUAL = "Residual"
    MANUAL = "Manual"


class RestartOutcome(StrEnum):
    """How a restart ended."""

    RECOVERED = "Recovered"
    NOT_RECOVERED = "NotRecovered"
    FAILED = "Failed"
    SKIPPED = "Skipped"
    DRY_RUN = "DryRun"


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class WorkloadCondition(StrEnum):
    """Condition types of a GPUModelWorkload; all are written from the first visit on."""

    ACCEPTED = "Accepted"
    READY = "Ready"
    AGENTS_REPORTING = "AgentsReporting"
    RESIDUAL_HIGH = "ResidualHigh"
    VRAM_HIGH = "VRAMHigh"
    RESTARTING = "Restarting"
    RESTART_BLOCKED = "RestartBlocked"
    DEGRADED = "Degraded"


class RestartCondition(StrEnum):
    """Condition types of a GPUPodRestart, in the order in which they become true."""

    ADMITTED = "Admitted"
    DRAINED = "Drained"
    RESTARTED = "Restarted"
    RECOVERED = "Recovered"


class EventReason(StrEnum):
    """Reasons of the Events that the operator writes."""

    RESTARTING = "Restarting"
    RESTARTED = "Restarted"
    RESTART_BLOCKED = "RestartBlocked"
    RESTART_NOT_RECOVERED = "RestartNotRecovered"
    RESTART_SKIPPED = "RestartSkipped"
    RESIDUAL_HIGH = "ResidualHigh"
    VRAM_HIGH = "VRAMHigh"
    AGENT_SILENT = "AgentSilent"
    MODEL_FAILED = "ModelFailed"
    INVALID_SCHEDULE = "InvalidSchedule"
    CONFLICTED = "Conflicted"


__all__ = [
    "AGENT_CONTAINER",
    "API_VERSION",
    "CATEGORY",
    "CONTROL_PORT_ANNOTATION",
    "FIELD_MANAGER",
    "GROUP",
    "MINIMUM_IN_PLACE_COOLDOWN_SECONDS",
    "RESTART_ANNOTATION",
    "RESTART_KIND",
    "RESTART_PLURAL",
    "RESTART_SHORT_NAME",
    "TRUST_CONFIG_MAP",
    "TRUST_KEY",
    "VERSION",
    "WORKLOAD_KIND",
    "WORKLOAD_LABEL",
    "WORKLOAD_PLURAL",
    "WORKLOAD_SHORT_NAME",
    "ConditionStatus",
    "EventReason",
    "RestartCondition",
    "RestartMethod",
    "RestartOutcome",
    "RestartTrigger",
    "TargetKind",
    "WorkloadCondition",
]
