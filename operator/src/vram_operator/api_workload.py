"""GPUModelWorkload: which models a workload serves, and when its pods are restarted.

Why it exists: the one definition from which the CRD is generated and with which the operator
reads specs and writes status. Descriptions are what ``kubectl explain`` shows; rules are CEL,
checked by the apiserver. Used through ``vram_operator.api``. It knows no I/O.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, field
from vram_agent.protocol import HostMemoryPolicy, ModelSpec, Quantity, QueuePolicy, VramPolicy

from vram_operator.api_names import RestartMethod, TargetKind
from vram_operator.api_rules import (
    MODEL_RULES,
    RESTART_POLICY_RULES,
    TARGET_REF_RULES,
    THRESHOLD_RULES,
    TIME_ZONE_RULES,
)
from vram_operator.api_wire import DrainTimeoutSeconds, Spec

_CRON_FIELD = r"[0-9A-Za-z*/,#?-]+"
_CRON = (
    rf"@(yearly|annually|monthly|weekly|daily|midnight|hourly)|{_CRON_FIELD}(\s+{_CRON_FIELD}){{4}}"
)

TimeZone = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}$",
        description="Time zone of the schedule, an IANA name such as Asia/Shanghai.",
        extra_json_schema=TIME_ZONE_RULES,
    ),
]
CountOrPercent = (
    Annotated[int, Meta(ge=1, le=10_000)]
    | Annotated[str, Meta(pattern="^([1-9][0-9]?|100)%$", max_length=4)]
)


class TargetRef(Spec, frozen=True, kw_only=True):
    """A Deployment or StatefulSet of the same namespace."""

    api_version: Annotated[
        Literal["apps/v1"], Meta(description="API version of the target: apps/v1.")
    ] = "apps/v1"
    kind: Annotated[TargetKind, Meta(description="Kind of the target.")]
    name: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=253,
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
            description="Name of the target, in the namespace of the workload.",
        ),
    ]


class GpuRequest(Spec, frozen=True, kw_only=True):
    """What GPU each pod asks for."""

    resource: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=253,
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
            description="Extended resource that stands for a GPU, for example nvidia.com/gpu or "
            "nvidia.com/mig-1g.10gb.",
        ),
    ] = "nvidia.com/gpu"
    count: Annotated[
        int, Meta(ge=0, le=64, description="How many of it each pod gets; 0: run on the CPU.")
    ] = 1


class TemplateMetadata(Spec, frozen=True, kw_only=True):
    """Labels and annotations for the pods."""

    labels: Annotated[
        dict[str, Annotated[str, Meta(max_length=63)]],
        Meta(max_length=64, description="Labels added to the pods; vram.dev/workload is set."),
    ] = field(default_factory=dict)
    annotations: Annotated[
        dict[str, str], Meta(max_length=64, description="Annotations added to the pods.")
    ] = field(default_factory=dict)


class PodTemplate(Spec, frozen=True, kw_only=True):
    """How the operator runs the agent for a workload that it owns."""

    replicas: Annotated[
        int, Meta(ge=0, le=10_000, description="How many pods; also set through kubectl scale.")
    ] = 1
    image: Annotated[
        str,
        Meta(
            max_length=512, description="Image of the agent; empty: the operator's --agent-image."
        ),
    ] = ""
    gpu: Annotated[GpuRequest, Meta(description="What GPU each pod asks for.")] = field(
        default_factory=GpuRequest
    )
    spec: Annotated[
        dict[str, Any],
        Meta(
            description="A partial PodSpec, merged over the generated one: containers, volumes, "
            "mounts and environment by their names. The agent's container is named agent. Put "
            "resources, tolerations and the volumes that hold the models here."
        ),
    ] = field(default_factory=dict)
    metadata: Annotated[
        TemplateMetadata, Meta(description="Labels and annotations for the pods.")
    ] = field(default_factory=TemplateMetadata)


class ResidualPolicy(Spec, frozen=True, kw_only=True):
    """When device memory that no resident model accounts for leads to a restart."""

    threshold: Annotated[
        Quantity,
        Meta(
            min_length=1,
            description="Residual above which a pod is restarted. Residual is the device memory "
            "that the pod holds beyond its resident models, its CUDA context included.",
            extra_json_schema=THRESHOLD_RULES,
        ),
    ]
    for_seconds: Annotated[
        int,
        Meta(ge=0, le=86_400, description="For how long the residual has to stay above it."),
    ] = 60
    min_samples: Annotated[
        int,
        Meta(ge=1, le=1_000, description="How many fresh reports in a row have to show it."),
    ] = 3


class Window(Spec, frozen=True, kw_only=True):
    """A recurring time in which residual restarts may run."""

    schedule: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=128,
            pattern=f"^({_CRON})$",
            description="When the window opens, in CronJob syntax: minute, hour, day of month, "
            "month, day of week.",
        ),
    ]
    time_zone: TimeZone = "Etc/UTC"
    duration_seconds: Annotated[
        int, Meta(ge=60, le=604_800, description="For how long the window stays open.")
    ]


class RestartPolicy(Spec, frozen=True, kw_only=True):
    """When and how the workload's pods are restarted."""

    schedule: Annotated[
        str,
        Meta(
            max_length=128,
            pattern=f"^({_CRON})?$",
            description="When every pod is restarted, in CronJob syntax: minute, hour, day of "
            "month, month, day of week; for example 0 3 * * * for every night at three. Empty or "
            "absent: never.",
        ),
    ] = ""
    time_zone: TimeZone = "Etc/UTC"
    starting_deadline_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=604_800,
            description="A scheduled restart that was missed or blocked is made up for within "
            "this time, once; after it, it is Skipped.",
        ),
    ] = 3600
    suspend: Annotated[
        bool, Meta(description="True stops scheduled and residual restarts, not manual ones.")
    ] = False
    residual: Annotated[
        ResidualPolicy | None,
        Meta(description="Restart pods that hold memory without a model. Absent: never."),
    ] = None
    windows: Annotated[
        list[Window],
        Meta(
            max_length=16,
            description="Residual restarts run only inside one of these; none: at any time. "
            "Scheduled and manual restarts are not bound by them.",
        ),
    ] = field(default_factory=list)
    method: Annotated[
        RestartMethod,
        Meta(
            description="Auto: the mildest first, the next only while the residual remains. "
            "Recycle: end and respawn the GPU processes inside the container. InPlace: let the "
            "container exit, so that the pod keeps its GPU. Evict: through the Eviction API. "
            "Delete: needs the operator's --allow-delete."
        ),
    ] = RestartMethod.AUTO
    max_unavailable: Annotated[
        CountOrPercent,
        Meta(
            description="How many of the workload's pods may be unavailable through restarts: a "
            "number, or a percentage of the replicas, rounded down, at least one."
        ),
    ] = 1
    drain_timeout_seconds: DrainTimeoutSeconds = 300
    cooldown_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=604_800,
            description="Least time between two restarts of one pod; at least 630 with the "
            "methods Auto and InPlace, since the kubelet's back-off resets after 600 s.",
        ),
    ] = 660
    max_consecutive_failures: Annotated[
        int,
        Meta(
            ge=1,
            le=100,
            description="After so many restarts that did not help, the workload is Degraded and "
            "gets no further residual restart until one helps or the spec changes.",
        ),
    ] = 3
    dry_run: Annotated[
        bool, Meta(description="True: decide and record restarts, and carry none out.")
    ] = False


_WORKLOAD_MODEL: dict[str, Any] = MODEL_RULES | {
    # Options are free-form; this one is named, since a rule cannot see what a schema does not name.
    "properties": {
        "options": {
            "properties": {
                "loadsOn": {
                    "description": "For the runtime Python: cuda where the code insists on CUDA "
                    "while it loads. Such a model has the tiers PinnedHost and Disk only.",
                    "type": "string",
                    "maxLength": 16,
                }
            }
        }
    }
}


class WorkloadSpec(Spec, frozen=True, kw_only=True):
    """What is wanted of a GPUModelWorkload."""

    target_ref: Annotated[
        TargetRef | None,
        Meta(
            description="Watch over pods that someone else runs: a Deployment or StatefulSet "
            "whose pods carry the label vram.dev/workload with this workload's name. Exactly one "
            "of targetRef and template; immutable.",
            extra_json_schema=TARGET_REF_RULES,
        ),
    ] = None
    template: Annotated[
        PodTemplate | None,
        Meta(
            description="Let the operator run the pods: it owns a Deployment, a Service and a "
            "ConfigMap of this workload's name. Exactly one of targetRef and template."
        ),
    ] = None
    models: Annotated[
        list[Annotated[ModelSpec, Meta(extra_json_schema=_WORKLOAD_MODEL)]],
        Meta(
            max_length=64,
            description="The models that the pods serve, by name. Required with template; with "
            "targetRef they are pushed to the agents, and left to them when absent.",
            extra_json_schema={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = field(default_factory=list)
    vram: Annotated[
        VramPolicy, Meta(description="How much VRAM the models of one pod may hold.")
    ] = field(default_factory=VramPolicy)
    host_memory: Annotated[
        HostMemoryPolicy, Meta(description="How much host memory offloaded weights may take.")
    ] = field(default_factory=HostMemoryPolicy)
    queue: Annotated[
        QueuePolicy, Meta(description="How many requests wait for a model, and how long.")
    ] = field(default_factory=QueuePolicy)
    restart: Annotated[
        RestartPolicy,
        Meta(
            description="When and how the pods are restarted.",
            extra_json_schema=RESTART_POLICY_RULES,
        ),
    ] = field(default_factory=RestartPolicy)


__all__ = [
    "CountOrPercent",
    "GpuRequest",
    "PodTemplate",
    "ResidualPolicy",
    "RestartPolicy",
    "TargetRef",
    "TemplateMetadata",
    "Window",
    "WorkloadSpec",
]
