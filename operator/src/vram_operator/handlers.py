"""The watches: kopf decorators, and the thread that kopf runs in.

kopf is used for watching only: ``on.event`` adds no finalizers and no annotations, and posting is
off. It has a thread and an event loop of its own, because it cancels every task of its loop when it
ends, and so that a failure in it is mended by starting it again. What it sees goes to ``sink``,
which hands it over to the operator's loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kopf
import structlog
from vram_agent.protocol import WORKLOAD_LABEL

from vram_operator.cache import trimmed
from vram_operator.kube import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    PODS,
    RESTARTS,
    SERVICES,
    STATEFUL_SETS,
    WORKLOADS,
    Connection,
    Object,
    Resource,
)
from vram_operator.queue import retry_seconds

WATCHED: tuple[Resource, ...] = (
    WORKLOADS,
    RESTARTS,
    PODS,
    DEPLOYMENTS,
    STATEFUL_SETS,
    CONFIG_MAPS,
    SERVICES,
)
SELECTED_BY_LABEL: tuple[Resource, ...] = WATCHED[2:]

Sink = Callable[[Resource, Object, bool], None]
"""Takes an object and whether it was deleted. Called from kopf's thread."""

_log = structlog.get_logger(__name__)


class _Backoffs:
    """kopf's delays between attempts, without an end: a dead apiserver is waited for."""

    def __iter__(self) -> Iterator[float]:
        attempt = 0
        while True:
            attempt += 1
            yield min(15.0, retry_seconds(attempt, 0.5))


def register(registry: kopf.OperatorRegistry, resource: Resource, sink: Sink) -> None:
    """Have ``sink`` told of every event of one resource."""
    group, version = _group_version(resource)

    @kopf.on.event(group, version, resource.plural, registry=registry)
    async def observe(event: kopf.RawEvent, **_: Any) -> None:
        obj: Object = dict(event["object"])
        if obj.get("metadata", {}).get("namespace"):
            sink(resource, trimmed(resource, obj), event["type"] == "DELETED")


def _group_version(resource: Resource) -> tuple[str, str]:
    parts = resource.prefix.strip("/").split("/")
    return ("", parts[1]) if parts[0] == "api" else (parts[1], parts[2])


def watch_settings() -> kopf.OperatorSettings:
    """Return settings with which kopf only watches, and never gives up."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.peering.standalone = True
    # The resources are known and `__main__` waits for the CRDs, so nothing is scanned for.
    settings.scanning.disabled = True
    settings.networking.error_backoffs = _Backoffs()
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 60
    settings.watching.reconnect_backoff = 1.0
    settings.watching.connect_timeout = 10
    settings.queueing.exit_timeout = 0.5
    for resource in SELECTED_BY_LABEL:
        selector = (*_group_version(resource), resource.plural)
        settings.watching.label_selectors[selector] = WORKLOAD_LABEL
    return settings


class Watcher:
    """Runs kopf in a thread, again and again, until it is stopped."""

    def __init__(self, connection: Connection, namespaces: tuple[str, ...], sink: Sink) -> None:
        self._connection = connection
        self._namespaces = namespaces
        self._sink = sink
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        """Start watching; returns at once."""
        self._thread.start()

    async def stop(self, timeout_seconds: float) -> None:
        """Stop watching; gives up waiting after ``timeout_seconds``."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, timeout_seconds)

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                asyncio.run(self._watch())
            except Exception as error:  # kopf must not end the operator, whatever it meets
                _log.warning("watching failed; starting again", error=repr(error))
            failures += 1
            self._stop.wait(retry_seconds(failures, 0.5))

    async def _watch(self) -> None:
        registry = kopf.OperatorRegistry()
        for resource in WATCHED:
            register(registry, resource, self._sink)

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.AiohttpSession:
            return kopf.AiohttpSession(
                server=self._connection.server, aiohttp_session=self._connection.session()
            )

        await kopf.operator(
            registry=registry,
            settings=watch_settings(),
            # Else kopf asks for the user's name, and the image's uid has none.
            identity="vram-operator",  # type: ignore[arg-type]  # a NewType it does not export
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )
