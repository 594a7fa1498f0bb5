"""NVIDIA devices from a scripted driver: which there are, and whose memory it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pynvml
import pytest
from vram_agent.devices.cpu import CpuDevice
from vram_agent.devices.cuda import (
    FOREIGN_BYTES,
    CudaDevice,
    DriverProcess,
    NoCudaDeviceError,
    Nvml,
    choose_visible,
)
from vram_agent.devices.select import select_device
from vram_agent.errors import NotSupportedError, NoVramError
from vram_agent.protocol import DeviceKind, DevicePreference, ResidualSource

GIB = 1 << 30


@dataclass
class ScriptedDriver:
    devices: dict[str, tuple[int, int]]
    running: dict[str, list[DriverProcess]] = field(default_factory=dict)
    is_lost: bool = False

    def uuids(self) -> list[str]:
        return list(self.devices)

    def memory(self, uuid: str) -> tuple[int, int]:
        if self.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return self.devices[uuid]

    def processes(self, uuid: str) -> list[DriverProcess]:
        return self.running.get(uuid, [])


def two_devices() -> ScriptedDriver:
    return ScriptedDriver({"GPU-a": (16 * GIB, 0), "GPU-b": (16 * GIB, 4 << 20)})


UUIDS = ["GPU-aa", "GPU-ab", "MIG-c"]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        pytest.param(None, UUIDS, id="not set: all"),
        pytest.param("", [], id="empty: none"),
        pytest.param("1,0", ["GPU-ab", "GPU-aa"], id="indexes, in their order"),
        pytest.param("GPU-ab", ["GPU-ab"], id="a UUID"),
        pytest.param("MIG-", ["MIG-c"], id="the beginning of a UUID"),
        pytest.param("0,7,1", ["GPU-aa"], id="the first that is none ends the list"),
        pytest.param("-1", [], id="-1: none"),
    ],
)
def test_visible_devices(visible: str | None, chosen: list[str]) -> None:
    assert choose_visible(UUIDS, visible) == chosen


def test_reports_are_numbered_as_the_pod_sees_them() -> None:
    device = CudaDevice(two_devices(), {"CUDA_VISIBLE_DEVICES": "GPU-b"})
    (report,) = device.reports({})
    assert (report.uuid, report.index, report.kind) == ("GPU-b", 0, DeviceKind.CUDA)
    assert report.total_bytes == 16 * GIB
    assert device.baseline_bytes() == 4 << 20


def test_a_slice_is_a_mig_device() -> None:
    device = CudaDevice(ScriptedDriver({"MIG-x": (GIB, 0)}), {})
    assert device.reports({})[0].kind is DeviceKind.MIG
    assert device.place("").kind is DeviceKind.MIG


def test_a_device_of_our_own_is_exclusive_while_only_we_are_on_it() -> None:
    driver = two_devices()
    device = CudaDevice(driver, {})
    driver.running["GPU-a"] = [DriverProcess(100, 5)]
    assert all(report.exclusive for report in device.reports({7: "GPU-a"}))
    assert device.residual_source() is ResidualSource.EXCLUSIVE


def test_a_neighbour_that_was_seen_once_makes_a_device_shared_for_good() -> None:
    driver = two_devices()
    device = CudaDevice(driver, {})
    driver.running["GPU-a"] = [DriverProcess(100, 5), DriverProcess(101, 5)]
    assert [report.exclusive for report in device.reports({7: "GPU-a"})] == [False, True]
    driver.running.clear()
    assert [report.exclusive for report in device.reports({7: "GPU-a"})] == [False, True]
    assert device.residual_source() is ResidualSource.SELF


def test_a_neighbour_on_one_device_is_seen_whatever_we_run_on_another() -> None:
    driver = two_devices()
    device = CudaDevice(driver, {})
    driver.running["GPU-b"] = [DriverProcess(100, 5)]
    assert [r.exclusive for r in device.reports({7: "GPU-a", 8: "GPU-a"})] == [True, False]


def baselines(device: CudaDevice, gpu_pids: dict[int, str]) -> list[int]:
    return [report.baseline_bytes for report in device.reports(gpu_pids)]


def test_before_our_first_process_the_baseline_follows_what_is_in_use() -> None:
    driver = ScriptedDriver({"GPU-a": (16 * GIB, 3 * GIB)})
    device = CudaDevice(driver, {})
    assert baselines(device, {}) == [3 * GIB]
    assert device.residual_source() is ResidualSource.SELF
    driver.devices["GPU-a"] = (16 * GIB, 2 * GIB)
    assert baselines(device, {}) == [2 * GIB]
    driver.devices["GPU-a"] = (16 * GIB, 1 << 20)
    assert baselines(device, {}) == [1 << 20]
    assert device.residual_source() is ResidualSource.EXCLUSIVE


def test_from_our_first_process_on_the_baseline_only_falls_and_only_without_us() -> None:
    driver = ScriptedDriver({"GPU-a": (16 * GIB, 40 << 20)})
    device = CudaDevice(driver, {})
    device.place("")
    driver.devices["GPU-a"] = (16 * GIB, 9 * GIB)
    assert baselines(device, {7: "GPU-a"}) == [40 << 20]
    assert baselines(device, {}) == [40 << 20]
    driver.devices["GPU-a"] = (16 * GIB, 10 << 20)
    assert baselines(device, {7: "GPU-a"}) == [40 << 20]
    assert baselines(device, {}) == [10 << 20]


@pytest.mark.parametrize(
    ("driver", "environment"),
    [
        pytest.param(
            ScriptedDriver({"GPU-a": (GIB, FOREIGN_BYTES + 1)}), {}, id="much in use before us"
        ),
        pytest.param(
            ScriptedDriver({"GPU-a": (GIB, 0)}, {"GPU-a": [DriverProcess(1, 0)]}),
            {},
            id="a process listed before us",
        ),
        pytest.param(
            ScriptedDriver({"GPU-a": (GIB, 0)}), {"CUDA_MPS_PIPE_DIRECTORY": "/x"}, id="MPS"
        ),
    ],
)
def test_a_device_is_shared_from_the_start_with(
    driver: ScriptedDriver, environment: dict[str, str]
) -> None:
    assert CudaDevice(driver, environment).residual_source() is ResidualSource.SELF


def test_a_driver_that_stops_answering_is_unknown_until_it_answers() -> None:
    driver = two_devices()
    device = CudaDevice(driver, {})
    driver.is_lost = True
    assert device.reports({}) == []
    assert device.residual_source() is ResidualSource.UNKNOWN
    driver.is_lost = False
    assert len(device.reports({})) == 2
    assert device.residual_source() is ResidualSource.EXCLUSIVE


@pytest.mark.parametrize(
    ("listed", "held"),
    [
        pytest.param([DriverProcess(7, 5 * GIB)], 5 * GIB, id="listed with its bytes"),
        pytest.param([DriverProcess(7, 0)], None, id="listed with no bytes, as in some pods"),
        pytest.param([DriverProcess(7, None)], None, id="listed without a figure"),
        pytest.param([DriverProcess(31_337, 5 * GIB)], None, id="host process ids"),
    ],
)
def test_a_processs_bytes(listed: list[DriverProcess], held: int | None) -> None:
    driver = two_devices()
    device = CudaDevice(driver, {})
    driver.running["GPU-b"] = listed
    assert device.process_bytes(7) == held


def test_a_model_goes_where_most_is_free_or_where_it_is_told() -> None:
    device = CudaDevice(two_devices(), {})
    assert device.place("").uuid == "GPU-a"
    assert (device.place("1").uuid, device.place("1").index) == ("GPU-b", 1)
    assert device.place("GPU-b") == device.place("1")
    with pytest.raises(NoVramError, match="device 2 does not exist"):
        device.place("2")


def test_no_visible_device_is_no_device() -> None:
    with pytest.raises(NoCudaDeviceError, match="visible"):
        CudaDevice(two_devices(), {"CUDA_VISIBLE_DEVICES": ""})


def has_driver() -> bool:
    try:
        return bool(Nvml().uuids())
    except NoCudaDeviceError:
        return False


def test_without_a_driver_auto_and_cpu_are_the_cpu_and_cuda_is_one_clear_error() -> None:
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    assert isinstance(select_device(DevicePreference.AUTO), CpuDevice)
    with pytest.raises(NotSupportedError, match=r"set device: CPU"):
        select_device(DevicePreference.CUDA)
    assert isinstance(select_device(DevicePreference.CPU), CpuDevice)
