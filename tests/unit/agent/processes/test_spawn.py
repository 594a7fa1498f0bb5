"""What a template's environment says, and what the supervisor does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vram_agent.cgroup import parse_cpu_quota
from vram_agent.processes.spawn import build_environment, count_threads


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("max 100000\n", None), ("150000 100000\n", 1.5), ("50000 100000", 0.5), ("", None)],
)
def test_a_cpu_quota_is_read(text: str, cpus: float | None) -> None:
    assert parse_cpu_quota(text) == cpus


@pytest.mark.parametrize(
    ("variable", "quota", "threads"),
    [
        pytest.param("3", "100000 100000", 3, id="the user's number wins over the quota"),
        pytest.param("4,2", "max 100000", 4, id="the outermost level counts"),
        pytest.param("", "100000 100000", 1, id="a quota of one CPU is one thread"),
        pytest.param("none", "10000 100000", 1, id="a tenth of a CPU is one thread"),
        pytest.param("0", "max 100000", len(os.sched_getaffinity(0)), id="no limit: all CPUs"),
    ],
)
def test_threads_of_a_gpu_process(tmp_path: Path, variable: str, quota: str, threads: int) -> None:
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(quota)
    assert count_threads({"OMP_NUM_THREADS": variable}, tmp_path) == threads


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("150000", 2), ("-1", len(os.sched_getaffinity(0)))],
    ids=["one and a half CPUs are two threads", "no limit: all CPUs"],
)
def test_threads_under_cgroup_v1(tmp_path: Path, quota: str, threads: int) -> None:
    folder = tmp_path / "sys/fs/cgroup/cpu"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert count_threads({}, tmp_path) == min(threads, len(os.sched_getaffinity(0)))


def test_mkls_number_counts_where_openmps_is_not_set(tmp_path: Path) -> None:
    assert count_threads({"MKL_NUM_THREADS": "5"}, tmp_path) == 5
    assert count_threads({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "5"}, tmp_path) == 3


def test_without_a_cgroup_all_cpus_count(tmp_path: Path) -> None:
    assert count_threads({}, tmp_path) == len(os.sched_getaffinity(0))


def test_a_template_has_one_thread_and_the_users_settings_win_over_the_devices() -> None:
    built = build_environment(
        {"OMP_NUM_THREADS": "8", "MALLOC_ARENA_MAX": "9"}, {"MALLOC_ARENA_MAX": "2", "A": "b"}
    )
    assert built["OMP_NUM_THREADS"] == built["OPENBLAS_NUM_THREADS"] == "1"
    assert built["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    assert (built["MALLOC_ARENA_MAX"], built["A"]) == ("9", "b")


def test_the_supervisors_side_maps_no_model_library() -> None:
    script = """
import sys
import vram_agent.processes.group
import vram_agent.devices
names = {name.partition('.')[0] for name in sys.modules}
assert not names & {'torch', 'numpy', 'onnxruntime', 'whisper'}, names
maps = open('/proc/self/maps').read()
for word in ('torch', 'numpy', 'onnxruntime', 'libcuda', 'openblas'):
    assert word not in maps, word
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_templates_own_code_imports_no_model_library() -> None:
    script = """
import sys
import vram_agent.processes.template
names = {name.partition('.')[0] for name in sys.modules}
assert not names & {'torch', 'numpy', 'onnxruntime', 'whisper'}, names
"""
    subprocess.run([sys.executable, "-c", script], check=True)
