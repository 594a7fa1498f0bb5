"""A new config while models serve: what may change, what must leave first, what takes its place.

Why it exists: ``PUT /config`` must lose no accepted request of a model that stays. A model whose
loading changes is *retiring*: the policy unloads it once no task runs on it, and ``complete`` then
puts its successor in its place, queue included. Called by the supervisor on its loop.
"""

from __future__ import annotations

from msgspec import structs

from vram_agent.backend import GroupBackend
from vram_agent.config import find_faults
from vram_agent.core.lifecycle import ABSENT
from vram_agent.core.pool import CommandKind, Reason
from vram_agent.errors import BadInputError, NoSuchModelError
from vram_agent.protocol import AgentConfig, LoadPolicy, ModelSpec, OffloadTier
from vram_agent.supervision.fleet import Fleet, ModelCell, PendingCommand, group_name
from vram_agent.supervision.requests import Requests
from vram_agent.supervision.transitions import Transitions

_FIXED = ("listen", "device", "control", "serving")
_OWN = (*_FIXED, "limits", "drain")
"""What concerns the process and not its models: the operator does not know it."""


def with_own_settings(old: AgentConfig, new: AgentConfig) -> AgentConfig:
    """Return ``new``, with the process's own settings as they are where it leaves the defaults.

    An agent with a config file of its own is sent models by a workload that says nothing of ports.
    """
    unsaid = AgentConfig()
    kept = {
        name: getattr(old, name) for name in _OWN if getattr(new, name) == getattr(unsaid, name)
    }
    return structs.replace(new, **kept)


def ensure_applicable(old: AgentConfig, new: AgentConfig) -> None:
    """Raise BadInputError where the config is wrong or changes what only a restart changes."""
    faults = find_faults(new)
    faults += [
        f"{name}: cannot be changed while the agent runs; restart the container"
        for name in _FIXED
        if getattr(old, name) != getattr(new, name)
    ]
    if faults:
        raise BadInputError("; ".join(faults), param=faults[0].partition(":")[0])


def has_other_weights(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether what was loaded for the old spec is not what the new one asks for."""
    return (old.runtime, old.source, old.options, old.device, group_name(old)) != (
        new.runtime,
        new.source,
        new.options,
        new.device,
        group_name(new),
    )


class Reconfiguration:
    """Takes configs over, model by model."""

    def __init__(self, fleet: Fleet, requests: Requests, transitions: Transitions) -> None:
        self._fleet = fleet
        self._requests = requests
        self._transitions = transitions

    def begin(self, config: AgentConfig) -> None:
        """Take a config that is applicable. Models that must leave are retiring afterwards."""
        fleet = self._fleet
        wanted = {spec.name: spec for spec in config.models}
        for spec in config.models:
            cell = fleet.models.get(spec.name)
            if cell is None:
                order_eager_load(fleet.add(spec))
            elif cell.is_retiring or has_other_weights(cell.spec, spec):
                cell.is_retiring, cell.next_spec = True, spec
            else:
                cell.spec = spec
                self._transitions.reset(cell, Reason.CONFIG_CHANGED)
        fleet.config = config
        for cell in list(fleet.models.values()):
            if cell.name not in wanted:
                cell.is_retiring, cell.next_spec = True, None
                error = NoSuchModelError(f"model {cell.name} is not in the new config")
                self._requests.refuse_all(cell, error)
                while cell.commands:
                    cell.commands.popleft().settle(error)
        fleet.set_limits()

    def is_complete(self) -> bool:
        """Whether every retiring model has left."""
        return not any(cell.is_retiring for cell in self._fleet.models.values())

    def complete(self) -> list[GroupBackend]:
        """Replace or remove the retiring models of which nothing is in memory any more.

        Returns the groups that have no model left, for the caller to close.
        """
        empty: list[GroupBackend] = []
        fleet = self._fleet
        for cell in list(fleet.models.values()):
            if not cell.is_retiring or not cell.is_at_rest_on_disk or cell.running is not None:
                continue
            old_group = cell.group
            fleet.vram = fleet.vram.forget(cell.name)
            fleet.host = fleet.host.forget(cell.name)
            if cell.next_spec is None:
                del fleet.models[cell.name]
            else:
                self._succeed(cell, cell.next_spec)
            if not fleet.members(old_group):
                del fleet.groups[old_group.name]
                if old_group.backend is not None:
                    empty.append(old_group.backend)
        return empty

    def _succeed(self, cell: ModelCell, spec: ModelSpec) -> None:
        cell.note_success()
        cell.residence = ABSENT
        cell.spec, cell.next_spec, cell.is_retiring = spec, None, False
        cell.group = self._fleet.ensure_group(group_name(spec))
        cell.loaded = None
        cell.task_seconds = None
        self._fleet.recall(cell)
        order_eager_load(cell)


def order_eager_load(cell: ModelCell) -> None:
    """Have an eager model loaded as soon as there is room."""
    if cell.spec.residency.load is LoadPolicy.EAGER:
        cell.commands.append(PendingCommand(CommandKind.EAGER, OffloadTier.PINNED_HOST))
