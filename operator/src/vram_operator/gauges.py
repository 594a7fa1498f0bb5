"""Reads the gauges of the metrics from the caches, at each scrape.

Called by `acting`, which hands them to `metrics`. Only the replica that acts asks agents, so the
others show no workloads rather than old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

from vram_operator.api import ConditionStatus, WorkloadCondition
from vram_operator.cache import Cache, Key
from vram_operator.clock import Clock
from vram_operator.core.evidence import silent_seconds
from vram_operator.core.forecast import foresee
from vram_operator.core.reporting import agent_state, is_heard, should_report
from vram_operator.core.snapshot import Agent
from vram_operator.core.turn import earliest
from vram_operator.facts import Facts
from vram_operator.kube import PODS, WORKLOADS, Object
from vram_operator.metrics import TrendGauge, WorkloadGauge
from vram_operator.pods import read_pod, threshold_bytes


class Gauges:
    """What a scrape reads."""

    def __init__(self, cache: Cache, facts: Facts, clock: Clock, poll_seconds: float) -> None:
        self._cache = cache
        self._facts = facts
        self._clock = clock
        self._silent = timedelta(seconds=silent_seconds(poll_seconds))
        self.waiting: Mapping[Key, tuple[str, ...]] = {}
        """Why restarts of each workload wait."""
        self.is_active: Callable[[], bool] = lambda: False

    def workloads(self) -> Iterator[WorkloadGauge]:
        """Iterate over what is known of each workload."""
        if not self.is_active():
            return
        for raw in self._cache.every(WORKLOADS):
            namespace, name = raw["metadata"]["namespace"], raw["metadata"]["name"]
            now = self._clock.now()
            pods = (read_pod(pod, None) for pod in self._cache.members(PODS, (namespace, name)))
            agents = [(pod, self._facts.agent(pod.uid)) for pod in pods if pod.is_present]
            reports = [
                agent.report
                for _, agent in agents
                if agent.report is not None and is_heard(agent, self._silent, now)
            ]
            yield WorkloadGauge(
                trend=_trend(
                    [agent for _, agent in agents if is_heard(agent, self._silent, now)],
                    threshold_bytes(raw),
                ),
                namespace=namespace,
                name=name,
                ready=_status(raw, WorkloadCondition.READY),
                degraded=_status(raw, WorkloadCondition.DEGRADED) == ConditionStatus.TRUE,
                used_bytes=sum(report.memory.used_bytes for report in reports),
                residual_bytes=sum(report.memory.residual_bytes for report in reports),
                is_idle=all(report.idle for report in reports) if reports else None,
                conditions={
                    str(type_): _status(raw, type_) == ConditionStatus.TRUE
                    for type_ in WorkloadCondition
                },
                agent_states=tuple(
                    str(agent_state(pod, agent, self._silent, now))
                    for pod, agent in agents
                    if should_report(pod)
                ),
            )

    def blocked(self) -> list[str]:
        """Return the reason of each restart that waits."""
        return [reason for reasons in self.waiting.values() for reason in reasons]


def _trend(agents: list[Agent], threshold: int | None) -> TrendGauge:
    slopes = [agent.track.trend.bytes_per_second for agent in agents if agent.track.trend]
    forecasts = [one for one in (foresee(agent, threshold) for agent in agents) if one is not None]
    return TrendGauge(
        bytes_per_second=max(slopes, default=None),
        threshold_at=earliest([one.threshold_at for one in forecasts]),
        out_of_memory_at=earliest([one.out_of_memory_at for one in forecasts]),
    )


def _status(raw: Object, type_: WorkloadCondition) -> str:
    conditions = (raw.get("status") or {}).get("conditions") or []
    found = (one["status"] for one in conditions if one["type"] == type_)
    return str(next(found, ConditionStatus.UNKNOWN))
