"""The gauges say of agents and memory what the status says."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from vram_operator.cache import Cache
from vram_operator.facts import Facts
from vram_operator.gauges import Gauges
from vram_operator.kube import PODS, WORKLOADS
from vram_operator.metrics import Metrics

from tests.support.clocks import StoppedClock
from tests.support.factories import GIB, NOW, ago, make_pod, make_report, rfc3339


def raw_pod(name: str, age_seconds: float = 3600, **fields: Any) -> dict[str, Any]:
    metadata = fields.pop("metadata", {})
    started = {"running": {"startedAt": rfc3339(ago(age_seconds))}}
    return {
        "metadata": {
            "name": name,
            "namespace": "lab",
            "uid": f"uid-{name}",
            "resourceVersion": "5",
            "creationTimestamp": rfc3339(ago(age_seconds)),
            "labels": {"vram.dev/workload": "speech"},
            **metadata,
        },
        "spec": {"containers": [{"name": "agent", "ports": []}]},
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "containerStatuses": [{"name": "agent", "state": started}],
            **fields,
        },
    }


@pytest.fixture
def cache() -> Cache:
    cache = Cache(StoppedClock())
    workload = {"name": "speech", "namespace": "lab", "uid": "w", "resourceVersion": "1"}
    cache.observe(WORKLOADS, {"metadata": workload, "spec": {}})
    return cache


def test_agents_are_counted_as_the_condition_agents_reporting_counts_them(cache: Cache) -> None:
    facts = Facts()
    waiting = [{"name": "agent", "state": {"waiting": {}}}]
    for pod in (
        raw_pod("well"),
        raw_pod("lost"),
        raw_pod("young", 5),
        raw_pod("refusing"),
        raw_pod("one-poll-failed"),
        raw_pod("pending", phase="Pending", containerStatuses=waiting),
        raw_pod("ended", phase="Failed", containerStatuses=[]),
        raw_pod("going", metadata={"deletionTimestamp": rfc3339(NOW)}),
    ):
        cache.observe(PODS, pod)
    for name in ("well", "refusing", "one-poll-failed", "ended", "going"):
        facts.record_report(f"uid-{name}", make_report(make_pod(name), 1.0), NOW, 600)
    lost_at = NOW - timedelta(seconds=91)
    facts.record_report("uid-lost", make_report(make_pod("lost"), 1.0), lost_at, 600)
    facts.record_silence("uid-one-poll-failed", "no answer")
    facts.record_word("uid-refusing", 401, NOW)
    gauges = Gauges(cache, facts, StoppedClock(), 10.0)
    gauges.is_active = lambda: True
    (gauge,) = gauges.workloads()
    assert sorted(gauge.agent_states) == [
        "Refusing",
        "Reporting",
        "Reporting",
        "Silent",
        "Starting",
    ]
    assert gauge.residual_bytes == 3 * GIB


def test_a_standby_shows_nothing(cache: Cache) -> None:
    assert list(Gauges(cache, Facts(), StoppedClock(), 10.0).workloads()) == []


def growing(facts: Facts, name: str, gib_an_hour: float) -> None:
    """Reports of an hour, up to 2 GiB now."""
    for number in range(12, -1, -1):
        report = make_report(make_pod(name), 2 - gib_an_hour * number / 12, ago(300 * number))
        facts.record_report(f"uid-{name}", report, ago(300 * number), 600)


def test_a_degraded_workload_is_counted(cache: Cache) -> None:
    degraded = {"type": "Degraded", "status": "True"}
    workload = {"name": "other", "namespace": "lab", "uid": "o", "resourceVersion": "1"}
    status = {"conditions": [degraded, {"type": "Ready", "status": "False"}]}
    cache.observe(WORKLOADS, {"metadata": workload, "spec": {}, "status": status})
    metrics, gauges = Metrics(), Gauges(cache, Facts(), StoppedClock(), 10.0)
    gauges.is_active = lambda: True
    metrics.state.workloads = gauges.workloads
    lines = metrics.exposition().decode().splitlines()
    assert "vram_operator_workloads_degraded 1.0" in lines
    assert 'vram_operator_workloads{ready="False"} 1.0' in lines


def test_conditions_and_idleness_are_shown_of_each_workload(cache: Cache) -> None:
    conditions = [{"type": "VRAMHigh", "status": "True"}, {"type": "Ready", "status": "Unknown"}]
    workload = {"name": "speech", "namespace": "lab", "uid": "w", "resourceVersion": "2"}
    cache.observe(
        WORKLOADS, {"metadata": workload, "spec": {}, "status": {"conditions": conditions}}
    )
    facts = Facts()
    for name in ("first", "second"):
        cache.observe(PODS, raw_pod(name))
        facts.record_report(
            f"uid-{name}", make_report(make_pod(name), idle=name == "first"), NOW, 600
        )
    metrics, gauges = Metrics(), Gauges(cache, facts, StoppedClock(), 10.0)
    gauges.is_active = lambda: True
    metrics.state.workloads = gauges.workloads
    of = 'namespace="lab"'
    shown = metrics.exposition().decode().splitlines()
    for type_, value in {"VRAMHigh": 1.0, "Ready": 0.0, "Degraded": 0.0}.items():
        labels = f'{of},type="{type_}",workload="speech"'
        assert f"vram_operator_workload_condition{{{labels}}} {value}" in shown
    assert f'vram_operator_workload_idle{{{of},workload="speech"}} 0.0' in shown


def exposed(cache: Cache, facts: Facts) -> dict[str, float]:
    """What a scrape shows of where residuals lead, by the rest of the metric's name."""
    metrics = Metrics()
    gauges = Gauges(cache, facts, StoppedClock(), 10.0)
    gauges.is_active = lambda: True
    metrics.state.workloads = gauges.workloads
    prefix = "vram_operator_workload_residual_"
    labels = '{namespace="lab",workload="speech"} '
    lines = [line for line in metrics.exposition().decode().splitlines() if line.startswith(prefix)]
    found = (line.removeprefix(prefix).split(labels) for line in lines)
    return {name: float(value) for name, value in found if name != "bytes"}


def test_slope_and_moments_are_those_of_the_pods_that_come_first(cache: Cache) -> None:
    cache.observe(PODS, raw_pod("slow"))
    cache.observe(PODS, raw_pod("fast"))
    policy = {"restart": {"residual": {"threshold": "8Gi"}}}
    workload = {"name": "speech", "namespace": "lab", "uid": "w", "resourceVersion": "2"}
    cache.observe(WORKLOADS, {"metadata": workload, "spec": policy})
    facts = Facts()
    growing(facts, "slow", 0.5)
    growing(facts, "fast", 1.0)
    now = NOW.timestamp()
    expected = {
        "slope_bytes_per_second": GIB / 3600,
        "threshold_timestamp_seconds": now + 6 * 3600,
        "out_of_memory_timestamp_seconds": now + 78 * 3600,
    }
    assert exposed(cache, facts) == pytest.approx(expected, abs=1e-3)


def test_a_level_residual_has_a_slope_and_leads_nowhere(cache: Cache) -> None:
    cache.observe(PODS, raw_pod("well"))
    facts = Facts()
    growing(facts, "well", 0.0)
    assert exposed(cache, facts) == {"slope_bytes_per_second": 0.0}


def test_what_is_not_known_is_not_shown(cache: Cache) -> None:
    cache.observe(PODS, raw_pod("well"))
    facts = Facts()
    facts.record_report("uid-well", make_report(make_pod("well"), 2.0), NOW, 600)
    assert exposed(cache, facts) == {}
    growing(facts, "lost", 1.0)
    cache.observe(PODS, raw_pod("lost"))
    facts.record_report("uid-lost", make_report(make_pod("lost"), 2.0), ago(91), 600)
    assert exposed(cache, facts) == {}
