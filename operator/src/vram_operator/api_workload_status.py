"""Status of a GPUModelWorkload: what the operator sees of a workload.

Why it exists: the one definition from which the CRD is generated and with which the operator
writes status. Used through ``vram_operator.api``. It knows no I/O. Live figures are not here but
in the operator's metrics, so that a status is written on transitions only.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field
from vram_agent.protocol import DnsLabel, Quantity

from vram_operator.api_names import RestartMethod, RestartOutcome, RestartTrigger
from vram_operator.api_wire import MAP_BY_TYPE, Condition, ObservedGeneration, Status, Timestamp


class AgentCounts(Status, frozen=True, kw_only=True):
    """How many agents there should be, and how many report."""

    expected: Annotated[int, Meta(ge=0, description="Running pods of the workload.")] = 0
    reporting: Annotated[int, Meta(ge=0, description="Those whose report is fresh.")] = 0


class ResidualTrend(Status, frozen=True, kw_only=True):
    """Where a growing residual leads, by the pod that comes to it first."""

    pod: Annotated[str, Meta(max_length=253, description="Name of the pod.")]
    growth_per_hour: Annotated[
        Quantity, Meta(description="By how much its residual grows in an hour.")
    ]
    threshold_time: Annotated[
        Timestamp | None,
        Meta(description="When its residual is predicted to pass restart.residual.threshold."),
    ] = None
    out_of_memory_time: Annotated[
        Timestamp | None,
        Meta(description="When its residual is predicted to have filled the device."),
    ] = None


class VramFigures(Status, frozen=True, kw_only=True):
    """Sums over the workload's pods, rounded to 256Mi."""

    used: Annotated[Quantity, Meta(description="Device memory that the pods hold.")] = "0"
    residual: Annotated[
        Quantity, Meta(description="Of it, what no resident model accounts for.")
    ] = "0"
    models: Annotated[Quantity, Meta(description="Of it, what resident models hold.")] = "0"
    trend: Annotated[
        ResidualTrend | None,
        Meta(
            description="Where the residual leads; absent while it does not grow, or leads nowhere "
            "within 30 days. Written again when it moves by about a quarter."
        ),
    ] = None


class ModelStatus(Status, frozen=True, kw_only=True):
    """On how many pods a model is where."""

    name: Annotated[DnsLabel, Meta(description="Name of the model.")]
    resident: Annotated[int, Meta(ge=0, description="Pods that hold it in VRAM.")] = 0
    offloaded: Annotated[int, Meta(ge=0, description="Pods that hold it in host memory.")] = 0
    failed: Annotated[int, Meta(ge=0, description="Pods on which it is Failed.")] = 0
    message: Annotated[
        str, Meta(max_length=1024, description="Why it failed, from one of those pods.")
    ] = ""


class LastRestart(Status, frozen=True, kw_only=True):
    """The last restart of a pod of this workload that has ended."""

    name: Annotated[str, Meta(max_length=253, description="Name of its GPUPodRestart.")]
    trigger: Annotated[RestartTrigger, Meta(description="Why it was asked for.")]
    method: Annotated[RestartMethod, Meta(description="The last step that was taken.")]
    outcome: Annotated[RestartOutcome, Meta(description="How it ended.")]
    reclaimed: Annotated[
        Quantity, Meta(description="Residual before minus residual after, not below zero.")
    ] = "0"
    time: Annotated[Timestamp, Meta(description="When it ended.")]


class WorkloadStatus(Status, frozen=True, kw_only=True):
    """What the operator sees of a GPUModelWorkload. Live figures are in its metrics."""

    observed_generation: ObservedGeneration = 0
    conditions: Annotated[
        list[Condition],
        Meta(
            max_length=32,
            description="Accepted, Ready, AgentsReporting, ResidualHigh, VRAMHigh, Restarting, "
            "RestartBlocked and Degraded, all from the first visit on.",
            extra_json_schema=MAP_BY_TYPE,
        ),
    ] = field(default_factory=list)
    selector: Annotated[
        str, Meta(max_length=512, description="Label selector of the pods, for autoscalers.")
    ] = ""
    target: Annotated[
        str, Meta(max_length=320, description="Kind and name of what runs the pods.")
    ] = ""
    replicas: Annotated[int, Meta(ge=0, description="Pods that exist.")] = 0
    ready_replicas: Annotated[int, Meta(ge=0, description="Pods that are ready.")] = 0
    agents: Annotated[
        AgentCounts, Meta(description="How many agents there should be, and how many report.")
    ] = field(default_factory=AgentCounts)
    vram: Annotated[
        VramFigures,
        Meta(
            description="Sums over the pods, rounded to 256Mi; written only when they move by "
            "more than 512Mi or a condition changes."
        ),
    ] = field(default_factory=VramFigures)
    models: Annotated[
        list[ModelStatus],
        Meta(
            max_length=256,
            description="Where each model is.",
            extra_json_schema={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = field(default_factory=list)
    models_summary: Annotated[
        str, Meta(max_length=32, description="Resident models of all, as in 1/2.")
    ] = ""
    next_restart_time: Annotated[
        Timestamp | None, Meta(description="When restart.schedule fires next.")
    ] = None
    last_restart: Annotated[
        LastRestart | None, Meta(description="The last restart that has ended.")
    ] = None


__all__ = [
    "AgentCounts",
    "LastRestart",
    "ModelStatus",
    "ResidualTrend",
    "VramFigures",
    "WorkloadStatus",
]
