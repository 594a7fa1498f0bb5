"""The agent's Prometheus metrics, each name defined once.

Why it exists: dashboards and alerts rest on these names and labels. The supervisor calls the
``observe_…`` methods as things happen, serving/ observes requests and renders the text; the gauges
are read from one Report at the moment of a scrape, so that they cannot disagree with ``/report``.
It knows neither HTTP nor devices, and holds no process-wide state: each instance has a registry
of its own, so that an application that embeds the agent keeps its own metrics apart.

Label values are bounded: models are names of the config, never what a client wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vram_agent.protocol import MemoryReport, ModelReport, ModelState, Report, Tier

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
UNKNOWN_MODEL = ""  # no config has a model of that name, so it cannot be mistaken for one

_PREFIX = "vram_agent_"
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TRANSITION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_QUEUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_MEMORY_CLASSES = {
    "liveTensors": "live_tensors",
    "allocatorCache": "allocator_cache",
    "runtimeArena": "runtime_arena",
    "contextAndLibraries": "context_and_libraries",
    "otherProcesses": "other_processes",
    "unattributed": "unattributed",
}


class AgentMetrics:
    """All ``vram_agent_`` metrics of one agent. Every method is cheap, and safe on the event loop.

    The observers never raise for a label they have not seen: callers pass names of the config and
    documented words only.
    """

    def __init__(self, version: str) -> None:
        self._version = version
        self._read_report: Callable[[], Report] | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._transitions = self._counter(
            "transitions",
            "Changes of a model's residency, by how they ended.",
            ("model", "transition", "outcome"),
        )
        self._transition_seconds = self._histogram(
            "transition_seconds",
            "Seconds that a change of a model's residency took, however it ended.",
            ("model", "transition"),
            _TRANSITION_BUCKETS,
        )
        self._evictions = self._counter(
            "evictions", "Decisions to take a model out of VRAM for another.", ("model", "reason")
        )
        self._requests = self._counter(
            "requests",
            "Requests answered on the serving port; code 499: the client went away first.",
            ("model", "api", "code"),
        )
        self._request_seconds = self._histogram(
            "request_seconds",
            "Seconds from the head of a request to its answer, waiting included.",
            ("model", "api"),
            _REQUEST_BUCKETS,
        )
        self._queue_seconds = self._histogram(
            "queue_seconds",
            "Seconds that a request waited before its task began.",
            ("model",),
            _QUEUE_BUCKETS,
        )
        self._worker_restarts = self._counter(
            "worker_restarts", "Processes of a model's group started anew.", ("model", "reason")
        )
        self._scrub_reclaimed_bytes = self._counter(
            "scrub_reclaimed_bytes",
            "Device memory that scrubs of GPU processes gave back, beyond models' weights.",
            (),
        )
        self._registry.register(_Gauges(self._collect_gauges))

    @property
    def version(self) -> str:
        """The agent's version, as in ``build_info``."""
        return self._version

    def attach(self, read_report: Callable[[], Report]) -> None:
        """Take the gauges from ``read_report`` from now on; it is called once per scrape."""
        self._read_report = read_report

    def observe_transition(self, model: str, transition: str, seconds: float, outcome: str) -> None:
        """Count a finished transition such as ``restore``; outcome is ``ok`` or ``failed``."""
        self._transitions.labels(model, transition, outcome).inc()
        self._transition_seconds.labels(model, transition).observe(seconds)

    def observe_eviction(self, model: str, reason: str) -> None:
        """Count a model evicted; the reason is the policy's documented word."""
        self._evictions.labels(model, reason).inc()

    def observe_queue_wait(self, model: str, seconds: float) -> None:
        """Count a task that began after so many seconds in the queue."""
        self._queue_seconds.labels(model).observe(seconds)

    def observe_worker_restart(self, model: str, reason: str) -> None:
        """Count a process of the model's group started anew, with the documented reason."""
        self._worker_restarts.labels(model, reason).inc()

    def observe_scrub(self, reclaimed_bytes: int) -> None:
        """Count what a scrub of a GPU process gave back."""
        self._scrub_reclaimed_bytes.inc(reclaimed_bytes)

    def observe_request(self, model: str, api: str, code: int, seconds: float) -> None:
        """Count an answered request; ``model`` is UNKNOWN_MODEL unless the config has it."""
        self._requests.labels(model, api, str(code)).inc()
        self._request_seconds.labels(model, api).observe(seconds)

    def render(self) -> bytes:
        """Return the text exposition, CONTENT_TYPE. Reads one Report where one is attached."""
        return generate_latest(_WithoutCreated(self._registry))

    def _collect_gauges(self) -> Iterator[Metric]:
        yield _family(
            "build_info", "1, with the agent's version.", ("version",), [((self._version,), 1)]
        )
        if self._read_report is not None:
            yield from gauges_of(self._read_report())

    def _counter(self, name: str, documentation: str, labels: tuple[str, ...]) -> Counter:
        return Counter(_PREFIX + name, documentation, labels, registry=self._registry)

    def _histogram(
        self, name: str, documentation: str, labels: tuple[str, ...], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(
            _PREFIX + name, documentation, labels, buckets=buckets, registry=self._registry
        )


def gauges_of(report: Report) -> Iterator[Metric]:
    """Return every gauge that a Report carries; pure."""
    yield _family(
        "device_total_bytes",
        "Memory of the device.",
        ("gpu_uuid",),
        [((device.uuid,), device.total_bytes) for device in report.devices],
    )
    yield _family(
        "device_used_bytes",
        "Memory in use on the device, by whomever.",
        ("gpu_uuid",),
        [((device.uuid,), device.used_bytes) for device in report.devices],
    )
    yield _family(
        "device_baseline_bytes",
        "Memory in use on the device before the agent's first context.",
        ("gpu_uuid",),
        [((device.uuid,), device.baseline_bytes) for device in report.devices],
    )
    yield _family(
        "device_dirty",
        "1 where that is more than vram.dirty.above admits.",
        ("gpu_uuid",),
        [((device.uuid,), int(device.dirty)) for device in report.devices],
    )
    memory = report.memory
    yield _family(
        "residual_bytes",
        "Device memory that the pod holds beyond its resident models.",
        ("source",),
        [((memory.source.value,), memory.residual_bytes)],
    )
    yield _family(
        "memory_class_bytes",
        "The residual by what holds it.",
        ("class",),
        [((label,), getattr(memory.classes, name)) for label, name in _MEMORY_CLASSES.items()],
    )
    yield from _host_gauges(report.memory)
    yield from _model_gauges(report.models)


def _host_gauges(memory: MemoryReport) -> Iterator[Metric]:
    """Nothing without a limit: there is no share of it to speak of."""
    if memory.host_limit_bytes is None or memory.host_available_bytes is None:
        return
    yield _family(
        "host_limit_bytes",
        "Memory limit of the container.",
        (),
        [((), memory.host_limit_bytes)],
    )
    yield _family(
        "host_available_bytes",
        "What the container may still take, page cache of files included.",
        (),
        [((), memory.host_available_bytes)],
    )


def _model_gauges(models: list[ModelReport]) -> Iterator[Metric]:
    yield _family(
        "model_bytes",
        "Bytes of a model's weights, by where they are.",
        ("model", "tier"),
        [row for model in models for row in _bytes_by_tier(model)],
    )
    yield _family(
        "model_needed_bytes",
        "What the model is expected to hold in VRAM, declared or measured; 0 if not known yet.",
        ("model",),
        [((model.name,), model.needed_bytes) for model in models],
    )
    yield _family(
        "model_state",
        "1 for the state that the model is in, 0 for the others.",
        ("model", "state"),
        [
            ((model.name, state.value), int(model.state is state))
            for model in models
            for state in ModelState
        ],
    )
    yield _family(
        "queue_depth",
        "Requests that wait for the model.",
        ("model",),
        [((model.name,), model.queued) for model in models],
    )


def _bytes_by_tier(model: ModelReport) -> Iterator[tuple[tuple[str, str], int]]:
    """Every tier that can hold bytes has a row, so that no series goes stale on a transition."""
    pinned = model.tier is Tier.PINNED_HOST
    yield (model.name, Tier.VRAM.value), model.vram_bytes
    yield (model.name, Tier.PINNED_HOST.value), model.host_bytes if pinned else 0
    yield (model.name, Tier.HOST.value), 0 if pinned else model.host_bytes


def _family(
    name: str,
    documentation: str,
    labels: tuple[str, ...],
    rows: Iterable[tuple[tuple[str, ...], float]],
) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, documentation, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


class _Gauges(Collector):
    """Gauges computed at the scrape; the registry asks for nothing but ``collect``."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


class _WithoutCreated(Collector):
    """The registry without the ``_created`` samples, which double the series for no reader.

    The library's own switch is process-wide and would reach an embedding application's metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            if not metric.name.endswith("_created"):
                metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
                yield metric
