"""The words that the agent, the operator and the custom resources share.

Why it exists: a model, its residency and its report have one definition each, so that the CRD,
the agent's config file and the operator's plan cannot drift apart. Called by everything; the
operator imports this module and nothing else of the agent. It knows no I/O, no clock and no
framework.

Units: ``…_bytes`` are bytes, ``…_seconds`` are seconds, ``Quantity`` is a Kubernetes quantity
string such as ``3Gi``. On the wire every name is camelCase.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

API_VERSION = "vram.dev/v1alpha1"
REPORT_PROTOCOL = "v1"
WORKLOAD_LABEL = "vram.dev/workload"
CONTROL_PORT_ANNOTATION = "vram.dev/control-port"
RESTART_ANNOTATION = "vram.dev/restart"
SERVING_PORT = 8000
CONTROL_PORT = 8001
DEFAULT_PUBLIC_KEY_FILE = "/etc/vram-agent/keys.pem"
STATE_DIRECTORY = "/var/lib/vram-agent"
MAX_TOKEN_LIFETIME_SECONDS = 60

Quantity = Annotated[
    str,
    Meta(
        pattern=r"^([0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?)?$",
        max_length=32,
    ),
]
DnsLabel = Annotated[
    str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)
]

_SUFFIXES = {
    "": 1,
    **{suffix: 1024 ** (n + 1) for n, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
    **{suffix: 1000 ** (n + 1) for n, suffix in enumerate(("k", "M", "G", "T", "P", "E"))},
}
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E|)$")


class InvalidQuantityError(ValueError):
    """A text is no Kubernetes quantity of bytes; the message names it and shows a good one."""


def parse_quantity(text: str) -> int:
    """Return the bytes that a Kubernetes quantity such as ``512Mi`` or ``1.5G`` stands for.

    Raises InvalidQuantityError. Fractions of a byte are rounded up, as the apiserver does.
    """
    match = _QUANTITY.match(text.strip())
    if match is None:
        raise InvalidQuantityError(f"{text!r} is not a quantity of bytes; write for example 3Gi")
    try:
        value = Decimal(match[1]) * _SUFFIXES[match[2]]
    except InvalidOperation as error:  # pragma: no cover - the pattern admits digits only
        raise InvalidQuantityError(f"{text!r} is not a quantity of bytes") from error
    return int(value.to_integral_value(rounding="ROUND_CEILING"))


def format_quantity(number_of_bytes: int) -> str:
    """Return bytes as the shortest exact binary quantity, ``0`` for none."""
    for suffix in ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki"):
        unit = _SUFFIXES[suffix]
        if number_of_bytes and number_of_bytes % unit == 0:
            return f"{number_of_bytes // unit}{suffix}"
    return str(number_of_bytes)


class Runtime(StrEnum):
    """Which library loads and runs a model."""

    WHISPER = "Whisper"
    FUNASR = "FunASR"
    ONNX = "ONNX"
    TORCH = "Torch"
    TRANSFORMERS = "Transformers"
    PYTHON = "Python"


class Tier(StrEnum):
    """Where the weights of a model are now."""

    VRAM = "VRAM"
    PINNED_HOST = "PinnedHost"
    HOST = "Host"
    DISK = "Disk"


class OffloadTier(StrEnum):
    """Where the weights go when a model leaves VRAM."""

    PINNED_HOST = "PinnedHost"
    HOST = "Host"
    DISK = "Disk"


class LoadPolicy(StrEnum):
    """When a model is loaded first."""

    LAZY = "Lazy"
    EAGER = "Eager"


class AfterTask(StrEnum):
    """What happens to a model when its last task has ended."""

    OFFLOAD = "Offload"
    KEEP = "Keep"


class ModelState(StrEnum):
    """Where a model is in its life."""

    ABSENT = "Absent"
    LOADING = "Loading"
    RESIDENT = "Resident"
    OFFLOADING = "Offloading"
    OFFLOADED = "Offloaded"
    RESTORING = "Restoring"
    FAILED = "Failed"


class DeviceKind(StrEnum):
    """What kind of memory a device has."""

    CUDA = "CUDA"
    MIG = "MIG"
    CPU = "CPU"


class DevicePreference(StrEnum):
    """Which device an agent uses; Auto takes CUDA where there is one."""

    AUTO = "Auto"
    CUDA = "CUDA"
    CPU = "CPU"


class ResidualSource(StrEnum):
    """How far a residual can be trusted. A restart never rests on UNKNOWN."""

    EXCLUSIVE = "Exclusive"
    SELF = "Self"
    PROCESS = "Process"
    UNKNOWN = "Unknown"


class AgentMode(StrEnum):
    """How the agent lives beside the application."""

    SERVE = "Serve"
    RUN = "Run"
    EMBED = "Embed"


class ActionStep(StrEnum):
    """A remedy that the agent itself carries out."""

    RECYCLE = "Recycle"
    IN_PLACE = "InPlace"


class ActionState(StrEnum):
    """How far an action of the agent has come."""

    DRAINING = "Draining"
    ACTING = "Acting"
    DONE = "Done"
    FAILED = "Failed"


class _Spec(
    Struct,
    rename="camel",
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """Base of what a person writes: unknown fields are errors, defaults stay unwritten."""


class _Wire(Struct, rename="camel", frozen=True, kw_only=True):
    """Base of what programs exchange: everything is written, unknown fields are ignored."""


# --- what a person writes: shared by GPUModelWorkload.spec and AgentConfig ------------------------


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


class Limits(_Spec, frozen=True, kw_only=True):
    """Bounds on what one request may bring."""

    request_bytes: Quantity = "64Mi"


class DrainPolicy(_Spec, frozen=True, kw_only=True):
    """How long accepted requests may take once the agent is told to stop."""

    grace_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 25


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
    limits: Limits = field(default_factory=Limits)
    drain: DrainPolicy = field(default_factory=DrainPolicy)


# --- what programs exchange: GET /report and the control calls ------------------------------------


class PodIdentity(_Wire, frozen=True, kw_only=True):
    """The pod an agent runs in; empty outside Kubernetes."""

    namespace: str = ""
    name: str = ""
    uid: str = ""


class AgentIdentity(_Wire, frozen=True, kw_only=True):
    """Which agent speaks. ``boot_id`` changes with PID 1, ``epoch`` counts recycles."""

    version: str
    mode: AgentMode
    boot_id: str = field(name="bootID")
    epoch: int
    started_at: str
    pod: PodIdentity


class DeviceReport(_Wire, frozen=True, kw_only=True):
    """One device as the driver sees it."""

    uuid: str
    index: int
    kind: DeviceKind
    total_bytes: int
    used_bytes: int
    exclusive: bool


class MemoryClasses(_Wire, frozen=True, kw_only=True):
    """The residual by what holds it; each class has its own remedy."""

    live_tensors: int = 0
    allocator_cache: int = 0
    runtime_arena: int = 0
    context_and_libraries: int = 0
    other_processes: int = 0
    unattributed: int = 0


class MemoryReport(_Wire, frozen=True, kw_only=True):
    """Device memory that the pod holds, and what of it is no resident model."""

    source: ResidualSource
    used_bytes: int
    model_bytes: int
    residual_bytes: int
    host_bytes: int
    classes: MemoryClasses


class Transition(_Wire, frozen=True, kw_only=True):
    """The last change of a model's state; ``message`` says what was unusual about it."""

    kind: str
    seconds: float
    at: str
    message: str = ""


class ModelReport(_Wire, frozen=True, kw_only=True):
    """One model as the supervisor knows it."""

    name: str
    runtime: Runtime
    state: ModelState
    tier: Tier
    vram_bytes: int
    host_bytes: int
    in_flight: int
    queued: int
    last_used_at: str | None = None
    last_transition: Transition | None = None
    error: str | None = None


class ActionReport(_Wire, frozen=True, kw_only=True):
    """The last Recycle or InPlace that the agent was asked for."""

    restart_id: str = field(name="restartID")
    step: ActionStep
    state: ActionState
    at: str
    message: str = ""


class Report(_Wire, frozen=True, kw_only=True):
    """What an agent says of itself at ``GET /report``."""

    agent: AgentIdentity
    sequence: int
    observed_at: str
    config_generation: int
    devices: list[DeviceReport]
    memory: MemoryReport
    models: list[ModelReport]
    idle: bool
    idle_since: str | None
    draining: bool
    action: ActionReport | None = None
    protocol: str = REPORT_PROTOCOL


class RestartRequest(_Wire, frozen=True, kw_only=True):
    """Body of ``POST /recycle`` and ``POST /restart``."""

    restart_id: Annotated[str, Meta(min_length=1, max_length=253)] = field(name="restartID")
    drain_timeout_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 300
