"""The /proc of a made-up machine, and of this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from vram_agent.devices.fake import FakeDevice
from vram_agent.protocol import DeviceReport, ResidualSource
from vram_agent.wrapping.measuring import Meter
from vram_agent.wrapping.tree import (
    list_descendants,
    may_use_gpu,
    read_cpu_seconds,
)


def add(proc: Path, pid: int, children: str = "", stat: str = "") -> Path:
    folder = proc / str(pid)
    (folder / "task" / str(pid)).mkdir(parents=True)
    (folder / "task" / str(pid) / "children").write_text(children)
    (folder / "stat").write_text(stat)
    (folder / "fd").mkdir()
    return folder


def test_descendants_are_found_down_to_the_last(tmp_path: Path) -> None:
    add(tmp_path, 1, "2 3 ")
    add(tmp_path, 2, "4 ")
    add(tmp_path, 3)
    add(tmp_path, 4, "5 ")  # and 5 has ended between the two looks
    assert sorted(list_descendants(1, tmp_path)) == [2, 3, 4, 5]


def test_cpu_time_is_read_behind_a_name_with_brackets(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    words = ["S", *"0123456789", str(3 * ticks), str(ticks), "0"]
    add(tmp_path, 7, stat=f"7 (a) b) {' '.join(words)}")
    assert read_cpu_seconds(7, tmp_path) == 4.0
    assert read_cpu_seconds(8, tmp_path) is None


def test_a_process_with_an_nvidia_device_open_may_use_it(tmp_path: Path) -> None:
    for pid, target in ((7, "/dev/nvidia-uvm"), (8, "/dev/null")):
        (add(tmp_path, pid) / "fd" / "3").symlink_to(target)
    assert may_use_gpu(7, tmp_path)
    assert not may_use_gpu(8, tmp_path)
    assert not may_use_gpu(9, tmp_path)


class AskedDevice(FakeDevice):
    """It notes whose processes it was asked about."""

    def reports(self, gpu_pids: Mapping[int, str]) -> list[DeviceReport]:
        asked.append(frozenset(gpu_pids))
        return super().reports(gpu_pids)

    def process_bytes(self, pid: int) -> int | None:
        """Other tests' processes hold nothing."""
        return super().process_bytes(pid) or 0


asked: list[frozenset[int]] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    asked.clear()


def test_the_meter_counts_descendants_and_remembers_those_that_just_ended() -> None:
    script = f"{sys.executable} -c 'import time; time.sleep(1000)' & echo $!; wait"
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    ours = {process.pid, worker}
    device = AskedDevice(source=ResidualSource.PROCESS, bytes_by_pid={process.pid: 30, worker: 12})
    meter = Meter(device)
    try:
        measured = meter.measure(0.0)
        assert ours <= asked[-1]
        assert measured.memory.tree_bytes == 42
        assert ours <= set(measured.look.cpu_seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert meter.measure(1.0).look.used_bytes in {0, 12}  # the worker may be a zombie of ours
    assert process.pid in asked[-1]
    meter.measure(2.0)
    assert process.pid not in asked[-1]
