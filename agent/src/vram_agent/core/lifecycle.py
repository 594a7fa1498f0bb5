"""A model's life as a table: which event leads from where to where.

Why it exists: every other module asks this one whether a change of state is legal, so that no
task ever runs on weights that are half moved. Called by the supervisor alone. It knows no clock,
no process and no memory figures.

A *residence* is a state and the tier where the weights are meanwhile. A row of the table names
the state and event; its tier is fixed, or KEEP where the weights stay where they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from vram_agent.protocol import ModelState, Tier


class Event(StrEnum):
    """What can happen to a model."""

    LOAD = "Load"
    """The supervisor begins to load: disk → host memory."""
    LOADED = "Loaded"
    LOAD_FAILED = "LoadFailed"
    RESTORE = "Restore"
    """The supervisor begins to restore: host memory → VRAM."""
    RESTORED = "Restored"
    ROLLED_BACK = "RolledBack"
    """A restore did not happen and left everything as it was."""
    RESTORE_FAILED = "RestoreFailed"
    """A restore failed for a reason that lies in the model."""
    OFFLOAD = "Offload"
    """The supervisor begins to take the weights out: of VRAM, of the GPU process or of the host."""
    OFFLOADED_PINNED = "OffloadedPinned"
    OFFLOADED_HOST = "OffloadedHost"
    UNLOADED = "Unloaded"
    GPU_LOST = "GpuLost"
    """The GPU process ended unasked; host memory still holds the weights."""
    ALL_LOST = "AllLost"
    """Template and GPU process ended unasked; only the disk still holds the weights."""
    STARVED = "Starved"
    """As ALL_LOST, by the kernel and for want of host memory: not to be repeated at once."""
    REFUSED = "Refused"
    """The model fits nowhere, or its restores kept dying; it is not tried on for now."""
    RESET = "Reset"
    """A new config, or an unload by hand, gives a failed model a new chance."""


@dataclass(frozen=True, slots=True)
class Residence:
    """A state, and the tier that holds the weights in it."""

    state: ModelState
    tier: Tier

    def __str__(self) -> str:
        return f"{self.state}/{self.tier}"


class IllegalTransitionError(Exception):
    """The table has no such row: a fault of the supervisor, never of a caller."""


_S = ModelState
_KEEP: Final = None

ABSENT: Final = Residence(ModelState.ABSENT, Tier.DISK)
LOADING: Final = Residence(ModelState.LOADING, Tier.DISK)
RESIDENT: Final = Residence(ModelState.RESIDENT, Tier.VRAM)
PINNED: Final = Residence(ModelState.OFFLOADED, Tier.PINNED_HOST)
HOSTED: Final = Residence(ModelState.OFFLOADED, Tier.HOST)

RESIDENCES: Final = frozenset(
    {
        ABSENT,
        LOADING,
        RESIDENT,
        PINNED,
        HOSTED,
        *(Residence(_S.RESTORING, tier) for tier in (Tier.PINNED_HOST, Tier.HOST)),
        *(Residence(_S.OFFLOADING, tier) for tier in (Tier.VRAM, Tier.PINNED_HOST, Tier.HOST)),
        *(Residence(_S.FAILED, tier) for tier in (Tier.PINNED_HOST, Tier.HOST, Tier.DISK)),
    }
)
"""Every residence a model may have; a row that would lead elsewhere is illegal from there."""

TABLE: Final[Mapping[tuple[ModelState, Event], tuple[ModelState, Tier | None]]] = MappingProxyType(
    {
        (_S.ABSENT, Event.LOAD): (_S.LOADING, Tier.DISK),
        (_S.ABSENT, Event.REFUSED): (_S.FAILED, Tier.DISK),
        (_S.LOADING, Event.LOADED): (_S.OFFLOADED, Tier.HOST),
        (_S.LOADING, Event.LOAD_FAILED): (_S.FAILED, Tier.DISK),
        (_S.LOADING, Event.ALL_LOST): (_S.ABSENT, Tier.DISK),
        (_S.OFFLOADED, Event.RESTORE): (_S.RESTORING, _KEEP),
        (_S.OFFLOADED, Event.OFFLOAD): (_S.OFFLOADING, _KEEP),
        (_S.OFFLOADED, Event.REFUSED): (_S.FAILED, _KEEP),
        (_S.OFFLOADED, Event.GPU_LOST): (_S.OFFLOADED, Tier.HOST),
        (_S.OFFLOADED, Event.ALL_LOST): (_S.ABSENT, Tier.DISK),
        (_S.OFFLOADED, Event.STARVED): (_S.FAILED, Tier.DISK),
        (_S.RESTORING, Event.RESTORED): (_S.RESIDENT, Tier.VRAM),
        (_S.RESTORING, Event.ROLLED_BACK): (_S.OFFLOADED, _KEEP),
        (_S.RESTORING, Event.RESTORE_FAILED): (_S.FAILED, _KEEP),
        (_S.RESTORING, Event.GPU_LOST): (_S.OFFLOADED, Tier.HOST),
        (_S.RESTORING, Event.ALL_LOST): (_S.ABSENT, Tier.DISK),
        (_S.RESIDENT, Event.OFFLOAD): (_S.OFFLOADING, Tier.VRAM),
        (_S.RESIDENT, Event.GPU_LOST): (_S.OFFLOADED, Tier.HOST),
        (_S.RESIDENT, Event.ALL_LOST): (_S.ABSENT, Tier.DISK),
        (_S.RESIDENT, Event.STARVED): (_S.FAILED, Tier.DISK),
        (_S.OFFLOADING, Event.OFFLOADED_PINNED): (_S.OFFLOADED, Tier.PINNED_HOST),
        (_S.OFFLOADING, Event.OFFLOADED_HOST): (_S.OFFLOADED, Tier.HOST),
        (_S.OFFLOADING, Event.UNLOADED): (_S.ABSENT, Tier.DISK),
        (_S.OFFLOADING, Event.GPU_LOST): (_S.OFFLOADED, Tier.HOST),
        (_S.OFFLOADING, Event.ALL_LOST): (_S.ABSENT, Tier.DISK),
        (_S.FAILED, Event.LOAD): (_S.LOADING, _KEEP),
        (_S.FAILED, Event.RESTORE): (_S.RESTORING, _KEEP),
        (_S.FAILED, Event.GPU_LOST): (_S.FAILED, Tier.HOST),
        (_S.FAILED, Event.ALL_LOST): (_S.FAILED, Tier.DISK),
        (_S.FAILED, Event.STARVED): (_S.FAILED, Tier.DISK),
        (_S.FAILED, Event.RESET): (_S.ABSENT, _KEEP),
    }
)


def decide_residence(residence: Residence, event: Event) -> Residence:
    """Return where the event leads. Raises IllegalTransitionError; the argument never changes."""
    row = TABLE.get((residence.state, event))
    if row is not None:
        state, tier = row
        after = Residence(state, residence.tier if tier is None else tier)
        if after in RESIDENCES:
            return after
    raise IllegalTransitionError(f"{event} is not possible in {residence}")
