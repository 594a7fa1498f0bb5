"""The supervisor's state: models, groups, queues, charges. One writer, one event loop.

Why it exists: everything that changes is in these cells, and only functions that run on the
supervisor's loop touch them. Called by the other modules of this package. It decides nothing and
calls no process.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vram_agent.backend import GroupBackend, LoadedModel, Task, TaskResult
from vram_agent.core.ledger import HOST, UNLIMITED_BYTES, Ledger
from vram_agent.core.lifecycle import ABSENT, Residence
from vram_agent.core.pool import CommandKind
from vram_agent.errors import AgentError, NoSuchModelError
from vram_agent.parts import Parts
from vram_agent.protocol import (
    AgentConfig,
    DeviceReport,
    ModelSpec,
    ModelState,
    OffloadTier,
    Tier,
    Transition,
    parse_quantity,
)
from vram_agent.supervision.sizes import LearnedSize, model_key

FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 60.0
_HOST_SHARE = 0.8


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in a queue, or the one that runs."""

    number: int
    task: Task
    answer: asyncio.Future[TaskResult]
    arrived_at: float
    keep_alive_seconds: float | None = None
    timer: asyncio.TimerHandle | None = None
    parts: Parts | None = None
    """Where parts of its result go as they are made; None where nobody wants any."""


@dataclass(slots=True, eq=False)
class PendingCommand:
    """A caller that waits for a model to be somewhere; no caller waits for an eager load."""

    kind: CommandKind
    tier: OffloadTier
    answer: asyncio.Future[None] | None = None

    def settle(self, error: AgentError | None = None) -> None:
        """Tell the caller, if there still is one."""
        if self.answer is None or self.answer.done():
            return
        if error is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(error)


@dataclass(slots=True, eq=False)
class GroupCell:
    """One group: its processes and what they are doing."""

    name: str
    backend: GroupBackend | None = None
    is_moving: bool = False
    running: ModelCell | None = None
    is_orphaned: bool = False
    death: str = ""
    """How a process of it ended last, in words; empty once its models' states say so."""
    is_starved: bool = False
    """Its template was killed by the kernel, for want of host memory."""
    device: str = ""
    """Where its GPU process is, or is being made; empty while there is none."""

    @property
    def is_busy(self) -> bool:
        """Whether a transition or a task runs."""
        return self.is_moving or self.running is not None


@dataclass(slots=True, eq=False)
class ModelCell:
    """One model."""

    spec: ModelSpec
    group: GroupCell
    residence: Residence = ABSENT
    queue: OrderedDict[int, Waiting] = field(default_factory=OrderedDict)
    """By arrival. Ordered, so that taking the first stays cheap in a long queue."""
    running: Waiting | None = None
    commands: deque[PendingCommand] = field(default_factory=deque)
    loaded: LoadedModel | None = None
    vram_bytes: int = 0
    error: str | None = None
    failures: int = 0
    retry_at: float = 0.0
    restore_deaths: int = 0
    starvations: int = 0
    """How often the kernel ended it for want of host memory since a task of it went well."""
    last_used_at: float = 0.0
    last_used_wall: str | None = None
    resident_since: float = float("-inf")
    """Lowest for a model that never was: it has its turn first."""
    last_run: int = 0
    keep_alive_seconds: float | None = None
    called_tier: OffloadTier | None = None
    """Where a caller wanted it since it was last in VRAM."""
    last_transition: Transition | None = None
    task_seconds: float | None = None
    """Running mean of the tasks' durations; None before the first."""
    restore_seconds: float = 0.0
    short_since: float | None = None
    out_of_vram_on: set[str] = field(default_factory=set)
    waits_for: str = ""
    """What keeps it out of VRAM that no model of ours will end, in words."""
    next_spec: ModelSpec | None = None
    is_retiring: bool = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def is_at_rest_on_disk(self) -> bool:
        """Whether nothing of it is in any memory."""
        return self.residence.tier is Tier.DISK and self.residence.state is not ModelState.LOADING

    @property
    def loads_on_device(self) -> bool:
        """Whether its code insists on CUDA while it loads, so that it has no template."""
        return loads_on_device(self.spec)

    def note_failure(self, message: str, now: float) -> None:
        """Remember why the model failed and when it may be tried again: 1 s, doubling to 60 s."""
        self.error = message
        pause = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(self.failures, 10))
        self.failures += 1
        self.retry_at = now + pause

    def note_starvation(self, message: str, now: float) -> None:
        """As ``note_failure``; a restore in between does not make the pause short again."""
        self.failures = max(self.failures, self.starvations)
        self.starvations += 1
        self.note_failure(message, now)

    def note_success(self) -> None:
        """Forget earlier failures."""
        self.error = None
        self.failures = 0
        self.retry_at = 0.0
        self.restore_deaths = 0
        self.short_since = None
        self.out_of_vram_on.clear()


def loads_on_device(spec: ModelSpec) -> bool:
    """Whether the model's code needs CUDA while it loads (the Python runtime's loadsOn)."""
    return str(spec.options.get("loadsOn", "")).lower() == "cuda"


def group_name(spec: ModelSpec) -> str:
    """The name of a model's group. Model names have no colon, so the two kinds never collide."""
    return f"group:{spec.group}" if spec.group else spec.name


class Fleet:
    """All models and groups of a config, in its order."""

    def __init__(self, config: AgentConfig, host_limit_bytes: int | None) -> None:
        self.config = config
        self.models: dict[str, ModelCell] = {}
        self.groups: dict[str, GroupCell] = {}
        self.devices: list[DeviceReport] = []
        self.remembered: dict[str, LearnedSize] = {}
        """What this boot and earlier ones measured, the latest last."""
        self._host_limit_bytes = host_limit_bytes
        self.vram = Ledger(budget_bytes=UNLIMITED_BYTES, capacity_bytes={})
        self.host = Ledger(budget_bytes=UNLIMITED_BYTES, capacity_bytes={HOST: UNLIMITED_BYTES})
        self.set_limits()
        for spec in config.models:
            self.add(spec)

    def add(self, spec: ModelSpec) -> ModelCell:
        """Add a model at rest."""
        cell = ModelCell(spec=spec, group=self.ensure_group(group_name(spec)))
        self.models[spec.name] = cell
        self.recall(cell)
        return cell

    def recall(self, cell: ModelCell) -> None:
        """Let the ledgers expect of a model what was measured of it earlier, if anything."""
        if not self.devices:
            return
        size = self.remembered.get(model_key(cell.spec, self.devices[0].kind))
        if size is not None:
            self.vram = self.vram.with_hint(cell.name, size.vram_bytes)
            self.host = self.host.with_hint(cell.name, size.host_bytes)

    def ensure_group(self, name: str) -> GroupCell:
        """Return the group of that name."""
        return self.groups.setdefault(name, GroupCell(name))

    def model(self, name: str) -> ModelCell:
        """Return a model that takes requests. Raises NoSuchModelError."""
        cell = self.models.get(name)
        if cell is None or self.is_leaving(cell):
            known = ", ".join(spec.name for spec in self.config.models) or "none"
            raise NoSuchModelError(f"no model {name[:100]!r}; the config has: {known}")
        return cell

    def listed(self) -> Iterator[ModelCell]:
        """The models of the config, in its order."""
        return (self.models[spec.name] for spec in self.config.models)

    def members(self, group: GroupCell) -> list[ModelCell]:
        """The models of a group."""
        return [cell for cell in self.models.values() if cell.group is group]

    def is_leaving(self, cell: ModelCell) -> bool:
        """Whether the config has the model no more."""
        return cell.is_retiring and cell.next_spec is None

    def has_requests(self) -> bool:
        """Whether an accepted request is without its answer."""
        return any(cell.queue or cell.running for cell in self.models.values())

    def has_startable(self) -> bool:
        """Whether a request waits for a model of a group that does nothing."""
        return any(cell.queue and not cell.group.is_busy for cell in self.models.values())

    def is_idle(self) -> bool:
        """Whether nothing waits, runs or moves."""
        return (
            not self.has_requests()
            and not any(group.is_busy for group in self.groups.values())
            and not any(cell.commands for cell in self.models.values())
        )

    def set_limits(self) -> None:
        """Take budgets and headroom from the config, capacities from the devices."""
        policy = self.config.vram
        headroom = parse_quantity(policy.headroom or "0")
        capacity = {d.uuid: max(0, d.total_bytes - headroom) for d in self.devices}
        total = sum(d.total_bytes for d in self.devices) if self.devices else UNLIMITED_BYTES
        budget = parse_quantity(policy.budget) if policy.budget else total
        self.vram = self.vram.with_limits(budget, capacity)
        host = self.config.host_memory.budget
        limit = self._host_limit_bytes
        share = UNLIMITED_BYTES if limit is None else int(limit * _HOST_SHARE)
        host_budget = parse_quantity(host) if host else share
        self.host = self.host.with_limits(host_budget, {HOST: UNLIMITED_BYTES})

    def device_index(self, cell: ModelCell) -> str:
        """Return the index that the model, or another one of its group, asks for; else empty."""
        if cell.spec.device or not cell.spec.group:
            return cell.spec.device
        return next((m.spec.device for m in self.members(cell.group) if m.spec.device), "")

    def device_by_index(self, index: str) -> str:
        """Return the UUID of a device of the pod; empty where there is none of that index."""
        return next((d.uuid for d in self.devices if str(d.index) == index), "")
