"""From the supervisor's cells to the frozen facts that a decision rests on.

Why it exists: gather → decide → act; this is the first of the three. Called before each decision.
It reads, and measures devices only when a model waits for memory.
"""

from __future__ import annotations

from typing import Final

from vram_agent.backend import Backend
from vram_agent.core.dirty import ClosedDevice, find_closed
from vram_agent.core.ledger import UNLIMITED_BYTES
from vram_agent.core.pool import Command, CommandKind, GroupFacts, ModelFacts, Pool
from vram_agent.protocol import DeviceReport, DirtyPolicy, parse_quantity
from vram_agent.supervision.fleet import Fleet, GroupCell, ModelCell

MINIMUM_TURN_SECONDS: Final = 1.0
TURN_PER_RESTORE: Final = 4.0
"""A turn lasts this many times as long as the model's way into VRAM took, so that swapping for
fairness never costs more than a fifth of the time."""


def gather_pool(fleet: Fleet, backend: Backend, host_room_bytes: int | None) -> Pool:
    """Return the facts of this moment."""
    is_admitting = any(
        (cell.queue or cell.commands) and not cell.group.is_busy and cell.vram_bytes == 0
        for cell in fleet.models.values()
    )
    devices = backend.devices() if is_admitting else []
    return Pool(
        models=tuple(_model_facts(fleet, cell) for cell in fleet.models.values()),
        groups={name: _group_facts(group, is_admitting) for name, group in fleet.groups.items()},
        vram=fleet.vram,
        host=fleet.host,
        host_room_bytes=host_room_bytes,
        free_bytes=_free_bytes(fleet, devices),
        closed=_closed_devices(fleet, devices),
    )


def needed_bytes(fleet: Fleet, cell: ModelCell) -> int:
    """What the model is expected to hold in VRAM; 0 where nothing is known yet."""
    weight_bytes = 0 if cell.loaded is None else cell.loaded.weight_bytes
    return fleet.vram.expected_bytes(cell.name, declared_bytes(cell), weight_bytes)


def declared_bytes(cell: ModelCell) -> int:
    """What the spec says; 0 where it says nothing."""
    return parse_quantity(cell.spec.vram) if cell.spec.vram else 0


def dirty_policy(fleet: Fleet) -> DirtyPolicy:
    """What the config says of devices that others use, or what holds where it says nothing."""
    return fleet.config.vram.dirty or DirtyPolicy()


def dirty_above_bytes(fleet: Fleet) -> int:
    """How much others may use of a device before it counts as dirty."""
    above = dirty_policy(fleet).above
    return parse_quantity(above) if above else UNLIMITED_BYTES


def _free_bytes(fleet: Fleet, devices: list[DeviceReport]) -> dict[str, int]:
    headroom = parse_quantity(fleet.config.vram.headroom or "0")
    return {d.uuid: d.total_bytes - d.used_bytes - headroom for d in devices}


def _closed_devices(fleet: Fleet, devices: list[DeviceReport]) -> dict[str, ClosedDevice]:
    return find_closed(
        {d.uuid: d.baseline_bytes for d in devices},
        frozenset(group.device for group in fleet.groups.values()),
        dirty_above_bytes(fleet),
        dirty_policy(fleet).policy,
    )


def _model_facts(fleet: Fleet, cell: ModelCell) -> ModelFacts:
    command = cell.commands[0] if cell.commands else None
    index = fleet.device_index(cell)
    return ModelFacts(
        name=cell.name,
        group=cell.group.name,
        residence=cell.residence,
        residency=cell.spec.residency,
        priority=cell.spec.priority,
        leases=1 if cell.running is not None else 0,
        queued=len(cell.queue),
        arrival=next(iter(cell.queue), 0),
        last_used_at=cell.last_used_at,
        resident_since=cell.resident_since,
        last_run=cell.last_run,
        turn_seconds=max(MINIMUM_TURN_SECONDS, TURN_PER_RESTORE * cell.restore_seconds),
        keep_alive_seconds=cell.keep_alive_seconds,
        command=None
        if command is None
        else Command(kind=CommandKind(command.kind), tier=command.tier),
        called_tier=cell.called_tier,
        needed_bytes=needed_bytes(fleet, cell),
        device=fleet.device_by_index(index),
        missing_device=index if fleet.devices and not fleet.device_by_index(index) else "",
        loads_on_device=cell.loads_on_device,
        is_retiring=cell.is_retiring,
        not_before=cell.retry_at if cell.starvations else float("-inf"),
        short_since=cell.short_since,
        out_of_vram_on=frozenset(cell.out_of_vram_on),
    )


def _group_facts(group: GroupCell, is_admitting: bool) -> GroupFacts:
    has_gpu_process = group.backend is not None and group.backend.gpu_pid is not None
    device_bytes = None
    if is_admitting and has_gpu_process and group.backend is not None:
        device_bytes = group.backend.memory().device_bytes
    return GroupFacts(
        is_busy=group.is_busy,
        has_gpu_process=has_gpu_process,
        is_orphaned=group.is_orphaned,
        device_bytes=device_bytes,
        device=group.device,
    )
