"""What a person writes: shared by GPUModelWorkload.spec and the agent's config file. Pure.

Unknown fields are errors. The descriptions become the CRD's, and so what ``kubectl explain`` says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from vram_agent.protocol.names import (
    CONTROL_PORT,
    DEFAULT_PUBLIC_KEY_FILE,
    SERVING_PORT,
    AfterCrash,
    AfterTask,
    DevicePreference,
    DirtyAction,
    DnsLabel,
    LoadPolicy,
    OffloadTier,
    Runtime,
)
from vram_agent.protocol.quantity import Quantity


class _Spec(
    Struct,
    rename="camel",
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """Base of what a person writes: unknown fields are errors, defaults stay unwritten."""


class Residency(_Spec, frozen=True, kw_only=True):
    """When a model is in VRAM, and where it goes when it is not."""

    load: Annotated[
        LoadPolicy,
        Meta(description="Lazy: at the first request. Eager: when the agent starts."),
    ] = LoadPolicy.LAZY
    after_task: Annotated[
        AfterTask,
        Meta(
            description="What happens when the last task has ended: Offload moves the weights to "
            "offloadTier at once, Keep leaves them in VRAM until the idle timeout or an eviction."
        ),
    ] = AfterTask.OFFLOAD
    offload_tier: Annotated[
        OffloadTier,
        Meta(
            description="Where the weights go after a task. PinnedHost: page-locked host memory of "
            "a live GPU process, whose CUDA context stays. Host: shared host memory, no GPU "
            "process, zero VRAM. Disk: nothing is kept."
        ),
    ] = OffloadTier.PINNED_HOST
    idle_timeout_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=31_536_000,
            description="Unused for this many seconds, a model sinks to idleTier. 0: never.",
        ),
    ] = 600
    idle_tier: Annotated[
        OffloadTier,
        Meta(description="Where an idle model sinks to; see offloadTier for the tiers."),
    ] = OffloadTier.HOST


class ModelSpec(_Spec, frozen=True, kw_only=True):
    """One model: what it is, where it comes from and when it is in VRAM."""

    name: Annotated[DnsLabel, Meta(description="Name in every API and metric; a DNS label.")]
    runtime: Annotated[Runtime, Meta(description="The library that loads and runs the model.")]
    source: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=1024,
            description="A path in the pod, or a hub name that the runtime understands. For the "
            "runtime Python: module:factory.",
        ),
    ]
    options: Annotated[
        dict[str, Any],
        Meta(description="Passed to the runtime's loader; each runtime documents its own."),
    ] = field(default_factory=dict)
    vram: Annotated[
        Quantity,
        Meta(description="Expected peak of VRAM; learned from the first load when absent."),
    ] = ""
    group: Annotated[
        str,
        Meta(
            max_length=63,
            description="Models of one group share one GPU process; empty: a process of its own.",
        ),
    ] = ""
    device: Annotated[
        str,
        Meta(
            max_length=8,
            pattern="^([0-9]+)?$",
            description="Index among the pod's devices; empty: placed by free VRAM.",
        ),
    ] = ""
    priority: Annotated[
        int,
        Meta(
            ge=-1_000_000, le=1_000_000, description="Models of higher priority are evicted later."
        ),
    ] = 0
    residency: Annotated[
        Residency, Meta(description="When the model is in VRAM, and where it goes when it is not.")
    ] = field(default_factory=Residency)


class DirtyPolicy(_Spec, frozen=True, kw_only=True):
    """What to do where a device is in use before this pod's first context there."""

    above: Annotated[
        Quantity,
        Meta(description="A device with more than this in use by others is dirty; empty: never."),
    ] = "1Gi"
    policy: Annotated[
        DirtyAction,
        Meta(
            description="Report: say so in report and metrics, and go on. Wait: no model goes "
            "there until the use has fallen; its requests wait. Refuse: its requests get 503."
        ),
    ] = DirtyAction.REPORT


class VramPolicy(_Spec, frozen=True, kw_only=True):
    """How much VRAM the models of one pod may hold."""

    budget: Annotated[
        Quantity,
        Meta(description="Most VRAM that this pod's models may hold; empty: the devices' total."),
    ] = ""
    headroom: Annotated[Quantity, Meta(description="VRAM kept free on each device.")] = "512Mi"
    warn_above: Annotated[
        Quantity,
        Meta(description="Above this use of VRAM the condition VRAMHigh is set; empty: never."),
    ] = ""
    dirty: Annotated[
        DirtyPolicy | None,
        Meta(
            description="What to do with a device that others use already. Absent: Report above "
            "1Gi."
        ),
    ] = None


class HostMemoryPolicy(_Spec, frozen=True, kw_only=True):
    """How much host memory offloaded weights may take."""

    budget: Annotated[
        Quantity,
        Meta(description="Most host memory for weights; empty: 80 % of the container's limit."),
    ] = ""


class QueuePolicy(_Spec, frozen=True, kw_only=True):
    """How many requests wait for a model, and how long."""

    max_depth: Annotated[
        int,
        Meta(ge=1, le=100_000, description="Most waiting requests of one model; beyond: 429."),
    ] = 256
    timeout_seconds: Annotated[
        int, Meta(ge=1, le=86_400, description="Longest wait of a request; beyond: 504.")
    ] = 300


class Listen(_Spec, frozen=True, kw_only=True):
    """Addresses the agent listens on, ``host:port``; port 0 takes a free one."""

    serving: str = f"0.0.0.0:{SERVING_PORT}"
    control: str = f"0.0.0.0:{CONTROL_PORT}"


class ControlPolicy(_Spec, frozen=True, kw_only=True):
    """Whose control calls an agent obeys."""

    public_key_file: str = DEFAULT_PUBLIC_KEY_FILE
    allow_unsigned: bool = False


class ServingPolicy(_Spec, frozen=True, kw_only=True):
    """Whose requests an agent serves."""

    api_key_file: str = ""


class Limits(_Spec, frozen=True, kw_only=True):
    """Bounds on what one request may bring."""

    request_bytes: Quantity = "64Mi"


class DrainPolicy(_Spec, frozen=True, kw_only=True):
    """How long accepted requests may take once the agent is told to stop."""

    grace_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 25


class ReadyProbe(_Spec, frozen=True, kw_only=True):
    """How a wrapped application says that it takes requests; both empty: it does once it runs.

    ``http``: a GET of this URL answers 200 to 399. ``tcp``: ``host:port`` takes a connection.
    """

    http: str = ""
    tcp: str = ""


class IdleProbe(_Spec, frozen=True, kw_only=True):
    """How a wrapped application says that it has nothing to do.

    ``http``: a GET of this URL answers 200 when idle. Empty: it is idle once its processes used
    less than ``cpu_percent`` of one core, and held the same memory, for ``quiet_seconds``.
    """

    http: str = ""
    cpu_percent: Annotated[int, Meta(ge=1, le=100_000)] = 5
    quiet_seconds: Annotated[int, Meta(ge=1, le=86_400)] = 10


class DrainHook(_Spec, frozen=True, kw_only=True):
    """How a wrapped application is told to take no new requests; empty: by SIGTERM.

    ``http``: a POST of this URL begins, a DELETE takes it back. 200: drained; 202: wait until idle.
    """

    http: str = ""


class RunPolicy(_Spec, frozen=True, kw_only=True):
    """What ``vram-agent run`` knows of the application that it wraps."""

    ready: ReadyProbe = field(default_factory=ReadyProbe)
    idle: IdleProbe = field(default_factory=IdleProbe)
    drain: DrainHook = field(default_factory=DrainHook)
    after_crash: AfterCrash = AfterCrash.END


class ConfigMetadata(_Spec, frozen=True, kw_only=True):
    """What the writer of a config says of it."""

    generation: Annotated[int, Meta(ge=0)] = 0


class AgentConfig(_Spec, frozen=True, kw_only=True):
    """The agent's whole configuration, as in its file and in ``PUT /config``."""

    api_version: Literal["vram.dev/v1alpha1"] = "vram.dev/v1alpha1"
    kind: Literal["AgentConfig"] = "AgentConfig"
    metadata: ConfigMetadata = field(default_factory=ConfigMetadata)
    models: list[ModelSpec] = field(default_factory=list)
    vram: VramPolicy = field(default_factory=VramPolicy)
    host_memory: HostMemoryPolicy = field(default_factory=HostMemoryPolicy)
    queue: QueuePolicy = field(default_factory=QueuePolicy)
    device: DevicePreference = DevicePreference.AUTO
    listen: Listen = field(default_factory=Listen)
    control: ControlPolicy = field(default_factory=ControlPolicy)
    serving: ServingPolicy = field(default_factory=ServingPolicy)
    limits: Limits = field(default_factory=Limits)
    drain: DrainPolicy = field(default_factory=DrainPolicy)
    run: RunPolicy = field(default_factory=RunPolicy)
