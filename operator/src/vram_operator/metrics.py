"""Every metric of the operator, defined once.

Counters and histograms are written where the thing happens; gauges are read from the caches when
someone scrapes, so that they cannot go stale. Names are in the project's contract and start with
``vram_operator_``.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from vram_agent.protocol import parse_quantity

from vram_operator import __version__
from vram_operator.api import RestartMethod, RestartOutcome, RestartStatus, RestartTrigger
from vram_operator.core.reporting import AgentState
from vram_operator.kube import Traffic

PREFIX = "vram_operator_"
NO_METHOD = "None"
"""Of a restart that ended before its first step."""
_SHORT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)


@dataclass(frozen=True)
class TrendGauge:
    """Where the residual of a workload leads; None for what is not known, and then not shown.

    The slope is that of the pod whose residual grows fastest, the moments those of the first pod.
    """

    bytes_per_second: float | None = None
    threshold_at: datetime | None = None
    out_of_memory_at: datetime | None = None


@dataclass(frozen=True)
class WorkloadGauge:
    """What a scrape tells of one workload."""

    namespace: str
    name: str
    ready: str
    degraded: bool
    used_bytes: int
    residual_bytes: int
    is_idle: bool | None
    """None while no agent is heard."""
    conditions: Mapping[str, bool]
    """Which condition types are True."""
    agent_states: tuple[str, ...]
    trend: TrendGauge


class _StateCollector(Collector):
    """Reads the gauges at each scrape."""

    def __init__(self) -> None:
        self.workloads: Callable[[], Iterator[WorkloadGauge]] = lambda: iter(())
        self.blocked: Callable[[], list[str]] = list

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        used = GaugeMetricFamily(
            f"{PREFIX}workload_used_bytes",
            "Device memory that the workload's pods hold.",
            labels=["namespace", "workload"],
        )
        residual = GaugeMetricFamily(
            f"{PREFIX}workload_residual_bytes",
            "Device memory of the workload's pods that no resident model accounts for.",
            labels=["namespace", "workload"],
        )
        trends, states_of, degraded = _Trends(), _States(), 0
        ready: Tally[str] = Tally({"True": 0, "False": 0, "Unknown": 0})
        states: Tally[str] = Tally(dict.fromkeys(map(str, AgentState), 0))
        for workload in self.workloads():
            ready[workload.ready] += 1
            degraded += workload.degraded
            states.update(workload.agent_states)
            trends.add(workload)
            states_of.add(workload)
            used.add_metric([workload.namespace, workload.name], workload.used_bytes)
            residual.add_metric([workload.namespace, workload.name], workload.residual_bytes)
        yield used
        yield residual
        yield from states_of.families
        yield from trends.families
        yield _tally("workloads", "Workloads by their condition Ready.", "ready", ready)
        yield GaugeMetricFamily(
            f"{PREFIX}workloads_degraded",
            "Workloads that get no residual restart, since so many in a row did not help.",
            value=degraded,
        )
        yield _tally("agents", "Agents by how they answer.", "state", states)
        yield _tally(
            "restarts_blocked",
            "Restarts that wait, by what blocks them.",
            "reason",
            Tally(self.blocked()),
        )


class _States:
    """The gauges of what holds for each workload."""

    def __init__(self) -> None:
        self._conditions = GaugeMetricFamily(
            f"{PREFIX}workload_condition",
            "1 where the condition of the workload is True, 0 where it is not.",
            labels=["namespace", "workload", "type"],
        )
        self._idle = GaugeMetricFamily(
            f"{PREFIX}workload_idle",
            "1 while no request waits or runs and no model moves, as its agents say.",
            labels=["namespace", "workload"],
        )

    def add(self, workload: WorkloadGauge) -> None:
        labels = [workload.namespace, workload.name]
        for type_, holds in workload.conditions.items():
            self._conditions.add_metric([*labels, type_], holds)
        if workload.is_idle is not None:
            self._idle.add_metric(labels, workload.is_idle)

    @property
    def families(self) -> tuple[GaugeMetricFamily, ...]:
        return self._conditions, self._idle


class _Trends:
    """The gauges of where residuals lead."""

    def __init__(self) -> None:
        labels = ["namespace", "workload"]
        self._slope = GaugeMetricFamily(
            f"{PREFIX}workload_residual_slope_bytes_per_second",
            "Growth of the residual, of the workload's pod where it grows fastest.",
            labels=labels,
        )
        self._threshold = GaugeMetricFamily(
            f"{PREFIX}workload_residual_threshold_timestamp_seconds",
            "When a pod's residual is predicted to pass restart.residual.threshold.",
            labels=labels,
        )
        self._out_of_memory = GaugeMetricFamily(
            f"{PREFIX}workload_residual_out_of_memory_timestamp_seconds",
            "When a pod's residual is predicted to have filled its device.",
            labels=labels,
        )

    def add(self, workload: WorkloadGauge) -> None:
        labels, found = [workload.namespace, workload.name], workload.trend
        if found.bytes_per_second is not None:
            self._slope.add_metric(labels, found.bytes_per_second)
        if found.threshold_at is not None:
            self._threshold.add_metric(labels, found.threshold_at.timestamp())
        if found.out_of_memory_at is not None:
            self._out_of_memory.add_metric(labels, found.out_of_memory_at.timestamp())

    @property
    def families(self) -> tuple[GaugeMetricFamily, ...]:
        return self._slope, self._threshold, self._out_of_memory


def _tally(name: str, text: str, label: str, counts: Tally[str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


class Metrics:
    """The operator's metrics in a registry of their own."""

    def __init__(self) -> None:
        # A second series for each counter, with its birthday, which nobody asked for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.state = _StateCollector()
        self.registry.register(self.state)
        self.restarts = self._counter(
            "restarts_total", "Restarts that ended.", "trigger", "method", "outcome"
        )
        # Prometheus sees no increase in a series that begins with its first restart.
        methods = [*(set(RestartMethod) - {RestartMethod.AUTO}), NO_METHOD]
        for labels in product(RestartTrigger, methods, RestartOutcome):
            self.restarts.labels(*labels)
        self.restart_seconds = self._histogram(
            "restart_seconds", "From the first action to the end.", _LONG_SECONDS, "method"
        )
        self.downtime_seconds = self._histogram(
            "restart_downtime_seconds",
            "For how long the pod was not ready.",
            _LONG_SECONDS,
            "method",
        )
        self.reclaimed_bytes = self._counter(
            "reclaimed_bytes_total", "Residual device memory that restarts gave back."
        )
        self.schedule_missed = self._counter(
            "schedule_missed_total", "Scheduled runs that were given up at their deadline."
        )
        self.reconcile_seconds = self._histogram(
            "reconcile_seconds", "One visit of one workload.", _SHORT_SECONDS
        )
        self.reconcile_errors = self._counter(
            "reconcile_errors_total", "Visits that ended early, by what ended them.", "error"
        )
        self.report_age_seconds = self._histogram(
            "report_age_seconds",
            "Age of an agent's last report when the next one came.",
            _LONG_SECONDS,
        )
        self.api_requests = self._counter(
            "api_requests_total", "Requests to the apiserver.", "verb", "resource", "code"
        )
        self.queue_depth = Gauge(
            PREFIX + "queue_depth", "Workloads that wait for a visit.", registry=self.registry
        )
        self.leader = Gauge(
            PREFIX + "leader", "1 while this replica is the one that acts.", registry=self.registry
        )
        Info(PREFIX + "build", "What runs.", registry=self.registry).info({"version": __version__})

    def count_restart(self, labels: tuple[str, str, str], status: RestartStatus) -> None:
        """Count a restart that ended, by trigger, last method and outcome."""
        self.restarts.labels(*labels).inc()
        method = labels[1]
        if status.start_time is not None and status.completion_time is not None:
            took = status.completion_time - status.start_time
            self.restart_seconds.labels(method).observe(took.total_seconds())
        if status.downtime_seconds is not None:
            self.downtime_seconds.labels(method).observe(status.downtime_seconds)
        if status.reclaimed:
            self.reclaimed_bytes.inc(parse_quantity(status.reclaimed))

    def observe_request(self, traffic: Traffic) -> None:
        """Count an answered request to the apiserver. May be called from any thread."""
        verb = "watch" if traffic.is_watch else traffic.method.lower()
        self.api_requests.labels(
            verb, resource_of(traffic.url_path), str(traffic.response.status)
        ).inc()

    def exposition(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(PREFIX + name, text, labels, registry=self.registry, buckets=buckets)


def resource_of(url_path: str) -> str:
    """Return the resource that an API path is about, such as ``pods/eviction``."""
    parts = url_path.strip("/").split("/")
    # /api/v1/… or /apis/<group>/<version>/…
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) >= 3 and rest[0] == "namespaces":
        rest = rest[2:]
    if not rest:
        return "discovery"
    return f"{rest[0]}/{rest[2]}" if len(rest) > 2 else rest[0]
