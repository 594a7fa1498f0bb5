"""Carries out a plan: one function for each kind of action, in the plan's order.

Decides nothing. What an action rests on is read again from the apiserver just before it acts; what
is not as the plan thought ends the plan with StaleError, and the next visit plans anew. Each action
may be repeated: a write by its name or resource version, a call to an agent by its restart ID, an
eviction by the UID. Answers of agents and of the Eviction API are no failures but facts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import groupby

import structlog

from vram_operator.agent_client import AgentClient
from vram_operator.api import (
    API_VERSION,
    RESTART_KIND,
    WORKLOAD_KIND,
    Reason,
    RestartOutcome,
    encode,
)
from vram_operator.cache import Cache, Key
from vram_operator.clock import Clock
from vram_operator.core.plan import (
    Action,
    AnnotateWorkload,
    CallRecycle,
    CreateRestart,
    DeleteRestart,
    EmitEvent,
    EnsureObject,
    Knock,
    PatchRestartStatus,
    PatchWorkloadStatus,
    Plan,
    PushConfig,
)
from vram_operator.core.snapshot import (
    Workload,
)
from vram_operator.events import EventWriter
from vram_operator.facts import Facts
from vram_operator.kube import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    RESTARTS,
    SERVICES,
    STATEFUL_SETS,
    WORKLOADS,
    Api,
    ApiError,
    ApiUnavailableError,
    Object,
    Resource,
)
from vram_operator.live import Live, StaleError
from vram_operator.metrics import NO_METHOD, Metrics
from vram_operator.pod_actions import PodActions
from vram_operator.pods import read_restart, read_workload_status
from vram_operator.refusal import orphaned_status, refused_status
from vram_operator.slow_calls import SlowCalls

KINDS = {
    "Deployment": DEPLOYMENTS,
    "StatefulSet": STATEFUL_SETS,
    "Service": SERVICES,
    "ConfigMap": CONFIG_MAPS,
}

SIDE_BY_SIDE = 8
"""So many writes of one plan are under way at a time, where hundreds of pods leak at once."""
_INDEPENDENT = (CreateRestart, EmitEvent, CallRecycle)
"""Not the statuses of restarts: one that ends has to be written before one takes its place."""

_log = structlog.get_logger(__name__)


class RefusedManifestError(Exception):
    """The apiserver refused an object that was generated from the spec. The spec's fault."""


@dataclass(frozen=True)
class Tools:
    """What actions are carried out with."""

    api: Api
    agents: AgentClient
    cache: Cache
    facts: Facts
    events: EventWriter
    metrics: Metrics
    clock: Clock


class Applier:
    """Carries out plans; between two of them it keeps only what has no answer yet."""

    def __init__(self, tools: Tools) -> None:
        self._api = tools.api
        self._cache = tools.cache
        self._facts = tools.facts
        self._events = tools.events
        self._metrics = tools.metrics
        self._clock = tools.clock
        self._live = Live(tools.api, tools.cache)
        self._pods = PodActions(tools.api, self._live, tools.agents, tools.facts, tools.clock)
        self.calls = SlowCalls(self._pods, tools.facts, tools.clock)
        self._unanswered: dict[str, Object] = {}
        """Restarts, by UID, whose status was perhaps written: nobody said."""

    async def settle(self) -> None:
        """Find out what came of writes without an answer. Raises what the API raises.

        Called before a place under the caps is given out: a restart may have one already, although
        no watch has shown it yet.
        """
        for uid, body in list(self._unanswered.items()):
            await self._live.refresh(RESTARTS, body)
            self._unanswered.pop(uid, None)

    async def apply(self, workload: Workload, plan: Plan) -> None:
        """Carry out every action in order; neighbours that are independent go side by side.

        Raises StaleError, RefusedManifestError and what the API raises; the rest is then not done.
        """
        for _, neighbours in groupby(plan.actions, _kind):
            batch = list(neighbours)
            for first in range(0, len(batch), SIDE_BY_SIDE):
                some = batch[first : first + SIDE_BY_SIDE]
                done = await asyncio.gather(
                    *(self._carry_out(workload, action) for action in some), return_exceptions=True
                )
                for error in done:
                    if error is not None:
                        raise error

    async def _carry_out(self, workload: Workload, action: Action) -> None:
        match action:
            case EnsureObject():
                await self._ensure_object(workload, action)
            case AnnotateWorkload():
                await self._annotate(workload, action)
            case CreateRestart():
                await self._create_restart(action)
            case PatchRestartStatus():
                await self._write_restart_status(workload.namespace, action)
            case DeleteRestart():
                await self._delete_restart(workload.namespace, action)
            case PatchWorkloadStatus():
                await self._write_workload_status(workload, action)
            case EmitEvent():
                await self._events.write(workload, action)
            case PushConfig() | Knock():
                self.calls.begin((workload.namespace, workload.name), action)
            case _:
                await self._pods.carry_out(workload.namespace, action)

    async def _ensure_object(self, workload: Workload, action: EnsureObject) -> None:
        manifest = action.manifest
        metadata = manifest["metadata"]
        resource = KINDS[manifest["kind"]]
        path = resource.path(metadata["namespace"], metadata["name"])
        try:
            answer = await self._api.apply(path, manifest, action.field_manager)
        except ApiError as error:
            if error.status in {400, 403, 422}:
                self._facts.record_refusal(workload.uid, workload.generation, error.message)
                raise RefusedManifestError(error.message) from error
            raise
        self._facts.record_applied(path, answer)
        self._facts.forget_refusal(workload.uid)
        self._cache.observe(resource, answer)
        _log.info("object applied", kind=manifest["kind"], **_place(metadata))

    async def _annotate(self, workload: Workload, action: AnnotateWorkload) -> None:
        path = WORKLOADS.path(workload.namespace, workload.name)
        body = {"metadata": {"uid": workload.uid, "annotations": action.annotations}}
        self._cache.observe(WORKLOADS, await self._api.merge(path, body))

    async def _create_restart(self, action: CreateRestart) -> None:
        metadata = action.manifest["metadata"]
        try:
            answer = await self._api.create(RESTARTS.path(metadata["namespace"]), action.manifest)
        except ApiError as error:
            if not error.is_conflict:
                raise
            # The name is the lock: it was decided already, by us before a crash or by a rival.
            answer = await self._api.get(RESTARTS.path(metadata["namespace"], metadata["name"]))
        else:
            _log.info("restart created", reason=answer["spec"].get("reason"), **_place(metadata))
        self._cache.observe(RESTARTS, answer)

    async def _delete_restart(self, namespace: str, action: DeleteRestart) -> None:
        await self._api.delete(RESTARTS.path(namespace, action.name), action.uid)
        known = self._cache.find(RESTARTS, namespace, action.name)
        if known is not None and known["metadata"]["uid"] == action.uid:
            self._cache.observe_deletion(RESTARTS, known)

    async def _write_restart_status(self, namespace: str, action: PatchRestartStatus) -> None:
        status = encode(action.status)
        known = self._cache.find(RESTARTS, namespace, action.name)
        if known is None or known["metadata"]["uid"] != action.uid:
            raise StaleError(f"GPUPodRestart {action.name} is gone")
        if action.finished is RestartOutcome.SKIPPED:
            await self._live.ensure_no_news(namespace, known["spec"]["pod"]["name"])
        body = _status_body(known, RESTART_KIND, action.resource_version, status)
        await self._write_status(RESTARTS, body)
        if action.finished is not None:
            self._count(known, action)

    def _count(self, restart: Object, action: PatchRestartStatus) -> None:
        status, spec = action.status, restart["spec"]
        tried = [str(attempt.method) for attempt in status.attempts]
        method = tried[-1] if tried else NO_METHOD
        self._metrics.count_restart(
            (str(spec.get("trigger", "Manual")), method, str(action.finished)), status
        )
        _log.info(
            "restart finished",
            namespace=restart["metadata"]["namespace"],
            name=action.name,
            method=method,
            outcome=str(action.finished),
        )

    async def _write_workload_status(self, workload: Workload, action: PatchWorkloadStatus) -> None:
        known = self._cache.find(WORKLOADS, workload.namespace, workload.name)
        if known is None or known["metadata"]["uid"] != workload.uid:
            raise StaleError(f"GPUModelWorkload {workload.name} is gone")
        version = action.resource_version
        if version == workload.resource_version:
            # An annotation of the same plan has moved the version on; the spec is the same.
            generation = int(known["metadata"].get("generation", 0))
            if generation == workload.generation:
                version = known["metadata"]["resourceVersion"]
        body = _status_body(known, WORKLOAD_KIND, version, encode(action.status))
        await self._write_status(WORKLOADS, body)

    async def refuse(self, raw: Object, reason: Reason, message: str) -> None:
        """Say in the status why a workload cannot be planned for; writes nothing twice."""
        metadata = raw["metadata"]
        known = self._cache.find(WORKLOADS, metadata["namespace"], metadata["name"])
        if known is None:
            return
        before = read_workload_status(known)
        generation = int(metadata.get("generation", 0))
        status = refused_status(before, (reason, message), generation, self._clock.now())
        if status != before:
            version = known["metadata"]["resourceVersion"]
            body = _status_body(known, WORKLOAD_KIND, version, encode(status))
            await self._write_status(WORKLOADS, body)

    async def disown(self, key: Key) -> None:
        """Say in each open restart that its workload does not exist; writes nothing twice."""
        for raw in self._cache.members(RESTARTS, key):
            if raw["metadata"].get("deletionTimestamp"):
                continue
            restart = read_restart(raw)
            if restart.status.outcome is not None:
                continue
            now = self._clock.now()
            status = orphaned_status(restart.status, key[1], restart.generation, now)
            if status != restart.status:
                version = restart.resource_version
                body = _status_body(raw, RESTART_KIND, version, encode(status))
                await self._write_status(RESTARTS, body)

    async def _write_status(self, resource: Resource, body: Object) -> None:
        metadata = body["metadata"]
        place = (metadata["namespace"], metadata["name"])
        try:
            answer = await self._api.replace(resource.path(*place, "status"), body)
        except (ApiError, ApiUnavailableError) as error:
            if isinstance(error, ApiError) and (error.is_conflict or error.is_missing):
                await self._live.refresh(resource, body)
                raise StaleError(f"{resource.plural} {place[1]} has changed") from error
            if resource is RESTARTS:
                self._unanswered[metadata["uid"]] = body
            raise
        self._cache.observe(resource, answer)


def _kind(action: Action) -> object:
    """Return what is the same for neighbours that do not depend on each other."""
    return type(action) if isinstance(action, _INDEPENDENT) else id(action)


def _place(metadata: Object) -> dict[str, str]:
    return {"namespace": metadata["namespace"], "name": metadata["name"]}


def _status_body(known: Object, kind: str, version: str, status: Object) -> Object:
    """Return what a PUT of the status subresource takes; uid and version are preconditions."""
    metadata = {**known["metadata"], "resourceVersion": version}
    return {
        **known,
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": metadata,
        "status": status,
    }
