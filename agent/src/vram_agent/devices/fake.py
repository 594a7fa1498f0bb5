"""A device with scripted figures, for unit tests of whatever asks a device. Never for serving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vram_agent.devices.base import Placement
from vram_agent.errors import NoVramError
from vram_agent.protocol import DeviceKind, DeviceReport, ResidualSource


@dataclass(slots=True)
class FakeDevice:
    """One device whose every answer is a field that the test sets."""

    total_bytes: int = 16 << 30
    used_bytes: int = 0
    baseline: int = 0
    kind: DeviceKind = DeviceKind.CUDA
    uuid: str = "GPU-fake"
    is_exclusive: bool = True
    source: ResidualSource = ResidualSource.EXCLUSIVE
    bytes_by_pid: dict[int, int] = field(default_factory=dict)

    def reports(self, gpu_pids: Mapping[int, str]) -> list[DeviceReport]:
        """Return the one device; the processes' scripted bytes are part of its use."""
        held_bytes = sum(self.bytes_by_pid.get(pid, 0) for pid in gpu_pids)
        return [
            DeviceReport(
                uuid=self.uuid,
                index=0,
                kind=self.kind,
                total_bytes=self.total_bytes,
                used_bytes=self.used_bytes + held_bytes,
                exclusive=self.is_exclusive,
                baseline_bytes=self.baseline,
            )
        ]

    def process_bytes(self, pid: int) -> int | None:
        """Return the scripted bytes of a process; None when there are none."""
        return self.bytes_by_pid.get(pid)

    def baseline_bytes(self) -> int:
        """Return the scripted baseline."""
        return self.baseline

    def residual_source(self) -> ResidualSource:
        """Return the scripted source."""
        return self.source

    def place(self, wanted: str) -> Placement:
        """Return the one device. Raises NoVramError for any other."""
        if wanted not in {"", "0", self.uuid}:
            raise NoVramError(f"device {wanted} does not exist: there is device 0 only")
        return Placement(kind=self.kind, index=0, uuid=self.uuid, total_bytes=self.total_bytes)

    def environment(self) -> Mapping[str, str]:
        """Return nothing."""
        return {}
