"""Writes Events about workloads, the same one again as a series instead of a second object.

Called by `apply`. Events are for people: a failure to write one is logged and changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import structlog

from vram_operator.api import API_VERSION, WORKLOAD_KIND
from vram_operator.clock import Clock, format_micro_time
from vram_operator.core.plan import EmitEvent
from vram_operator.core.snapshot import Workload
from vram_operator.kube import EVENTS, Api, ApiError, ApiUnavailableError, Object

CONTROLLER = "vram.dev/vram-operator"
SERIES_SECONDS = 600.0
_KEPT_SERIES = 4096
_NOTE_LIMIT = 1024

_log = structlog.get_logger(__name__)


@dataclass
class _Series:
    path: str
    count: int
    last_at: float


class EventWriter:
    """Writes events.k8s.io/v1 Events in the workload's namespace."""

    def __init__(self, api: Api, clock: Clock, instance: str) -> None:
        self._api = api
        self._clock = clock
        self._instance = instance
        self._series: OrderedDict[tuple[str, ...], _Series] = OrderedDict()

    async def write(self, workload: Workload, event: EmitEvent) -> None:
        """Write one Event. Never raises for the apiserver."""
        same = (workload.uid, event.reason, event.pod, event.message)
        series = self._series.get(same)
        now = self._clock.monotonic()
        try:
            if series is not None and now - series.last_at < SERIES_SECONDS:
                series.count, series.last_at = series.count + 1, now
                await self._continue(series)
                return
            created = await self._api.create(
                EVENTS.path(workload.namespace), self._event(workload, event)
            )
        except (ApiError, ApiUnavailableError) as error:
            self._series.pop(same, None)
            _log.warning("event not written", reason=event.reason, error=str(error))
            return
        path = EVENTS.path(workload.namespace, created["metadata"]["name"])
        self._series[same] = _Series(path, 1, now)
        if len(self._series) > _KEPT_SERIES:
            self._series.popitem(last=False)

    async def _continue(self, series: _Series) -> None:
        observed = format_micro_time(self._clock.now())
        body = {"series": {"count": series.count, "lastObservedTime": observed}}
        await self._api.merge(series.path, body)

    def _event(self, workload: Workload, event: EmitEvent) -> Object:
        now = self._clock.now()
        seed = f"{workload.uid}/{event.reason}/{event.pod}/{now.timestamp()}"
        suffix = hashlib.sha256(seed.encode()).hexdigest()[:16]
        body: Object = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{workload.name}.{suffix}", "namespace": workload.namespace},
            "eventTime": format_micro_time(now),
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance[:128],
            "action": str(event.reason),
            "reason": str(event.reason),
            "type": str(event.type),
            "note": event.message[:_NOTE_LIMIT],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": WORKLOAD_KIND,
                "namespace": workload.namespace,
                "name": workload.name,
                "uid": workload.uid,
            },
        }
        if event.pod:
            body["related"] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": workload.namespace,
                "name": event.pod,
            }
        return body
