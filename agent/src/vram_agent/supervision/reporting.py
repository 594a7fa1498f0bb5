"""The report: what the agent says of itself, measured at the moment of the call.

Why it exists: operator, metrics and ``vram-agent report`` read one structure. Called by the
supervisor. It reads cells and processes and changes nothing but its own sequence number.
"""

from __future__ import annotations

from uuid import uuid4

import msgspec
import structlog

from vram_agent.backend import Backend, Scrubbed
from vram_agent.core.dirty import is_dirty
from vram_agent.core.pool import CommandKind
from vram_agent.core.residual import MemorySamples, ProcessSample, compute_memory_report
from vram_agent.protocol import (
    ActionReport,
    AgentIdentity,
    DeviceReport,
    MemoryReport,
    ModelReport,
    ModelState,
    Report,
    ResidualSource,
    ScrubReport,
    Tier,
)
from vram_agent.serving.base import ModelView
from vram_agent.supervision.fleet import Fleet, ModelCell
from vram_agent.supervision.gathering import dirty_above_bytes, dirty_policy, needed_bytes
from vram_agent.supervision.ports import Surroundings, format_time

_log = structlog.get_logger("vram_agent.device")


class Reporter:
    """Writes reports. ``boot_id`` is new in each instance, that is in each process."""

    def __init__(self, fleet: Fleet, surroundings: Surroundings) -> None:
        self._fleet = fleet
        self._surroundings = surroundings
        self._started_at = format_time(surroundings.clock.now())
        self._sequence = 0
        self._idle_since: str | None = self._started_at
        self.boot_id = uuid4().hex
        self.epoch = 0
        self.backend: Backend | None = None
        self._last_scrub: ScrubReport | None = None

    def attach(self, backend: Backend) -> list[DeviceReport]:
        """Measure from now on; return the devices, and say which of them others use already."""
        self.backend = backend
        devices = self._devices()
        for device in devices:
            if device.dirty:
                dirty = dirty_policy(self._fleet)
                _log.warning(
                    "device dirty",
                    gpu_uuid=device.uuid,
                    baseline_bytes=device.baseline_bytes,
                    above=dirty.above,
                    policy=dirty.policy.value,
                )
        return devices

    def _devices(self) -> list[DeviceReport]:
        above_bytes = dirty_above_bytes(self._fleet)
        return [
            msgspec.structs.replace(device, dirty=is_dirty(device.baseline_bytes, above_bytes))
            for device in ([] if self.backend is None else self.backend.devices())
        ]

    def note_scrub(self, scrubbed: Scrubbed | None) -> None:
        """Remember what a scrub gave back; None where there was none."""
        if scrubbed is None:
            return
        self._last_scrub = ScrubReport(
            at=format_time(self._surroundings.clock.now()),
            before_bytes=scrubbed.before_bytes,
            after_bytes=scrubbed.after_bytes,
            reclaimed_bytes=scrubbed.reclaimed_bytes,
        )

    def note_activity(self, *, is_idle: bool) -> None:
        """Remember since when nothing waits, runs or moves."""
        if not is_idle:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = format_time(self._surroundings.clock.now())

    def write(self, *, is_draining: bool, action: ActionReport | None) -> Report:
        """Measure and return the report."""
        self._sequence += 1
        devices = self._devices()
        return Report(
            agent=AgentIdentity(
                version=self._surroundings.version,
                mode=self._surroundings.mode,
                boot_id=self.boot_id,
                epoch=self.epoch,
                started_at=self._started_at,
                pod=self._surroundings.pod,
            ),
            sequence=self._sequence,
            observed_at=format_time(self._surroundings.clock.now()),
            config_generation=self._fleet.config.metadata.generation,
            devices=devices,
            memory=msgspec.structs.replace(
                self._memory(devices),
                last_scrub=self._last_scrub,
                host_limit_bytes=self._surroundings.host.limit_bytes(),
                host_available_bytes=self._surroundings.host.available_bytes(),
            ),
            models=[
                msgspec.structs.replace(
                    model_report(cell), needed_bytes=needed_bytes(self._fleet, cell)
                )
                for cell in self._fleet.listed()
            ],
            idle=self._idle_since is not None,
            idle_since=self._idle_since,
            draining=is_draining,
            action=action,
        )

    def _memory(self, devices: list[DeviceReport]) -> MemoryReport:
        backend = self.backend
        if backend is None:
            return compute_memory_report(MemorySamples(source=ResidualSource.UNKNOWN))
        processes: list[ProcessSample] = []
        host_bytes = 0
        for group in self._fleet.groups.values():
            if group.backend is None:
                continue
            memory = group.backend.memory()
            host_bytes += memory.host_bytes
            processes.append(
                ProcessSample(
                    device_bytes=memory.device_bytes,
                    model_bytes=sum(m.vram_bytes for m in self._fleet.members(group)),
                    live_tensor_bytes=memory.live_tensor_bytes,
                    allocator_cache_bytes=memory.allocator_cache_bytes,
                    runtime_arena_bytes=memory.runtime_arena_bytes,
                    context_bytes=memory.context_bytes,
                )
            )
        return compute_memory_report(
            MemorySamples(
                source=backend.residual_source(),
                device_used_bytes=sum(device.used_bytes for device in devices),
                baseline_bytes=backend.device_baseline_bytes(),
                processes=processes,
                host_bytes=host_bytes,
            )
        )


def model_report(cell: ModelCell) -> ModelReport:
    """Return one model's part of the report."""
    backend = cell.group.backend
    is_coming = cell.residence.state in (ModelState.LOADING, ModelState.RESTORING)
    is_in_host_memory = cell.residence.tier is not Tier.DISK and cell.loaded is not None
    return ModelReport(
        name=cell.name,
        runtime=cell.spec.runtime,
        state=cell.residence.state,
        tier=cell.residence.tier,
        vram_bytes=cell.vram_bytes,
        host_bytes=cell.loaded.weight_bytes if is_in_host_memory and cell.loaded else 0,
        in_flight=1 if cell.running is not None else 0,
        queued=len(cell.queue),
        last_used_at=cell.last_used_wall,
        last_transition=cell.last_transition,
        error=cell.error if cell.residence.state is ModelState.FAILED else None,
        progress=backend.progress(cell.name) if is_coming and backend is not None else None,
    )


def model_view(cell: ModelCell) -> ModelView:
    """Return a model as a client sees it."""
    return ModelView(
        spec=cell.spec,
        report=model_report(cell),
        loaded=cell.loaded,
        is_loading_eagerly=any(one.kind is CommandKind.EAGER for one in cell.commands),
    )
