"""Reads the gauges of the metrics from the caches, at each scrape.

Called by `acting`, which hands them to `metrics`. Only the replica that acts asks agents, so the
others show no workloads rather than old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vram_operator.api import ConditionStatus, WorkloadCondition
from vram_operator.cache import Cache, Key
from vram_operator.core.snapshot import Agent
from vram_operator.facts import Facts
from vram_operator.kube import PODS, WORKLOADS, Object
from vram_operator.metrics import WorkloadGauge


class Gauges:
    """What a scrape reads."""

    def __init__(self, cache: Cache, facts: Facts, blocked: Mapping[Key, tuple[str, ...]]) -> None:
        self._cache = cache
        self._facts = facts
        self._blocked = blocked
        self.is_active: Callable[[], bool] = lambda: False

    def workloads(self) -> Iterator[WorkloadGauge]:
        """Iterate over what is known of each workload."""
        if not self.is_active():
            return
        for raw in self._cache.every(WORKLOADS):
            namespace, name = raw["metadata"]["namespace"], raw["metadata"]["name"]
            pods = self._cache.members(PODS, (namespace, name))
            agents = [self._facts.agent(pod["metadata"]["uid"]) for pod in pods]
            reports = [agent.report for agent in agents if agent.report is not None]
            yield WorkloadGauge(
                namespace=namespace,
                name=name,
                ready=_ready(raw),
                used_bytes=sum(report.memory.used_bytes for report in reports),
                residual_bytes=sum(report.memory.residual_bytes for report in reports),
                agent_states=tuple(_state(agent) for agent in agents),
            )

    def blocked(self) -> list[str]:
        """Return the reason of each restart that waits."""
        return [reason for reasons in self._blocked.values() for reason in reasons]


def _ready(raw: Object) -> str:
    conditions = (raw.get("status") or {}).get("conditions") or []
    found = (one["status"] for one in conditions if one["type"] == WorkloadCondition.READY)
    return str(next(found, ConditionStatus.UNKNOWN))


def _state(agent: Agent) -> str:
    if agent.error or agent.report is None:
        return "Silent"
    return "Refusing" if agent.refuses else "Reporting"
