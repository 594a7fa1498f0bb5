"""The custom resources: names, enums, reasons and the types of spec and status.

Why it exists: one import for the whole operator. The CRDs in ``crds/`` are generated from these
types (``python -m vram_operator.crds``), so a change here is a change of the API. Called by
everything; it knows no I/O, no clock and no framework.

Read with ``decode(obj["spec"], WorkloadSpec)``, write with ``encode(status)``.
"""

from __future__ import annotations

from vram_operator.api_names import (
    AGENT_CONTAINER,
    API_VERSION,
    CATEGORY,
    CONTROL_PORT_ANNOTATION,
    FIELD_MANAGER,
    GROUP,
    MINIMUM_IN_PLACE_COOLDOWN_SECONDS,
    RESTART_ANNOTATION,
    RESTART_KIND,
    RESTART_PLURAL,
    RESTART_SHORT_NAME,
    TRUST_CONFIG_MAP,
    TRUST_KEY,
    VERSION,
    WORKLOAD_KIND,
    WORKLOAD_LABEL,
    WORKLOAD_PLURAL,
    WORKLOAD_SHORT_NAME,
    ConditionStatus,
    EventReason,
    RestartCondition,
    RestartMethod,
    RestartOutcome,
    RestartTrigger,
    TargetKind,
    WorkloadCondition,
)
from vram_operator.api_reasons import (
    Reason,
)
from vram_operator.api_restart import (
    Attempt,
    MemoryFigures,
    PodRef,
    RestartSpec,
    RestartStatus,
)
from vram_operator.api_wire import (
    Condition,
    Timestamp,
    decode,
    encode,
)
from vram_operator.api_workload import (
    CountOrPercent,
    GpuRequest,
    PodTemplate,
    ResidualPolicy,
    RestartPolicy,
    TargetRef,
    TemplateMetadata,
    Window,
    WorkloadSpec,
)
from vram_operator.api_workload_status import (
    AgentCounts,
    LastRestart,
    ModelStatus,
    ResidualTrend,
    VramFigures,
    WorkloadStatus,
)

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
    "AgentCounts",
    "Attempt",
    "Condition",
    "ConditionStatus",
    "CountOrPercent",
    "EventReason",
    "GpuRequest",
    "LastRestart",
    "MemoryFigures",
    "ModelStatus",
    "PodRef",
    "PodTemplate",
    "Reason",
    "ResidualPolicy",
    "ResidualTrend",
    "RestartCondition",
    "RestartMethod",
    "RestartOutcome",
    "RestartPolicy",
    "RestartSpec",
    "RestartStatus",
    "RestartTrigger",
    "TargetKind",
    "TargetRef",
    "TemplateMetadata",
    "Timestamp",
    "VramFigures",
    "Window",
    "WorkloadCondition",
    "WorkloadSpec",
    "WorkloadStatus",
    "decode",
    "encode",
]
