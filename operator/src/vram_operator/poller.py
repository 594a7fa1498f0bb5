"""Asks each agent for its report, again and again, and wakes the planner when one says something.

Every pod with an address and a control port is a key of one queue: that bounds how many are asked
at a time, and gives each its own rhythm. Nearer a threshold an agent is asked twice as often, far
from it a third as often, and while a restart of it runs each second.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog
from vram_agent.protocol import Report

from vram_operator.agent_client import AgentAddress, AgentClient, AgentError
from vram_operator.api import ResidualPolicy, decode
from vram_operator.cache import Cache, Key, workload_key
from vram_operator.clock import Clock
from vram_operator.core.evidence import history_seconds
from vram_operator.core.snapshot import Agent
from vram_operator.facts import Facts
from vram_operator.gather import is_active
from vram_operator.kube import PODS, RESTARTS, WORKLOADS, Object
from vram_operator.metrics import Metrics
from vram_operator.pods import (
    control_port,
    is_finished_pod,
    raw_residual_policy,
    threshold_bytes,
)
from vram_operator.queue import KeyedQueue

CONCURRENT_POLLS = 64
ACTING_INTERVAL_SECONDS = 1.0
NEAR_SHARE = 0.75
FAR_SHARE = 0.5
SAMPLE_SECONDS = 0.5
"""Reports that only add to the evidence are looked at together: hundreds may come in a second."""
_NOTICED_BYTES = 64 * 1024 * 1024

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Urgency:
    """What the rhythm of one agent depends on."""

    residual_bytes: int
    threshold_bytes: int | None
    acting: bool
    """Does a restart of it run?"""
    waiting: bool = False
    """Does one wait? What it rests on must not get stale meanwhile."""


def next_poll_seconds(interval_seconds: float, urgency: Urgency) -> float:
    """Return when to ask an agent next.

    1. A restart of it runs: each second, or twice as often as usual if that is more often.
    2. One waits: twice as often as usual.
    3. There is no threshold: as usual.
    4. The residual is near or above the threshold: twice as often.
    5. It is far below: a third as often. 6. In between: as usual.
    """
    if urgency.acting:  # 1
        return min(ACTING_INTERVAL_SECONDS, interval_seconds / 2)
    if urgency.waiting:  # 2
        return interval_seconds / 2
    if not urgency.threshold_bytes:  # 3
        return interval_seconds
    share = urgency.residual_bytes / urgency.threshold_bytes
    if share >= NEAR_SHARE:  # 4
        return interval_seconds / 2
    if share < FAR_SHARE:  # 5
        return interval_seconds * 3
    return interval_seconds  # 6


@dataclass(frozen=True)
class Rhythm:
    """How often to ask: the usual interval, and what spreads the first questions."""

    interval_seconds: float
    jitter: Callable[[], float] = random.random


class Poller:
    """Keeps `Facts` up to date.

    ``on_news`` is told of a workload whose agents said something, and in how many seconds at the
    latest it should be looked at.
    """

    def __init__(
        self, client: AgentClient, cache: Cache, facts: Facts, clock: Clock, rhythm: Rhythm
    ) -> None:
        self._client = client
        self._cache = cache
        self._facts = facts
        self._clock = clock
        self._rhythm = rhythm
        self._queue: KeyedQueue[Key] = KeyedQueue(self._poll, self._on_error, rhythm.jitter)
        self.on_news: Callable[[Key, float], None] = lambda _key, _seconds: None
        self.metrics: Metrics | None = None

    def notice(self, pod: Object) -> None:
        """Ask the agent of a pod that changed or is new, soon."""
        place = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        known = self._facts.agent(pod["metadata"]["uid"]).received_at is not None
        # The first questions after a start are spread; one that just came up is asked at once.
        spread = 0.0 if known else min(1.0, self._rhythm.interval_seconds / 4)
        self._queue.add_after(place, self._rhythm.jitter() * spread)

    async def ask_all(self, timeout_seconds: float) -> None:
        """Ask every agent once, so that nobody seems silent who was only not asked yet."""
        places = [
            (pod["metadata"]["namespace"], pod["metadata"]["name"])
            for pod in self._cache.every(PODS)
        ]
        places.reverse()

        async def ask() -> None:
            while places:
                place = places.pop()
                self._queue.add_after(place, await self._poll(place) or 0.0)

        tasks = [asyncio.create_task(ask()) for _ in range(min(CONCURRENT_POLLS, len(places)))]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_seconds)
            for task in late:
                task.cancel()
        for place in places:
            self._queue.add(place)

    async def run(self) -> None:
        """Ask until cancelled."""
        await self._queue.run(CONCURRENT_POLLS)

    async def _poll(self, place: Key) -> float | None:
        pod = self._cache.find(PODS, *place)
        if pod is None:
            return None
        uid, key = pod["metadata"]["uid"], workload_key(PODS, pod)
        ip, port = (pod.get("status") or {}).get("podIP"), control_port(pod)
        if not ip or not port or key is None or pod["metadata"].get("deletionTimestamp"):
            return None
        if is_finished_pod(pod):  # its address may be another's by now
            return None
        workload = self._cache.find(WORKLOADS, *key)
        if workload is None:
            return None
        before = self._facts.agent(uid)
        try:
            report = await self._client.report(AgentAddress(ip, port, uid))
            self._facts.record_report(
                uid, report, self._clock.now(), _kept_seconds(workload, self._rhythm)
            )
        except (AgentError, ValueError) as error:
            self._facts.record_silence(uid, str(error))
            if not before.error:
                _log.info("agent silent", namespace=place[0], pod=place[1], error=str(error))
                self.on_news(key, 0.0)
            return self._rhythm.interval_seconds / 2
        if self.metrics is not None and before.received_at is not None:
            age = self._clock.now() - before.received_at
            self.metrics.report_age_seconds.observe(age.total_seconds())
        urgency = self._urgency(workload, key, report, place[1])
        is_near = urgency.threshold_bytes and urgency.residual_bytes >= urgency.threshold_bytes
        turned = is_growing(before) != is_growing(self._facts.agent(uid))
        if before.error or turned or gist(before.report) != gist(report):
            self.on_news(key, 0.0)
        elif is_near:
            self.on_news(key, SAMPLE_SECONDS)
        return next_poll_seconds(self._rhythm.interval_seconds, urgency)

    def _urgency(self, workload: Object, key: Key, report: Report, pod_name: str) -> Urgency:
        open_ones = [
            restart
            for restart in self._cache.members(RESTARTS, key)
            if restart["spec"]["pod"]["name"] == pod_name
            and not (restart.get("status") or {}).get("outcome")
        ]
        return Urgency(
            report.memory.residual_bytes,
            threshold_bytes(workload),
            acting=report.draining or any(is_active(restart) for restart in open_ones),
            waiting=bool(open_ones),
        )

    def _on_error(self, place: Key, error: Exception) -> None:
        _log.error("polling failed", namespace=place[0], pod=place[1], exc_info=error)


def is_growing(agent: Agent) -> bool:
    """Is the agent's residual on its way somewhere?"""
    return agent.track.trend is not None and agent.track.trend.is_rising


def gist(report: Report | None) -> object:
    """Return what of a report matters to the plan; figures only roughly."""
    if report is None:
        return None
    return (
        report.agent.boot_id,
        report.agent.epoch,
        report.config_generation,
        report.idle,
        report.draining,
        report.action,
        report.memory.source,
        report.memory.residual_bytes // _NOTICED_BYTES,
        report.memory.used_bytes // _NOTICED_BYTES,
        tuple((model.name, model.state, model.error) for model in report.models),
    )


def _kept_seconds(workload: Object, rhythm: Rhythm) -> float:
    raw = raw_residual_policy(workload)
    try:
        policy = decode(raw, ResidualPolicy) if raw else None
    except msgspec.ValidationError:
        policy = None
    return history_seconds(policy, rhythm.interval_seconds)
