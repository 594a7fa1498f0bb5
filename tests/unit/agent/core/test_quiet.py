from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.core.quiet import (
    Look,
    Quiet,
    TreeMemory,
    choose_source,
    compute_tree_report,
    measure_cpu_percent,
)
from vram_agent.protocol import IdleProbe, ResidualSource

MIB = 1 << 20
RULE = IdleProbe(quiet_seconds=3, cpu_percent=10)


def look(at: float, mebibytes: float = 100, cpu: float = 0.0) -> Look:
    return Look(at=at, used_bytes=int(mebibytes * MIB), cpu_seconds={7: cpu})


def after(looks: Sequence[Look], answers: Sequence[bool | None] | None = None) -> Quiet:
    quiet = Quiet(rule=RULE)
    for number, one in enumerate(looks):
        quiet = quiet.noted(one, answer=None if answers is None else answers[number])
    return quiet


def test_little_cpu_and_steady_memory_for_long_enough_is_idle() -> None:
    # Two looks make the first quiet second; quiet_seconds of it follow.
    assert not after([look(t) for t in range(4)]).is_idle
    assert after([look(t) for t in range(5)]).is_idle


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(look(5, cpu=0.2), id="20 % of a core is work"),
        pytest.param(look(5, 102), id="memory that grew by 2 MiB is work"),
        pytest.param(look(5, 98), id="memory that was given back is work"),
    ],
)
def test_work_ends_idleness_at_once(last: Look) -> None:
    assert not after([*(look(t) for t in range(5)), last]).is_idle


def test_a_slow_leak_does_not_hide_behind_being_busy() -> None:
    assert after([look(t, 100 + t / 2) for t in range(60)]).is_idle


def test_the_baseline_is_the_least_of_the_first_quiet_time() -> None:
    quiet = after([look(0), look(1, 100.5), look(2, 99.75), look(3, 100), look(4, 100.25)])
    assert quiet.baseline_bytes == int(99.75 * MIB)
    leaked = quiet
    for t in range(5, 20):
        leaked = leaked.noted(look(t, 400), answer=None)
    assert leaked.is_idle
    assert leaked.baseline_bytes == quiet.baseline_bytes


def test_a_probe_says_idle_at_once_and_teaches_after_quiet_seconds() -> None:
    looks = [look(t, 100, cpu=t) for t in range(4)]  # a whole core: the probe knows better
    first = after(looks[:1], [True])
    assert (first.is_idle, first.baseline_bytes) == (True, None)
    assert after(looks, [True] * 4).baseline_bytes == 100 * MIB
    assert not after(looks, [True, True, True, False]).is_idle


def test_a_new_child_that_holds_more_shows_it_and_one_that_holds_less_lowers_the_baseline() -> None:
    learned = after([look(t) for t in range(5)])
    fresh = learned.renewed()
    assert (fresh.is_idle, fresh.baseline_bytes) == (False, 100 * MIB)
    higher, lower = fresh, fresh
    for t in range(10, 15):
        higher = higher.noted(look(t, 150), answer=None)
        lower = lower.noted(look(t, 60), answer=None)
    assert (higher.baseline_bytes, lower.baseline_bytes) == (100 * MIB, 60 * MIB)


def test_a_disturbance_begins_the_quiet_time_anew() -> None:
    quiet = after([look(t) for t in range(4)]).disturbed()
    for t in range(4, 8):
        quiet = quiet.noted(look(t), answer=None)
    assert not quiet.is_idle
    assert quiet.noted(look(8), answer=None).is_idle


def test_cpu_of_processes_that_come_and_go_counts_once() -> None:
    before = Look(at=0, used_bytes=0, cpu_seconds={1: 5.0, 2: 100.0})
    then = Look(at=2, used_bytes=0, cpu_seconds={1: 6.0, 3: 0.5})
    assert measure_cpu_percent(before, then) == 75.0
    assert measure_cpu_percent(then, then) == 0.0


def test_before_the_first_idle_time_nothing_is_residual() -> None:
    memory = TreeMemory(source=ResidualSource.PROCESS, tree_bytes=500)
    report = compute_tree_report(memory, None)
    assert (report.used_bytes, report.model_bytes, report.residual_bytes) == (500, 500, 0)


def test_what_is_held_beyond_the_baseline_is_residual() -> None:
    memory = TreeMemory(source=ResidualSource.PROCESS, tree_bytes=500)
    report = compute_tree_report(memory, 200)
    assert (report.used_bytes, report.model_bytes, report.residual_bytes) == (500, 200, 300)
    assert report.classes.unattributed == 300


def test_on_a_device_of_its_own_the_device_says_what_is_used() -> None:
    memory = TreeMemory(
        source=ResidualSource.EXCLUSIVE,
        device_used_bytes=1000,
        device_baseline_bytes=100,
        tree_bytes=None,
    )
    report = compute_tree_report(memory, 300)
    assert (report.used_bytes, report.model_bytes, report.residual_bytes) == (900, 300, 600)


def test_what_others_hold_on_the_device_is_told_apart_where_the_driver_names_processes() -> None:
    memory = TreeMemory(source=ResidualSource.EXCLUSIVE, device_used_bytes=1000, tree_bytes=400)
    report = compute_tree_report(memory, 300)
    assert report.residual_bytes == 700
    assert (report.classes.other_processes, report.classes.unattributed) == (600, 100)


@pytest.mark.parametrize(
    ("source", "tree_bytes", "expected"),
    [
        pytest.param(ResidualSource.SELF, 5, ResidualSource.SELF, id="measured on a shared device"),
        pytest.param(ResidualSource.SELF, None, ResidualSource.UNKNOWN, id="not named there"),
        pytest.param(ResidualSource.EXCLUSIVE, None, ResidualSource.EXCLUSIVE, id="device alone"),
    ],
)
def test_a_source(source: ResidualSource, tree_bytes: int | None, expected: ResidualSource) -> None:
    assert choose_source(source, tree_bytes) is expected


@given(
    source=st.sampled_from(list(ResidualSource)),
    used=st.integers(0, 1 << 40),
    before=st.integers(0, 1 << 40),
    tree=st.none() | st.integers(0, 1 << 40),
    baseline=st.none() | st.integers(0, 1 << 40),
)
def test_models_and_residual_make_up_what_is_used(
    source: ResidualSource, used: int, before: int, tree: int | None, baseline: int | None
) -> None:
    memory = TreeMemory(
        source=source, device_used_bytes=used, device_baseline_bytes=before, tree_bytes=tree
    )
    report = compute_tree_report(memory, baseline)
    assert report.model_bytes + report.residual_bytes == report.used_bytes
