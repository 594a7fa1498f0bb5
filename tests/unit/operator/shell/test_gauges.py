"""The gauges say of agents and memory what the status says."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from vram_operator.cache import Cache
from vram_operator.facts import Facts
from vram_operator.gauges import Gauges
from vram_operator.kube import PODS, WORKLOADS

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
