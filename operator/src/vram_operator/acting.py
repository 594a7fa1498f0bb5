"""The working parts of the operator, wired together: watches to queue to reconcile, and the poller.

Made once by `operate`. The caches take in what the watches show from the start; `run` is called
when this replica leads, and cancelled when it does not any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import structlog

from vram_operator.agent_client import AgentClient
from vram_operator.apply import Applier, Tools
from vram_operator.cache import Cache, Key, workload_key
from vram_operator.clock import Clock
from vram_operator.core.snapshot import Settings as PlanSettings
from vram_operator.events import EventWriter
from vram_operator.facts import Facts
from vram_operator.gather import Gatherer
from vram_operator.gauges import Gauges
from vram_operator.kube import PODS, RESTARTS, WORKLOADS, Api, ApiError, Object, Resource
from vram_operator.metrics import Metrics
from vram_operator.poller import Poller, Rhythm
from vram_operator.queue import KeyedQueue, RetryError
from vram_operator.reconcile import Reconciler
from vram_operator.resync import RESYNC_SECONDS, resync
from vram_operator.retrying import retried
from vram_operator.settings import Settings
from vram_operator.signing import Signer, ensure_signer

RECONCILE_WORKERS = 8
FIRST_REPORTS_SECONDS = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What the working parts are made with. ``api`` refuses to change anything unless leading."""

    settings: Settings
    api: Api
    to_agents: aiohttp.ClientSession
    clock: Clock
    metrics: Metrics
    namespace: str
    identity: str
    ensure_leading: Callable[[], None]
    """Raises NotLeadingError when this replica may not act any more."""


class Acting:
    """Everything between the watches and the actions."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._cache = Cache(around.clock)
        self._facts = Facts()
        self._signer: Signer | None = None
        self.is_synced = False
        """Was everything listed since this replica began to act?"""
        client = AgentClient(around.to_agents, self._sign_while_leading)
        self._poller = Poller(
            client,
            self._cache,
            self._facts,
            around.clock,
            Rhythm(around.settings.poll_interval_seconds),
        )
        self._gatherer = Gatherer(
            around.api, self._cache, self._facts, around.clock, plan_settings(around.settings)
        )
        tools = Tools(
            api=around.api,
            agents=client,
            cache=self._cache,
            facts=self._facts,
            events=EventWriter(around.api, around.clock, around.identity),
            metrics=around.metrics,
            clock=around.clock,
        )
        self._applier = Applier(tools)
        self._reconciler = Reconciler(self._gatherer, self._applier, around.metrics, around.clock)
        self._queue: KeyedQueue[Key] = KeyedQueue(self._reconciler.reconcile, self._on_error)
        self._connect()

    def _connect(self) -> None:
        self._poller.on_news = self._queue.add_after
        self._applier.calls.on_answer = self._queue.add
        self._reconciler.on_place = self._queue.add
        self._poller.metrics = self._around.metrics
        self._gatherer.public_keys = lambda: self._require_signer().public_keys_pem
        gauges = Gauges(
            self._cache,
            self._facts,
            self._around.clock,
            self._around.settings.poll_interval_seconds,
        )
        gauges.waiting = self._reconciler.blocked
        gauges.is_active = lambda: self.is_synced
        self._around.metrics.state.workloads = gauges.workloads
        self._around.metrics.state.blocked = gauges.blocked
        self._around.metrics.queue_depth.set_function(lambda: float(len(self._queue)))

    def observe(self, resource: Resource, obj: Object, *, deleted: bool) -> None:
        """Take in what a watch showed. Call on the operator's loop."""
        if deleted:
            key = self._cache.observe_deletion(resource, obj)
            if resource is PODS:
                self._facts.forget(obj["metadata"]["uid"])
        else:
            key = self._cache.observe(resource, obj)
        if key is None or not self.is_synced:
            return
        # What changed may be what an old report is no longer good for.
        for pod in [obj] if resource is PODS else self._cache.members(PODS, key):
            self._poller.notice(pod)
        self._queue.add(key)

    async def run(self) -> None:
        """Act until cancelled; may be called again then. Raises UnusableKeyError."""
        await retried("read the signing key", self._read_key)
        await retried("list everything", self._resync)
        await self._poller.ask_all(FIRST_REPORTS_SECONDS)
        self.is_synced = True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._queue.run(RECONCILE_WORKERS))
                group.create_task(self._poller.run())
                group.create_task(self._keep_in_sync())
        finally:
            self.is_synced = False

    async def _read_key(self) -> None:
        around = self._around
        self._signer = await ensure_signer(around.api, around.namespace, around.clock)

    async def _resync(self) -> None:
        """List everything, and look at every workload: what a watch missed may be anything."""
        await resync(self._around.api, self._cache, self._around.settings.namespaces)
        self._facts.retain({pod["metadata"]["uid"] for pod in self._cache.every(PODS)})
        for resource in (WORKLOADS, RESTARTS):
            for obj in self._cache.every(resource):
                key = workload_key(resource, obj)
                if key is not None:
                    self._queue.add(key)

    async def _keep_in_sync(self) -> None:
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            # Someone may have put a new key there, with the old one's public half as the previous.
            await retried("read the signing key again", self._read_key)
            await retried("list everything again", self._resync)

    def _require_signer(self) -> Signer:
        if self._signer is None:
            raise RuntimeError("no signing key yet: only the replica that leads acts")
        return self._signer

    def _sign_while_leading(self) -> Signer:
        # No request to the apiserver stands before each call to an agent: the guard is here too.
        self._around.ensure_leading()
        return self._require_signer()

    def _on_error(self, key: Key, error: Exception) -> None:
        kind = type(error).__name__
        if isinstance(error, ApiError):
            kind = error.reason or f"HTTP{error.status}"
        self._around.metrics.reconcile_errors.labels(kind).inc()
        _log.warning(
            "visit ended early",
            namespace=key[0],
            workload=key[1],
            error=str(error),
            kind=kind,
            exc_info=None if isinstance(error, RetryError) else error,
        )


def plan_settings(settings: Settings) -> PlanSettings:
    """Return what decisions rest on of the settings."""
    return PlanSettings(
        agent_image=settings.agent_image,
        max_concurrent_restarts=str(settings.max_concurrent_restarts),
        schedule_jitter_seconds=int(settings.schedule_jitter_seconds),
        restart_ttl_seconds=int(settings.restart_ttl_seconds),
        poll_interval_seconds=settings.poll_interval_seconds,
        allow_delete=settings.allow_delete,
        dry_run=settings.dry_run,
    )
