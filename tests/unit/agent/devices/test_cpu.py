"""The CPU as a device: what counts as its memory, and how much of it there is."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from vram_agent.cgroup import (
    ContainerMemory,
    parse_memory_limit_bytes,
    read_memory_limit_bytes,
)
from vram_agent.devices import cpu
from vram_agent.devices.base import OutOfDeviceMemoryError, Placement
from vram_agent.devices.cpu import (
    AnonymousMemory,
    CpuDevice,
    measure_private_anonymous_bytes,
    measure_total_bytes,
    parse_mem_total_bytes,
    parse_private_anonymous_bytes,
)
from vram_agent.errors import NoVramError
from vram_agent.protocol import DeviceKind, ResidualSource

MIB = 1 << 20


def mapping(head: str, clean: int, dirty: int, anonymous: int) -> str:
    return f"""{head}
Size:               1024 kB
KernelPageSize:        4 kB
Rss:                1024 kB
Shared_Clean:          0 kB
Shared_Dirty:          0 kB
Private_Clean:      {clean} kB
Private_Dirty:      {dirty} kB
Referenced:         1024 kB
Anonymous:          {anonymous} kB
LazyFree:              0 kB
VmFlags: rd wr mr mw me ac sd
"""


HEAP = "55d0c8a00000-55d0c8b00000 rw-p 00000000 00:00 0                          [heap]"
BARE = "7f0000000000-7f0000100000 rw-p 00000000 00:00 0 "
LIBRARY = "7f1000000000-7f1000100000 rw-p 00200000 fe:00 1234     /usr/lib/libtorch_cpu.so"
ARENA = "7f2000000000-7f2000100000 rw-s 00000000 00:01 77   /memfd:vram-arena-9 (deleted)"


@pytest.mark.parametrize(
    ("text", "kib"),
    [
        pytest.param("", 0, id="nothing mapped"),
        pytest.param(mapping(BARE, 0, 1000, 1000), 1000, id="written by this process alone"),
        pytest.param(mapping(BARE, 0, 0, 1000), 0, id="still shared with the template"),
        pytest.param(mapping(HEAP, 0, 300, 1000), 300, id="a heap shared in part"),
        pytest.param(mapping(BARE, 24, 1000, 1024), 1024, id="clean anonymous pages count"),
        pytest.param(mapping(LIBRARY, 500, 0, 0), 0, id="a library's own pages"),
        pytest.param(mapping(LIBRARY, 500, 40, 40), 40, id="a library's written data"),
        pytest.param(mapping(ARENA, 100, 900, 0), 0, id="the shared arena is host memory"),
        pytest.param(
            mapping(HEAP, 0, 10, 10) + mapping(ARENA, 0, 999, 0) + mapping(BARE, 0, 7, 9),
            17,
            id="mappings add up",
        ),
    ],
)
def test_private_anonymous_memory_of(text: str, kib: int) -> None:
    assert parse_private_anonymous_bytes(text) == kib * 1024


def test_a_live_process_is_measured() -> None:
    script = """
import mmap, sys
block = mmap.mmap(-1, 32 * 1024**2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("small", flush=True)
sys.stdin.readline()
for page in range(0, len(block), mmap.PAGESIZE):
    block[page] = 1
print("large", flush=True)
sys.stdin.readline()
"""
    # A process of its own: this one's other threads and caches come and go.
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "small\n"
        before = measure_private_anonymous_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "large\n"
        during = measure_private_anonymous_bytes(child.pid)
        child.stdin.write("\n")
    assert before is not None
    assert during is not None
    assert during - before == pytest.approx(32 * MIB, abs=MIB)


def test_a_process_that_has_ended_is_not_measured() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert measure_private_anonymous_bytes(pid) is None


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        pytest.param("max\n", None, id="v2 without a limit"),
        pytest.param("8589934592\n", 8 << 30, id="v2 or v1 with a limit"),
        pytest.param("9223372036854771712\n", None, id="v1 without a limit"),
        pytest.param("", None, id="an empty file"),
    ],
)
def test_a_cgroups_limit(text: str, limit: int | None) -> None:
    assert parse_memory_limit_bytes(text) == limit


def test_the_containers_limit_is_read_from_either_version(tmp_path: Path) -> None:
    assert read_memory_limit_bytes(tmp_path) is None
    first = tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes"
    first.parent.mkdir(parents=True)
    first.write_text("2097152\n")
    assert read_memory_limit_bytes(tmp_path) == 2 * MIB
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert read_memory_limit_bytes(tmp_path) is None


V2 = {
    "memory.max": "1000\n",
    "memory.current": "900\n",
    "memory.stat": "anon 300\nfile 550\nshmem 100\ninactive_file 400\nactive_file 50\n",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\n",
}
V1 = {
    "memory/memory.limit_in_bytes": "1000\n",
    "memory/memory.usage_in_bytes": "900\n",
    "memory/memory.stat": "inactive_file 1\nactive_file 1\n"
    "total_shmem 100\ntotal_inactive_file 400\ntotal_active_file 50\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(V2, (1000, 550, 2), id="v2: page cache counts as free, shared memory not"),
        pytest.param(V1, (1000, 550, 2), id="v1: the same from the totals of its children too"),
        pytest.param({**V2, "memory.max": "max"}, (None, None, 2), id="no limit"),
        pytest.param({**V2, "memory.current": "1500"}, (1000, 0, 2), id="nothing is left"),
        pytest.param({"memory.max": "1000"}, (1000, None, 0), id="files that are missing"),
        pytest.param({**V2, "memory.stat": "odd"}, (1000, None, 2), id="a file that is odd"),
        pytest.param({}, (None, None, 0), id="no cgroup"),
    ],
)
def test_what_a_container_may_still_take(
    tmp_path: Path, files: dict[str, str], expected: tuple[int | None, int | None, int]
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    memory = ContainerMemory(tmp_path)
    found = (memory.limit_bytes(), memory.available_bytes(), memory.oom_kills())
    assert found == expected


def test_mem_total_is_read_and_its_absence_told() -> None:
    assert parse_mem_total_bytes("MemTotal:       1024 kB\nMemFree: 1 kB\n") == MIB
    with pytest.raises(ValueError, match="MemTotal"):
        parse_mem_total_bytes("MemFree: 1 kB\n")


@pytest.mark.parametrize(
    ("path", "text", "total"),
    [
        pytest.param("sys/fs/cgroup/memory.max", "1048576", MIB, id="cgroup v2"),
        pytest.param(
            "sys/fs/cgroup/memory/memory.limit_in_bytes", "2097152", 2 * MIB, id="cgroup v1"
        ),
        pytest.param("sys/fs/cgroup/memory.max", "max", 4 * MIB, id="no limit: the machine's"),
        pytest.param("sys/fs/cgroup/memory.max", "999999999", 4 * MIB, id="above the machine's"),
        pytest.param("nowhere", "", 4 * MIB, id="no cgroup"),
    ],
)
def test_the_devices_total(tmp_path: Path, path: str, text: str, total: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       4096 kB\n")
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert measure_total_bytes(tmp_path) == total


def test_the_device_says_what_it_is() -> None:
    device = CpuDevice(total_bytes=MIB)
    (report,) = device.reports({})
    assert (report.kind, report.total_bytes, report.used_bytes) == (DeviceKind.CPU, MIB, 0)
    assert device.residual_source() is ResidualSource.PROCESS
    assert device.baseline_bytes() == 0
    own = device.process_bytes(os.getpid())
    assert own is not None
    assert device.reports({os.getpid(): "CPU-0"})[0].used_bytes == pytest.approx(own, rel=0.1)
    assert device.place("") == device.place("0") == device.place("CPU-0")
    with pytest.raises(NoVramError, match="device 1 does not exist"):
        device.place("1")


def test_a_process_is_read_again_once_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[int] = []

    def read(pid: int) -> int | None:
        readings.append(pid)
        return measure_private_anonymous_bytes(pid)

    monkeypatch.setattr(cpu, "measure_private_anonymous_bytes", read)
    script = (
        "import sys\nheld=[]\nfor n in sys.stdin:\n held.append(b'x'*int(n)); print(flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        device = CpuDevice(1 << 40)

        def take(nbytes: int) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            print(nbytes, file=process.stdin, flush=True)
            process.stdout.readline()
            # It has answered; what follows until it waits again is its last run.
            while (
                Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S"
            ):
                os.sched_yield()

        take(1)
        before_bytes = device.process_bytes(process.pid)
        assert before_bytes is not None
        for _ in range(3):
            assert device.process_bytes(process.pid) == before_bytes
            assert device.reports({process.pid: "CPU-0"})[0].used_bytes == before_bytes
        assert readings == [process.pid]
        take(32 * MIB)
        after_bytes = device.reports({process.pid: "CPU-0"})[0].used_bytes
        assert after_bytes - before_bytes == pytest.approx(32 * MIB, abs=MIB)
        assert len(readings) == 2
        process.stdin.close()
        process.wait()
        assert device.process_bytes(process.pid) is None


def test_memory_beyond_the_total_is_refused_with_figures() -> None:
    used_bytes = measure_private_anonymous_bytes(os.getpid())
    assert used_bytes is not None
    total_bytes = used_bytes + 64 * MIB
    memory = AnonymousMemory(
        Placement(kind=DeviceKind.CPU, index=0, uuid="CPU-0", total_bytes=total_bytes)
    )
    assert memory.allocate(8 * MIB).free()
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        memory.allocate(128 * MIB)
    assert caught.value.wanted_bytes == 128 * MIB
    assert caught.value.total_bytes == total_bytes
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(ValueError("odd"))


def test_what_another_thread_takes_while_the_first_one_waits_is_seen() -> None:
    script = textwrap.dedent("""
        import sys, threading
        held = []

        def work():
            for line in open(0, closefd=False):
                held.append(b"x" * int(line))
                print(flush=True)

        threading.Thread(target=work, daemon=True).start()
        print(flush=True)
        threading.Event().wait()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        device = CpuDevice(1 << 40)
        before_bytes = device.process_bytes(process.pid)
        assert before_bytes is not None
        print(64 * MIB, file=process.stdin, flush=True)
        process.stdout.readline()
        after_bytes = device.process_bytes(process.pid)
        assert after_bytes is not None
        assert after_bytes - before_bytes > 60 * MIB
        process.kill()
