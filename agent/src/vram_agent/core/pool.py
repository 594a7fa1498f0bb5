"""What a decision rests on, and what it may say: the facts of all models, the steps, the reasons.

Why it exists: the policy is a pure function, and these frozen records are its whole input and
output. Built by the supervisor from the state that it owns; read by ``admission`` and ``policy``.
Times are seconds of one monotonic clock, sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vram_agent.core.dirty import ClosedDevice
from vram_agent.core.ledger import HOST, Ledger
from vram_agent.core.lifecycle import Residence
from vram_agent.protocol import ModelState, OffloadTier, Residency, Tier


class Reason(StrEnum):
    """Why a model moves: the same word in log, metric and report."""

    REQUEST = "Request"
    """A request waits for the model."""
    EAGER = "Eager"
    """Its residency says that it is loaded when the agent starts."""
    CALLED = "Called"
    """A control call asked for it."""
    EVICTED = "Evicted"
    """Another model's request needs the memory."""
    OVER_BUDGET = "OverBudget"
    """More is held than the budget admits: it was lowered, or a model grew."""
    HOST_BUDGET = "HostBudget"
    """Host memory is needed for another model's weights, or its budget was lowered."""
    HOST_PRESSURE = "HostPressure"
    """The container is near its memory limit, whatever the budget says."""
    GROUP_CHANGED = "GroupChanged"
    """Another model of the group is to be loaded, which no live GPU process survives."""
    MOVED = "Moved"
    """Another device has room for it now; its own would keep it waiting."""
    AFTER_TASK = "AfterTask"
    KEEP_ALIVE = "KeepAlive"
    """The time that the last request asked to keep the model for is over."""
    IDLE = "Idle"
    """Unused for idleTimeoutSeconds."""
    FAILED = "Failed"
    """It cannot be restored: its weights only take memory."""
    UNUSED_PROCESS = "UnusedProcess"
    """The GPU process holds no model any more."""
    CONFIG_CHANGED = "ConfigChanged"
    RECYCLE = "Recycle"
    WORKER_DIED = "WorkerDied"
    OVERSIZE = "Oversize"
    """The model fits into no device or not into the budget, whatever else leaves."""
    NO_VRAM = "NoVram"
    """The memory that is missing is held by no model of this pod that could leave."""


class CommandKind(StrEnum):
    """What a caller may ask of a model without a task."""

    LOAD = "load"
    EAGER = "eager"
    """As LOAD, but never at another model's cost."""
    OFFLOAD = "offload"
    UNLOAD = "unload"


class StepKind(StrEnum):
    """What the supervisor is to do next. The first four are transitions of a whole group."""

    LOAD = "load"
    RESTORE = "restore"
    OFFLOAD = "offload"
    """To PinnedHost: the GPU process lives on."""
    END_GPU = "end_gpu"
    """To Host: every model of the group."""
    UNLOAD = "unload"
    """To Disk; the group's other models lose their GPU process and keep their host memory."""
    RUN = "run"
    REFUSE = "refuse"
    """Answer everything that waits for the model with the message."""
    FINISH = "finish"
    """The model's first command is fulfilled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do now, and why."""

    kind: StepKind
    model: str
    reason: Reason
    device: str = ""
    needed_bytes: int = 0
    beneficiary: str = ""
    """Whom an eviction serves."""
    message: str = ""
    is_permanent: bool = False
    """Of a refusal: no waiting helps, only another config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """The first command that waits for a model."""

    kind: CommandKind
    tier: OffloadTier = OffloadTier.PINNED_HOST


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One model at the moment of a decision."""

    name: str
    group: str
    residence: Residence
    residency: Residency = field(default_factory=Residency)
    priority: int = 0
    leases: int = 0
    queued: int = 0
    arrival: int = 0
    """Number of the oldest waiting request; orders models that were served at the same time."""
    last_used_at: float = 0.0
    resident_since: float = float("-inf")
    """Lowest for a model that never was: it has its turn first."""
    last_run: int = 0
    """Number of the model's last task; the lowest of a group runs next."""
    turn_seconds: float = 1.0
    """How long a model with a queue may keep others waiting for its memory."""
    keep_alive_seconds: float | None = None
    command: Command | None = None
    called_tier: OffloadTier | None = None
    """Where a caller wants it until it is used again; its group may keep it from there yet."""
    needed_bytes: int = 0
    """Expected peak in VRAM; 0 where nothing is known yet."""
    device: str = ""
    """Where its config says that it must go; empty: anywhere."""
    missing_device: str = ""
    """The index that its config names and no device of the pod has."""
    loads_on_device: bool = False
    """It has no template: leaving the GPU process means leaving altogether."""
    is_retiring: bool = False
    """The config changed it or took it away: it leaves as soon as no task runs on it."""
    not_before: float = float("-inf")
    """The kernel ended it for want of host memory: when it may be tried again."""
    short_since: float | None = None
    """Since when memory that no model of ours holds is missing for it."""
    out_of_vram_on: frozenset[str] = frozenset()
    """Devices that refused it although the figures said that it fits."""

    @property
    def is_resident(self) -> bool:
        """Whether tasks can run on it."""
        return self.residence.state is ModelState.RESIDENT

    @property
    def wants_vram(self) -> bool:
        """Whether something waits for it to be resident."""
        return not self.is_retiring and (
            self.queued > 0
            or (
                self.command is not None
                and self.command.kind in (CommandKind.LOAD, CommandKind.EAGER)
            )
        )

    @property
    def is_on_disk(self) -> bool:
        """Whether it must be loaded before it can be restored."""
        return self.residence.tier is Tier.DISK


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts:
    """One group at the moment of a decision."""

    is_busy: bool = False
    """A transition or a task runs; a group does one thing at a time."""
    has_gpu_process: bool = False
    is_orphaned: bool = False
    """The template died: what leaves the GPU process is lost."""
    device_bytes: int | None = None
    device: str = ""
    """Where its GPU process is; empty while there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Everything a decision rests on."""

    models: tuple[ModelFacts, ...]
    groups: Mapping[str, GroupFacts]
    vram: Ledger
    host: Ledger
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    """Measured on each device, less the headroom; a device that is not here is not judged by it."""
    host_room_bytes: int | None = None
    """What the container may still take before it is near its memory limit, negative when it is;
    None where nothing limits it."""
    closed: Mapping[str, ClosedDevice] = field(default_factory=dict)
    """Devices where no GPU process may begin now, since others use them."""

    def model(self, name: str) -> ModelFacts:
        """Return the facts of one model."""
        return next(model for model in self.models if model.name == name)

    def mates(self, model: ModelFacts) -> Iterator[ModelFacts]:
        """The other models of the model's group."""
        return (m for m in self.models if m.group == model.group and m.name != model.name)

    def is_free(self, model: ModelFacts) -> bool:
        """Whether the model's group can do something now."""
        return not self.groups[model.group].is_busy

    def is_charged_on(self, model: ModelFacts, device: str) -> bool:
        """Whether the model is charged on that device."""
        charge = self.vram.charges.get(model.name)
        return charge is not None and charge.device == device

    @property
    def host_left_bytes(self) -> int:
        """What budget and container still admit in host memory."""
        left = self.host.available_bytes(HOST)
        return left if self.host_room_bytes is None else min(left, self.host_room_bytes)

    def held_bytes(self, model: ModelFacts) -> int:
        """What the model is charged."""
        charge = self.vram.charges.get(model.name)
        return 0 if charge is None else charge.held_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The next step, or none; when to ask again if nothing happens; who lacks foreign memory."""

    step: Step | None = None
    requeue_at: float | None = None
    short: frozenset[str] = frozenset()
    waits: Mapping[str, str] = field(default_factory=dict)
    """What models wait for that no model of ours will bring about, in words."""
