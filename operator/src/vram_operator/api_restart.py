"""GPUPodRestart: one restart of one pod, as lock, queue entry and audit record.

Why it exists: the one definition from which the CRD is generated and with which the operator
reads and writes restarts. Used through ``vram_operator.api``. It knows no I/O.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field
from vram_agent.protocol import Quantity

from vram_operator.api_names import RestartMethod, RestartOutcome, RestartTrigger
from vram_operator.api_wire import (
    MAP_BY_TYPE,
    Condition,
    DrainTimeoutSeconds,
    ObservedGeneration,
    Spec,
    Status,
    Timestamp,
)


class PodRef(Spec, frozen=True, kw_only=True):
    """A pod of the same namespace."""

    name: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=253,
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
            description="Name of the pod.",
        ),
    ]
    uid: Annotated[
        str,
        Meta(
            max_length=64,
            description="UID of the pod. May be empty in a manual restart: then the pod of that "
            "name is meant as it is when the operator first sees this object.",
        ),
    ] = ""


class RestartSpec(Spec, frozen=True, kw_only=True):
    """Which pod is restarted, why and how; immutable."""

    workload: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=63,
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
            description="Name of the GPUModelWorkload that the pod belongs to.",
        ),
    ]
    pod: Annotated[PodRef, Meta(description="The pod that is restarted.")]
    trigger: Annotated[
        RestartTrigger,
        Meta(
            description="Why: Scheduled and Residual ones are the operator's; Manual bypasses "
            "windows, cooldown and suspend, never PodDisruptionBudgets."
        ),
    ] = RestartTrigger.MANUAL
    scheduled_time: Annotated[
        Timestamp | None,
        Meta(description="The time of the schedule that this is for; Scheduled only."),
    ] = None
    method: Annotated[
        RestartMethod,
        Meta(
            description="Auto: Recycle first for Residual, InPlace first for Scheduled and "
            "Manual, then the next step while the residual remains. Otherwise this step alone."
        ),
    ] = RestartMethod.AUTO
    drain_timeout_seconds: DrainTimeoutSeconds = 300
    reason: Annotated[
        str, Meta(max_length=1024, description="The evidence, as a sentence with figures.")
    ] = ""


class Attempt(Status, frozen=True, kw_only=True):
    """One step of the ladder."""

    method: Annotated[RestartMethod, Meta(description="The step.")]
    start_time: Annotated[Timestamp, Meta(description="When the operator asked for it.")]
    end_time: Annotated[
        Timestamp | None, Meta(description="When its result was known; absent while it runs.")
    ] = None
    result: Annotated[
        RestartOutcome | None,
        Meta(description="Whether the residual was gone after it; absent while it runs."),
    ] = None
    message: Annotated[str, Meta(max_length=1024, description="What was seen, as a sentence.")] = ""


class MemoryFigures(Status, frozen=True, kw_only=True):
    """What one report said of a pod's device memory."""

    used: Annotated[Quantity, Meta(description="Device memory that the pod held.")] = "0"
    residual: Annotated[
        Quantity, Meta(description="Of it, what no resident model accounted for.")
    ] = "0"
    boot_id: Annotated[
        str, Meta(max_length=128, description="Boot of the agent that reported it.")
    ] = field(default="", name="bootID")


class RestartStatus(Status, frozen=True, kw_only=True):
    """How far a restart has come, and what it gained."""

    observed_generation: ObservedGeneration = 0
    conditions: Annotated[
        list[Condition],
        Meta(
            max_length=16,
            description="Admitted, Drained, Restarted and Recovered; reason and message say what "
            "blocks.",
            extra_json_schema=MAP_BY_TYPE,
        ),
    ] = field(default_factory=list)
    outcome: Annotated[
        RestartOutcome | None, Meta(description="How it ended; absent while it runs.")
    ] = None
    attempts: Annotated[
        list[Attempt],
        Meta(
            max_length=32,
            description="The steps that were taken, in order.",
            extra_json_schema={"x-kubernetes-list-type": "atomic"},
        ),
    ] = field(default_factory=list)
    before: Annotated[
        MemoryFigures | None, Meta(description="The pod's memory before the restart.")
    ] = None
    after: Annotated[
        MemoryFigures | None,
        Meta(
            description="The pod's memory after it; after an eviction the first report of its "
            "replacement."
        ),
    ] = None
    reclaimed: Annotated[
        Quantity | None,
        Meta(description="Residual before minus residual after, not below zero."),
    ] = None
    downtime_seconds: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="For how long the pod was not ready, as Kubernetes saw it."),
    ] = None
    start_time: Annotated[Timestamp | None, Meta(description="When the operator first acted.")] = (
        None
    )
    completion_time: Annotated[Timestamp | None, Meta(description="When it ended.")] = None


__all__ = [
    "Attempt",
    "MemoryFigures",
    "PodRef",
    "RestartSpec",
    "RestartStatus",
]
