"""NVIDIA devices and MIG slices, as the driver's management library (NVML) sees them.

Why it exists: totals, use and attribution without a CUDA context. Devices are known by UUID, never
by the driver's index. Called by the supervisor (`CudaDevice`) and in GPU processes
(`measure_used_bytes`, and `DriverMemory` where torch is not installed). Knows no torch.

Attribution: inside of a container the driver's list of processes may carry host process ids, or
sizes of 0, or miss processes; a process's figure is used only when the list names it with more
than 0 bytes. A whole device or MIG slice counts as Exclusive until anything else is seen on it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pynvml

from vram_agent.devices.base import (
    ANY_DEVICE,
    Block,
    MemoryFigures,
    OutOfDeviceMemoryError,
    Placement,
)
from vram_agent.errors import NoVramError
from vram_agent.protocol import DeviceKind, DeviceReport, ResidualSource

FOREIGN_BYTES = 64 << 20
"""In use before our first context: below this it is the driver's own, above it a neighbour's."""


class NoCudaDeviceError(Exception):
    """No NVIDIA device is here for this container; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class DriverProcess:
    """A process on a device as the driver lists it; ``used_bytes`` None: it will not say."""

    pid: int
    used_bytes: int | None


class Driver(Protocol):
    """What is asked of NVML, by UUID; a fake of it stands in for the driver in tests."""

    def uuids(self) -> list[str]:
        """Return the devices, MIG slices instead of the devices they are cut from."""
        ...

    def memory(self, uuid: str) -> tuple[int, int]:
        """Return (total, used) bytes."""
        ...

    def processes(self, uuid: str) -> list[DriverProcess]:
        """Return the compute processes that the driver lists."""
        ...


class Nvml:
    """NVML itself. Raises NoCudaDeviceError where there is no driver."""

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NoCudaDeviceError(f"the NVIDIA driver does not answer ({error})") from error

    def uuids(self) -> list[str]:
        """Return the devices and MIG slices."""
        found: list[str] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            slices = self._mig_slices(handle)
            found += [_text(pynvml.nvmlDeviceGetUUID(one)) for one in (slices or [handle])]
        return found

    @staticmethod
    def _mig_slices(handle: Any) -> list[Any]:
        try:
            if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
                return []
            count = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
        except pynvml.NVMLError:  # the device knows no MIG
            return []
        slices: list[Any] = []
        for index in range(count):
            try:
                slices.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
            except pynvml.NVMLError:  # no slice there, or not one of this container
                continue
        return slices

    def memory(self, uuid: str) -> tuple[int, int]:
        """Return (total, used) bytes; version 2 leaves the driver's reserve out of used."""
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        try:
            info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        except pynvml.NVMLError:
            info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(info.total), int(info.used)

    def processes(self, uuid: str) -> list[DriverProcess]:
        """Return the compute processes; empty where the driver will not list them."""
        try:
            listed = pynvml.nvmlDeviceGetComputeRunningProcesses(
                pynvml.nvmlDeviceGetHandleByUUID(uuid)
            )
        except pynvml.NVMLError:
            return []
        return [DriverProcess(int(one.pid), one.usedGpuMemory) for one in listed]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def choose_visible(uuids: list[str], visible: str | None) -> list[str]:
    """Return the devices that CUDA_VISIBLE_DEVICES leaves, in its order, as CUDA reads it.

    None or empty text: all, none. An index or (the beginning of) a UUID each; the first that
    names nothing ends the list.
    """
    if visible is None:
        return uuids
    chosen: list[str] = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdigit() and int(word) < len(uuids):
            match = uuids[int(word)]
        else:
            match = next((uuid for uuid in uuids if word and uuid.startswith(word)), "")
        if not match:
            break
        chosen.append(match)
    return chosen


class CudaDevice:
    """The NVIDIA devices of this pod. Takes the baseline when it is made: make it before CUDA.

    Raises NoCudaDeviceError.
    """

    def __init__(
        self, driver: Driver | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._driver = Nvml() if driver is None else driver
        self._uuids = choose_visible(self._driver.uuids(), environment.get("CUDA_VISIBLE_DEVICES"))
        if not self._uuids:
            raise NoCudaDeviceError("no NVIDIA device is visible to this container")
        self._has_mps = "CUDA_MPS_PIPE_DIRECTORY" in environment
        self._baselines = {uuid: self._driver.memory(uuid)[1] for uuid in self._uuids}
        # Sticky: a neighbour that was seen once may come back between two looks.
        self._with_neighbours = {uuid for uuid in self._uuids if self._driver.processes(uuid)}
        self._used: set[str] = set()
        self._can_read = True

    def reports(self, gpu_pids: Mapping[int, str]) -> list[DeviceReport]:
        """Return each device; one with more processes than ours counts as shared from then on."""
        found: list[DeviceReport] = []
        for index, uuid in enumerate(self._uuids):
            try:
                total_bytes, used_bytes = self._driver.memory(uuid)
            except pynvml.NVMLError:
                self._can_read = False
                continue
            self._can_read = True
            own = sum(1 for device in gpu_pids.values() if device in {uuid, ANY_DEVICE})
            if len(self._driver.processes(uuid)) > own:
                self._with_neighbours.add(uuid)
            self._note_baseline(uuid, used_bytes, has_own_process=own > 0)
            found.append(
                DeviceReport(
                    uuid=uuid,
                    index=index,
                    kind=_kind_of(uuid),
                    total_bytes=total_bytes,
                    used_bytes=used_bytes,
                    exclusive=not self._is_shared(uuid),
                    baseline_bytes=self._baselines[uuid],
                )
            )
        return found

    def _note_baseline(self, uuid: str, used_bytes: int, *, has_own_process: bool) -> None:
        """Measure anew what is in use without us.

        1. Before our first process: whatever is in use.
        2. After it, while none of ours lives: only ever less, since what we left behind is ours.
        """
        if uuid not in self._used:
            self._baselines[uuid] = used_bytes
        elif not has_own_process:
            self._baselines[uuid] = min(self._baselines[uuid], used_bytes)

    def _is_shared(self, uuid: str) -> bool:
        return (
            self._has_mps or uuid in self._with_neighbours or self._baselines[uuid] > FOREIGN_BYTES
        )

    def process_bytes(self, pid: int) -> int | None:
        """Return what the driver says that a process holds; None where it does not know it."""
        total_bytes: int | None = None
        for uuid in self._uuids:
            for one in self._driver.processes(uuid):
                if one.pid == pid and one.used_bytes:
                    total_bytes = (total_bytes or 0) + one.used_bytes
        return total_bytes

    def baseline_bytes(self) -> int:
        """Return what was in use on all devices before this agent's first processes there."""
        return sum(self._baselines.values())

    def residual_source(self) -> ResidualSource:
        """Return how far the figures are this pod's.

        1. The driver does not answer: Unknown.
        2. No device has shown a neighbour: Exclusive.
        3. Else only what our own allocators and processes say: Self.
        """
        if not self._can_read:
            return ResidualSource.UNKNOWN
        if not any(map(self._is_shared, self._uuids)):
            return ResidualSource.EXCLUSIVE
        return ResidualSource.SELF

    def place(self, wanted: str) -> Placement:
        """Return the wanted device, by UUID or index, or the one with most free memory.

        Raises NoVramError when the pod has no such device.
        """
        figures = {uuid: self._driver.memory(uuid) for uuid in self._uuids}
        if not wanted:
            uuid = max(self._uuids, key=lambda one: figures[one][0] - figures[one][1])
        elif wanted in self._uuids:
            uuid = wanted
        elif wanted.isdecimal() and int(wanted) < len(self._uuids):
            uuid = self._uuids[int(wanted)]
        else:
            raise NoVramError(
                f"device {wanted} does not exist: this pod has {len(self._uuids)}, numbered from 0"
            )
        self._used.add(uuid)
        return Placement(
            kind=_kind_of(uuid),
            index=self._uuids.index(uuid),
            uuid=uuid,
            total_bytes=figures[uuid][0],
        )

    def environment(self) -> Mapping[str, str]:
        """Return how CUDA numbers devices and loads kernels in the GPU processes."""
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_MODULE_LOADING": "LAZY"}


def _kind_of(uuid: str) -> DeviceKind:
    return DeviceKind.MIG if uuid.startswith("MIG-") else DeviceKind.CUDA


def measure_used_bytes(uuid: str) -> int | None:
    """Return what is in use on a device; None where the driver does not answer."""
    try:
        return Nvml().memory(uuid)[1]
    except (NoCudaDeviceError, pynvml.NVMLError):
        return None


class DriverMemory:
    """A CUDA device in a process without torch: ONNX Runtime allocates, this only measures."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._before_bytes = measure_used_bytes(placement.uuid) or 0

    def allocate(self, nbytes: int) -> Block:
        """Raise OutOfDeviceMemoryError: without torch there is nothing to allocate for."""
        raise OutOfDeviceMemoryError(nbytes, 0, self.placement.total_bytes)

    def upload(self, target: Any, source: Any, address: int) -> None:  # noqa: ARG002 - the protocol's
        """Raise OutOfDeviceMemoryError: without torch there is nothing to copy to."""
        raise OutOfDeviceMemoryError(len(source), 0, self.placement.total_bytes)

    def unpin(self, address: int, nbytes: int) -> None:
        """Do nothing."""

    def explain_copies(self) -> str:
        """Return nothing: ONNX Runtime copies by itself."""
        return ""

    def synchronize(self) -> None:
        """Do nothing: ONNX Runtime's calls return when the device has finished."""

    def empty_cache(self) -> None:
        """Do nothing: ONNX Runtime shrinks its arena itself, after each run."""

    def used_bytes(self) -> int:
        """Return what came into use on the device since this process began."""
        used_bytes = measure_used_bytes(self.placement.uuid)
        return max(0, (used_bytes or 0) - self._before_bytes)

    def figures(self, resident_bytes: int, stray_bytes: int) -> MemoryFigures:  # noqa: ARG002 - counted anew
        """Return what is held beyond the models as ONNX Runtime's: nothing tells it apart."""
        return MemoryFigures(runtime_arena_bytes=max(0, self.used_bytes() - resident_bytes))

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ONNX Runtime's allocator failed."""
        return "Failed to allocate memory" in str(error) or "out of memory" in str(error).lower()
