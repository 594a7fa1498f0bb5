"""What device memory the pod holds beyond its resident models, and what holds it.

Why it exists: a restart rests on this figure, so it is one pure function of one set of samples,
and its classes add up to it. Called by the supervisor for each report. It knows no device, no
process and no clock. All figures are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vram_agent.protocol import MemoryClasses, MemoryReport, ResidualSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """What one GPU process said of itself and what was measured of it from outside."""

    device_bytes: int | None
    """Device memory of the process; None where it cannot be known."""
    model_bytes: int = 0
    """What its resident models hold, as measured when they were restored."""
    live_tensor_bytes: int = 0
    """Tensors beyond the weights of its resident models."""
    allocator_cache_bytes: int = 0
    runtime_arena_bytes: int = 0
    context_bytes: int = 0

    @property
    def own_bytes(self) -> int:
        """The process's own account of itself, for where no one else can measure it."""
        return (
            self.model_bytes
            + self.live_tensor_bytes
            + self.allocator_cache_bytes
            + self.runtime_arena_bytes
            + self.context_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySamples:
    """Everything measured for one report, at one time."""

    source: ResidualSource
    device_used_bytes: int = 0
    """Sum over the pod's devices, as the driver says."""
    baseline_bytes: int = 0
    """The same sum before the pod's first context."""
    processes: Sequence[ProcessSample] = ()
    host_bytes: int = 0


def compute_memory_report(samples: MemorySamples) -> MemoryReport:
    """Return used, models, residual and its classes. Pure.

    1. used: Exclusive = the devices less their baseline; Process = the processes as measured;
       Self and Unknown = measured where known, else their own account.
    2. residual = used less models, not below zero.
    3. classes, in the order of how exactly they are known, each at most what is left of the
       residual; what is left at the end is unattributed. Their sum is the residual.
    """
    # 1
    held = sum(p.own_bytes if p.device_bytes is None else p.device_bytes for p in samples.processes)
    if samples.source is ResidualSource.EXCLUSIVE:
        used = max(0, samples.device_used_bytes - samples.baseline_bytes)
    else:
        used = held
    # 2
    model_bytes = sum(p.model_bytes for p in samples.processes)
    residual = max(0, used - model_bytes)
    # 3
    left = residual

    def take(wanted_bytes: int) -> int:
        nonlocal left
        taken = min(left, max(0, wanted_bytes))
        left -= taken
        return taken

    is_foreign_known = samples.source is ResidualSource.EXCLUSIVE and all(
        p.device_bytes is not None for p in samples.processes
    )
    live_tensors = take(sum(p.live_tensor_bytes for p in samples.processes))
    allocator_cache = take(sum(p.allocator_cache_bytes for p in samples.processes))
    runtime_arena = take(sum(p.runtime_arena_bytes for p in samples.processes))
    context_and_libraries = take(sum(p.context_bytes for p in samples.processes))
    other_processes = take(used - held if is_foreign_known else 0)
    return MemoryReport(
        source=samples.source,
        used_bytes=used,
        model_bytes=model_bytes,
        residual_bytes=residual,
        host_bytes=samples.host_bytes,
        classes=MemoryClasses(
            live_tensors=live_tensors,
            allocator_cache=allocator_cache,
            runtime_arena=runtime_arena,
            context_and_libraries=context_and_libraries,
            other_processes=other_processes,
            unattributed=left,
        ),
    )
