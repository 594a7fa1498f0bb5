from __future__ import annotations

import re

from vram_agent.metrics import AgentMetrics

from tests.support.server import FakeModelServer


def samples(metrics: AgentMetrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_gauges_are_read_from_one_report() -> None:
    server = FakeModelServer()
    metrics = AgentMetrics("1.2.3")
    metrics.attach(server.report)
    found = samples(metrics)
    assert server.sequence == 1
    expected = {
        'vram_agent_build_info{version="1.2.3"}': 1,
        'vram_agent_device_total_bytes{gpu_uuid="GPU-1"}': 80_000,
        'vram_agent_device_used_bytes{gpu_uuid="GPU-1"}': 5_000,
        'vram_agent_device_baseline_bytes{gpu_uuid="GPU-1"}': 200,
        'vram_agent_device_dirty{gpu_uuid="GPU-1"}': 1,
        'vram_agent_residual_bytes{source="Exclusive"}': 3_000,
        'vram_agent_memory_class_bytes{class="contextAndLibraries"}': 2_900,
        'vram_agent_memory_class_bytes{class="otherProcesses"}': 0,
        'vram_agent_model_bytes{model="adder",tier="VRAM"}': 2_000,
        'vram_agent_model_bytes{model="adder",tier="Host"}': 2_000,
        'vram_agent_model_bytes{model="whisper",tier="PinnedHost"}': 1_000,
        'vram_agent_model_bytes{model="whisper",tier="VRAM"}': 0,
        'vram_agent_queue_depth{model="adder"}': 3,
        'vram_agent_model_needed_bytes{model="adder"}': 2_500,
        "vram_agent_host_limit_bytes": 64_000,
        "vram_agent_host_available_bytes": 48_000,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_model_is_in_exactly_one_state() -> None:
    metrics = AgentMetrics("1")
    metrics.attach(FakeModelServer().report)
    states = {
        name: value
        for name, value in samples(metrics).items()
        if name.startswith('vram_agent_model_state{model="adder"')
    }
    assert len(states) == 7
    assert [name for name, value in states.items() if value] == [
        'vram_agent_model_state{model="adder",state="Resident"}'
    ]


def test_what_happens_is_counted() -> None:
    metrics = AgentMetrics("1")
    metrics.observe_transition("a", "restore", 0.3, "ok")
    metrics.observe_eviction("a", "VRAM needed for b")
    metrics.observe_queue_wait("a", 0.2)
    metrics.observe_worker_restart("a", "exit")
    metrics.observe_scrub(400)
    metrics.observe_scrub(50)
    metrics.observe_request("a", "infer", 200, 1.5)
    found = samples(metrics)
    expected = {
        'vram_agent_transitions_total{model="a",outcome="ok",transition="restore"}': 1,
        'vram_agent_transition_seconds_sum{model="a",transition="restore"}': 0.3,
        'vram_agent_evictions_total{model="a",reason="VRAM needed for b"}': 1,
        'vram_agent_queue_seconds_count{model="a"}': 1,
        'vram_agent_worker_restarts_total{model="a",reason="exit"}': 1,
        "vram_agent_scrub_reclaimed_bytes_total": 450,
        'vram_agent_requests_total{api="infer",code="200",model="a"}': 1,
        'vram_agent_request_seconds_bucket{api="infer",le="1.0",model="a"}': 0,
        'vram_agent_request_seconds_bucket{api="infer",le="2.5",model="a"}': 1,
    }
    assert {name: found.get(name) for name in expected} == expected


CONTRACT = {
    "device_total_bytes": {"gpu_uuid"},
    "device_used_bytes": {"gpu_uuid"},
    "model_bytes": {"model", "tier"},
    "residual_bytes": {"source"},
    "memory_class_bytes": {"class"},
    "model_state": {"model", "state"},
    "transition_seconds_bucket": {"model", "transition", "le"},
    "transitions_total": {"model", "transition", "outcome"},
    "evictions_total": {"model", "reason"},
    "requests_total": {"model", "api", "code"},
    "request_seconds_bucket": {"model", "api", "le"},
    "queue_depth": {"model"},
    "queue_seconds_bucket": {"model", "le"},
    "worker_restarts_total": {"model", "reason"},
    "build_info": {"version"},
    "device_baseline_bytes": {"gpu_uuid"},
    "device_dirty": {"gpu_uuid"},
    "model_needed_bytes": {"model"},
    "host_limit_bytes": set(),
    "host_available_bytes": set(),
    "scrub_reclaimed_bytes_total": set(),
}
"""What dashboards and alerts rest on; histograms by their buckets."""


def test_every_promised_name_is_there_with_its_labels_and_no_other() -> None:
    metrics = AgentMetrics("1")
    metrics.attach(FakeModelServer().report)
    metrics.observe_transition("a", "restore", 0.3, "ok")
    metrics.observe_eviction("a", "Evicted")
    metrics.observe_queue_wait("a", 0.2)
    metrics.observe_worker_restart("a", "GpuDied")
    metrics.observe_request("a", "infer", 200, 1.5)
    found: dict[str, set[str]] = {}
    for sample in samples(metrics):
        name, _, labels = sample.removesuffix("}").partition("{")
        found[name.removeprefix("vram_agent_")] = set(re.findall(r'(\w+)="', labels))
    sums = {name for name in found if name.endswith(("_seconds_sum", "_seconds_count"))}
    assert {name: labels for name, labels in found.items() if name not in sums} == CONTRACT


def test_every_name_has_the_prefix_and_nothing_is_created_twice() -> None:
    metrics = AgentMetrics("1")
    metrics.attach(FakeModelServer().report)
    metrics.observe_request("a", "infer", 200, 1.5)
    names = samples(metrics)
    assert all(name.startswith("vram_agent_") for name in names)
    assert not any("_created" in name for name in names)


def test_before_a_report_there_are_the_build_and_a_counter_at_zero() -> None:
    assert samples(AgentMetrics("1")) == {
        'vram_agent_build_info{version="1"}': 1,
        "vram_agent_scrub_reclaimed_bytes_total": 0,
    }


def test_two_agents_in_one_process_do_not_share_metrics() -> None:
    first, second = AgentMetrics("1"), AgentMetrics("2")
    first.observe_eviction("a", "why")
    assert not any("evictions" in name for name in samples(second))
