"""The CPU as a device: "device memory" is what a GPU process holds alone.

Why it exists: the same code, tests and demo run without a GPU, with measured bytes. A process's
device memory is its private anonymous memory, from /proc/PID/smaps: what ending it gives back.
The shared arena (a memfd) is host memory, whoever maps it, and pages still shared with the
template are the template's. Called by the supervisor (`CpuDevice`) and, in the GPU process, by the
engine (`AnonymousMemory`). Knows no torch.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vram_agent.cgroup import read_memory_limit_bytes
from vram_agent.devices.base import MemoryFigures, OutOfDeviceMemoryError, Placement
from vram_agent.errors import NoVramError
from vram_agent.pages import address_of, advise_huge_pages, align, populate
from vram_agent.progress import CHUNK_BYTES, advance
from vram_agent.protocol import DeviceKind, DeviceReport, ResidualSource

CPU_UUID = "CPU-0"
_VMA = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S{4} [0-9a-f]+ \S+ (\d+)")


def parse_private_anonymous_bytes(smaps: str) -> int:
    """Return the private anonymous bytes in a text of /proc/PID/smaps.

    Of each mapping: pages that are anonymous, and mapped by this process alone. Pages of files
    (libraries, the arena) and pages still shared with a forking parent do not count.
    """
    total_kib = 0
    private_kib = clean_kib = anonymous_kib = 0
    is_file = False

    def counted() -> int:
        # Clean private pages of a file mapping are page cache; only anonymous memory has no file.
        private = private_kib if is_file else private_kib + clean_kib
        return min(anonymous_kib, private)

    for line in smaps.splitlines():
        if (match := _VMA.match(line)) is not None:
            total_kib += counted()
            private_kib = clean_kib = anonymous_kib = 0
            is_file = match[1] != "0"
        elif line.startswith("Private_Dirty:"):
            private_kib = int(line.split()[1])
        elif line.startswith("Private_Clean:"):
            clean_kib = int(line.split()[1])
        elif line.startswith("Anonymous:"):
            anonymous_kib = int(line.split()[1])
    return (total_kib + counted()) * 1024


def measure_private_anonymous_bytes(pid: int) -> int | None:
    """Return a process's private anonymous bytes; None when it has ended or is not ours."""
    try:
        return parse_private_anonymous_bytes(
            Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace")
        )
    except (OSError, ValueError):
        return None


def read_anonymous_bytes(pid: int) -> int | None:
    """Return a process's anonymous bytes in memory, shared ones too; None when it has ended.

    Takes a fraction of a millisecond: the kernel keeps the count. Never below the private figure.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def describe_activity(pid: int) -> str:
    """Return what changes whenever a process may have come to hold more or less; empty if unknown.

    Its first thread's time on a CPU, and its anonymous bytes, for its other threads. A process that
    only waits has the memory that it had, and reading that anew takes tens of milliseconds, since
    the kernel walks all of its pages.
    """
    try:
        ran = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii")
    except OSError:  # it has ended, or the kernel counts no such thing
        return ""
    return f"{ran} {read_anonymous_bytes(pid)}"


def parse_mem_total_bytes(meminfo: str) -> int:
    """Return MemTotal of a text of /proc/meminfo."""
    for line in meminfo.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no MemTotal in meminfo")


def measure_total_bytes(root: Path = Path("/")) -> int:
    """Return the memory this container may use: its cgroup's limit (v2, v1), else MemTotal."""
    total = parse_mem_total_bytes((root / "proc/meminfo").read_text(encoding="utf-8"))
    limit = read_memory_limit_bytes(root)
    return total if limit is None else min(limit, total)


class CpuDevice:
    """One device: this machine's memory. ``total_bytes`` overrides what the cgroup says."""

    def __init__(self, total_bytes: int | None = None) -> None:
        self._total_bytes = measure_total_bytes() if total_bytes is None else total_bytes
        self._measured: dict[int, tuple[str, int]] = {}

    def reports(self, gpu_pids: Mapping[int, str]) -> list[DeviceReport]:
        """Return one device; used is what the GPU processes hold alone."""
        self._measured = {pid: self._measured[pid] for pid in gpu_pids if pid in self._measured}
        used_bytes = sum(self.process_bytes(pid) or 0 for pid in gpu_pids)
        return [
            DeviceReport(
                uuid=CPU_UUID,
                index=0,
                kind=DeviceKind.CPU,
                total_bytes=self._total_bytes,
                used_bytes=used_bytes,
                exclusive=False,
            )
        ]

    def process_bytes(self, pid: int) -> int | None:
        """Return the private anonymous memory of a GPU process, measured anew if it has run."""
        activity = describe_activity(pid)
        known_activity, known_bytes = self._measured.get(pid, ("", 0))
        if activity and activity == known_activity:
            return known_bytes
        measured_bytes = measure_private_anonymous_bytes(pid)
        if measured_bytes is not None:
            # The activity from before: what it does meanwhile is measured the next time.
            self._measured[pid] = activity, measured_bytes
        return measured_bytes

    def baseline_bytes(self) -> int:
        """Return 0: nothing of the device is in use but by the GPU processes."""
        return 0

    def residual_source(self) -> ResidualSource:
        """Return Process: the figures are measured per process."""
        return ResidualSource.PROCESS

    def place(self, wanted: str) -> Placement:
        """Return the one device. Raises NoVramError for any other."""
        if wanted not in {"", "0", CPU_UUID}:
            raise NoVramError(
                f"device {wanted} does not exist: this agent runs on the CPU, device 0"
            )
        return Placement(kind=DeviceKind.CPU, index=0, uuid=CPU_UUID, total_bytes=self._total_bytes)

    def environment(self) -> Mapping[str, str]:
        """Return settings of malloc and MKL under which freed memory goes back to the system."""
        return {
            "MALLOC_ARENA_MAX": "2",
            "MALLOC_TRIM_THRESHOLD_": "131072",
            "MKL_DISABLE_FAST_MM": "1",
        }


class AnonymousBlock:
    """A private anonymous mapping, all of it in memory from the start, as a device's is."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A tenth of the time to fault in, and next to none to free. (Where a hypervisor takes free
        # memory back, virtio-balloon's page reporting, the first touch pays for that.)
        advise_huge_pages(self._map)
        populate(address_of(self._map), align(nbytes, mmap.PAGESIZE))
        self.nbytes = nbytes

    @property
    def storage(self) -> object:
        """The mapping itself, a writable buffer."""
        return self._map

    def free(self) -> bool:
        """Unmap; False while a tensor still looks into the mapping (it then goes with that)."""
        try:
            self._map.close()
        except BufferError:
            return False
        return True


class AnonymousMemory:
    """Device memory of the CPU: one anonymous mapping for each block."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._context_bytes = self.used_bytes()

    def allocate(self, nbytes: int) -> AnonymousBlock:
        """Map a block. Raises OutOfDeviceMemoryError beyond the placement's total."""
        total_bytes = self.placement.total_bytes
        # The exact figure takes as long as some copies do: only where the quick one leaves doubt.
        quick_bytes = read_anonymous_bytes(os.getpid())
        used_bytes = 0 if quick_bytes is None else quick_bytes
        if quick_bytes is None or nbytes > total_bytes - quick_bytes:
            used_bytes = self.used_bytes()
        free_bytes = total_bytes - used_bytes
        if nbytes > free_bytes:
            raise OutOfDeviceMemoryError(nbytes, free_bytes, total_bytes)
        try:
            return AnonymousBlock(nbytes)
        except OSError as error:
            raise OutOfDeviceMemoryError(nbytes, free_bytes, total_bytes) from error

    def upload(self, target: Any, source: Any, address: int) -> None:  # noqa: ARG002 - the protocol's
        """Copy with the tensors' own threads."""
        for start in range(0, len(source), CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, len(source))
            target[start:end].copy_(source[start:end])
            advance(end - start)

    def unpin(self, address: int, nbytes: int) -> None:
        """Do nothing: the CPU copies from any memory alike, and locks none."""

    def explain_copies(self) -> str:
        """Return nothing: no copy could be faster."""
        return ""

    def synchronize(self) -> None:
        """Do nothing: copies of the CPU have ended when they return."""

    def empty_cache(self) -> None:
        """Do nothing: malloc is trimmed by the scrub itself."""

    def used_bytes(self) -> int:
        """Return this process's private anonymous memory."""
        return measure_private_anonymous_bytes(os.getpid()) or 0

    def figures(self, resident_bytes: int, stray_bytes: int) -> MemoryFigures:  # noqa: ARG002 - measured outside
        """Return what is known without malloc, which keeps no account of tensors."""
        return MemoryFigures(live_tensor_bytes=stray_bytes, context_bytes=self._context_bytes)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether malloc or mmap failed."""
        return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
