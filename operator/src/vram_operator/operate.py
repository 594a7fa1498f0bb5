"""Runs one replica of the operator from its start to its end. Called by `cli`.

The order of a life: listen for the probes, wait for the apiserver and the CRDs, watch, wait for the
Lease, list everything once, act; on SIGTERM stop acting, give the Lease back, end. A replica that
loses the Lease to another ends with status 1 and is started again by its kubelet as a standby; one
that nobody answers stops acting, waits, and goes on if the Lease is still its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import aiohttp
import structlog

from vram_operator.acting import Acting, Surroundings
from vram_operator.api import API_VERSION, RESTART_PLURAL, WORKLOAD_PLURAL
from vram_operator.clock import SystemClock
from vram_operator.handlers import WATCHED, Watcher
from vram_operator.health import HealthServer, Probes, WatchHealth
from vram_operator.kube import Api, Connection, Object, Resource
from vram_operator.leader import Leader, LeaseRef
from vram_operator.metrics import Metrics
from vram_operator.queue import RetryError
from vram_operator.retrying import retried
from vram_operator.settings import Settings

STOP_TIMEOUT_SECONDS = 3.0

_log = structlog.get_logger(__name__)


class CrdsMissingError(RetryError):
    """The custom resources are not installed; the message says how to install them."""


class Replica:
    """One replica of the operator. `run` once."""

    def __init__(self, settings: Settings, connection: Connection) -> None:
        self._settings = settings
        self._connection = connection
        self._clock = SystemClock()
        self._metrics = Metrics()
        streams = len(WATCHED) * max(1, len(settings.namespaces))
        self._watches = WatchHealth(self._clock, streams)
        connection.observers += [self._metrics.observe_request, self._watches.observe]
        self._stop = asyncio.Event()
        self._leader: Leader | None = None
        self._acting: Acting | None = None

    async def run(self) -> int:
        """Live until a signal or the loss of the Lease. Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        server = HealthServer(self._metrics, Probes(alive=lambda: "", ready=self._problem))
        port = await server.start(self._settings.metrics_port)
        _log.info("started", port=port, server=self._connection.server)
        try:
            async with self._connection.session() as session, aiohttp.ClientSession() as to_agents:
                api = Api(self._connection, session)
                await self._until_stopped(retried("find the CRDs", lambda: ensure_crds(api)))
                return 0 if self._stop.is_set() else await self._live(api, to_agents)
        finally:
            await server.close()
            _log.info("stopped")

    async def _live(self, api: Api, to_agents: aiohttp.ClientSession) -> int:
        identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        lease = LeaseRef(self._connection.namespace, self._settings.lease_name, identity)
        leader = self._leader = Leader(api, lease, self._clock)
        self._metrics.leader.set_function(lambda: float(leader.is_leading))
        acting = self._acting = Acting(
            Surroundings(
                settings=self._settings,
                api=api.guarded(leader.ensure_leading),
                to_agents=to_agents,
                clock=self._clock,
                metrics=self._metrics,
                namespace=self._connection.namespace,
                identity=identity,
                ensure_leading=leader.ensure_leading,
            )
        )
        watcher = Watcher(self._connection, self._settings.namespaces, self._sink(acting))
        watcher.start()
        election = asyncio.create_task(leader.run(), name="leader")
        try:
            while not self._stop.is_set() and not election.done():
                await self._until_stopped(leader.acquired.wait(), election)
                if leader.acquired.is_set():
                    suspension = asyncio.create_task(leader.suspended.wait())
                    await self._until_stopped(acting.run(), election, suspension)
                    await _cancel(suspension)
            return 0 if self._stop.is_set() else 1
        finally:
            # Acting has ended here; only then may another replica begin.
            await _cancel(election)
            await leader.release()
            await watcher.stop(STOP_TIMEOUT_SECONDS)

    def _sink(self, acting: Acting) -> Any:
        loop = asyncio.get_running_loop()

        def sink(resource: Resource, obj: Object, deleted: bool) -> None:
            with suppress(RuntimeError):  # the loop has ended, and so has the interest
                loop.call_soon_threadsafe(_observe, acting, resource, obj, deleted)

        return sink

    async def _until_stopped(
        self, work: Coroutine[Any, Any, object], *others: asyncio.Task[Any]
    ) -> None:
        """Do ``work`` until it ends, a signal comes or one of the others ends; then cancel it.

        Raises what the work or the other raised.
        """
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopped, *others}, return_when=asyncio.FIRST_COMPLETED)
            for done in (task, *others):
                if done.done():
                    done.result()
        finally:
            await _cancel(task)
            await _cancel(stopped)

    def _problem(self) -> str:
        """Return why this replica is not ready, or nothing.

        1. It has not found the cluster yet. 2. Its watches are not alive.
        3. The apiserver does not answer. 4. It leads and has not listed everything yet.
        """
        if self._leader is None or self._acting is None:  # 1
            return "waiting for the apiserver and the CRDs"
        problem = self._watches.problem()  # 2
        if problem:
            return problem
        if not self._leader.has_answer:  # 3
            return "the apiserver does not answer"
        if self._leader.is_leading and not self._acting.is_synced:  # 4
            return "not everything is listed yet"
        return ""


def _observe(acting: Acting, resource: Resource, obj: Object, deleted: bool) -> None:
    acting.observe(resource, obj, deleted=deleted)


async def ensure_crds(api: Api) -> None:
    """Raise CrdsMissingError unless the custom resources are there, and what the API raises."""
    found: set[str] = set()
    answer = await api.find(f"/apis/{API_VERSION}")
    if answer is not None:
        found = {one["name"] for one in answer["resources"]}
    if not {WORKLOAD_PLURAL, RESTART_PLURAL} <= found:
        raise CrdsMissingError(
            "the custom resources are not installed; "
            "install the chart, or: vram-operator crds | kubectl apply -f -"
        )


async def _cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end, whatever that is."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
