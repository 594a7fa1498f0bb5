"""One look at the application's processes: their device memory and CPU time.

Why it exists: the figures of report, baseline and idleness come from one look, so that they cannot
disagree. Called by watch.py in a thread: /proc/PID/smaps of a large process takes a while, and a
driver may block. One look at a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vram_agent.core.quiet import Look, TreeMemory, choose_source, compute_tree_report
from vram_agent.devices.base import ANY_DEVICE, Device
from vram_agent.protocol import DeviceReport, ResidualSource
from vram_agent.wrapping.tree import list_descendants, may_use_gpu, read_cpu_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one look gave."""

    devices: list[DeviceReport]
    memory: TreeMemory
    look: Look


class Meter:
    """Measures this process's descendants on a device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before: frozenset[int] = frozenset()

    def measure(self, now: float) -> Measurement:
        """Return the figures at ``now``. Blocking."""
        pids = list_descendants(os.getpid())
        if self._device.residual_source() is ResidualSource.PROCESS:
            users = frozenset(pids)
        else:
            users = frozenset(pid for pid in pids if may_use_gpu(pid))
        # The driver may list a process a moment longer than /proc: it is no neighbour for that.
        devices = self._device.reports(dict.fromkeys(users | self._before, ANY_DEVICE))
        self._before = users
        held = {pid: self._device.process_bytes(pid) for pid in users}
        cpu = {pid: seconds for pid in pids if (seconds := read_cpu_seconds(pid)) is not None}
        # What cannot be measured because it has ended meanwhile holds nothing.
        is_known = all(held[pid] is not None for pid in users if pid in cpu)
        tree_bytes = sum(filter(None, held.values())) if is_known else None
        memory = TreeMemory(
            source=choose_source(self._device.residual_source(), tree_bytes),
            device_used_bytes=sum(device.used_bytes for device in devices),
            device_baseline_bytes=self._device.baseline_bytes(),
            tree_bytes=tree_bytes,
        )
        used = compute_tree_report(memory, None).used_bytes
        return Measurement(
            devices=devices, memory=memory, look=Look(at=now, used_bytes=used, cpu_seconds=cpu)
        )
