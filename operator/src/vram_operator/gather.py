"""Builds the Snapshot of one workload: what the watches showed, what agents said, what is live.

Reads only. The watches are narrowed to labelled objects, so what carries no label of ours is read
from the apiserver: a target that somebody else made, and an object that stands where ours should
be. `apply` reads again what it is about to act on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from msgspec import structs

from vram_operator.api import TRUST_CONFIG_MAP, TRUST_KEY, RestartCondition, WorkloadSpec
from vram_operator.cache import Cache, Key
from vram_operator.clock import Clock, parse_time
from vram_operator.core.phases import concerns
from vram_operator.core.snapshot import (
    ActiveRestart,
    Cluster,
    OwnedObject,
    Pod,
    Restart,
    Rival,
    Settings,
    Snapshot,
    Target,
)
from vram_operator.facts import Facts
from vram_operator.kube import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    PODS,
    RESTARTS,
    SERVICES,
    STATEFUL_SETS,
    WORKLOADS,
    Api,
    Object,
    Resource,
)
from vram_operator.pods import (
    CONTENT_HASH_ANNOTATION,
    InvalidObjectError,
    is_finished_pod,
    owner_of,
    read_pod,
    read_restart,
    read_target,
    read_workload,
)

TARGETS = {"Deployment": DEPLOYMENTS, "StatefulSet": STATEFUL_SETS}
# A target without our label is read at each visit, but not more often than this.
TARGET_AGE_SECONDS = 3.0
TRUST_AGE_SECONDS = 60.0


class InvalidWorkloadError(Exception):
    """A workload passed the CRD's schema and still cannot be read; the message has the field."""

    def __init__(self, raw: Object, message: str) -> None:
        super().__init__(message)
        self.raw = raw


class Gatherer:
    """Builds snapshots; ``public_keys`` is asked for at each, since a standby has none."""

    def __init__(
        self, api: Api, cache: Cache, facts: Facts, clock: Clock, settings: Settings
    ) -> None:
        self._api = api
        self._cache = cache
        self._facts = facts
        self._clock = clock
        self._settings = settings
        self._read: dict[str, tuple[float, Object | None]] = {}
        self.public_keys: Callable[[], str] = str

    async def gather(self, key: Key) -> Snapshot | None:
        """Return the snapshot of a workload, None if there is no such workload.

        Raises InvalidWorkloadError, and what the API raises.
        """
        raw = self.raw(key)
        if raw is None:
            return None
        try:
            workload = read_workload(raw)
        except InvalidObjectError as error:
            raise InvalidWorkloadError(raw, str(error)) from error
        target, objects = await self._gather_objects(key, workload.spec)
        pods = tuple(
            read_pod(pod, self._cache.unready_since(pod["metadata"]["uid"]))
            for pod in self._cache.members(PODS, key)
        )
        answers = (self._facts.eviction(pod.uid) for pod in pods)
        return Snapshot(
            settings=self._settings,
            cluster=self._cluster(),
            workload=workload,
            public_keys=self.public_keys(),
            apply_error=self._facts.refusal(workload.uid, workload.generation),
            target=target,
            namesake_kind=await self._namesake_kind(key, workload.spec, target),
            objects=objects,
            pods=pods,
            agents=tuple(self._facts.agent(pod.uid) for pod in pods),
            restarts=tuple(self._with_pod(restart, pods) for restart in self._restarts(key)),
            evictions=tuple(answer for answer in answers if answer is not None),
            rivals=tuple(self._rivals(key, workload.spec)),
        )

    def raw(self, key: Key) -> Object | None:
        """Return the workload's JSON; None when it is gone or going."""
        raw = self._cache.find(WORKLOADS, *key)
        return None if raw is None or raw["metadata"].get("deletionTimestamp") else raw

    def forget(self, key: Key) -> None:
        """Have what was read live for a workload read again."""
        for path in [path for path in self._read if f"/namespaces/{key[0]}/" in path]:
            del self._read[path]

    async def _gather_objects(
        self, key: Key, spec: WorkloadSpec
    ) -> tuple[Target | None, tuple[OwnedObject, ...]]:
        trust = await self._live(CONFIG_MAPS, (key[0], TRUST_CONFIG_MAP), TRUST_AGE_SECONDS)
        objects = [self._owned("ConfigMap", CONFIG_MAPS, trust)] if trust is not None else []
        if spec.target_ref is not None:
            resource = TARGETS[spec.target_ref.kind]
            raw = await self._live(resource, (key[0], spec.target_ref.name), TARGET_AGE_SECONDS)
            kind = str(spec.target_ref.kind)
            return (None if raw is None else read_target({**raw, "kind": kind})), tuple(objects)
        raw = await self._find(DEPLOYMENTS, key)
        for kind, resource in (("Service", SERVICES), ("ConfigMap", CONFIG_MAPS)):
            found = await self._find(resource, key)
            if found is not None:
                objects.append(self._owned(kind, resource, found))
        if raw is None:
            return None, tuple(objects)
        target = read_target({**raw, "kind": "Deployment"})
        if self._facts.is_drifted(DEPLOYMENTS.path(*key), raw):
            target = replace(target, annotations=_without_hash(target.annotations))
        return target, tuple(objects)

    async def _namesake_kind(self, key: Key, spec: WorkloadSpec, target: Target | None) -> str:
        """Return the other kind of target where only that has the name, else nothing."""
        if spec.target_ref is None or target is not None:
            return ""
        others = (kind for kind in TARGETS if kind != spec.target_ref.kind)
        for kind in others:
            place = (key[0], spec.target_ref.name)
            if await self._live(TARGETS[kind], place, TARGET_AGE_SECONDS) is not None:
                return kind
        return ""

    def _owned(self, kind: str, resource: Resource, raw: Object) -> OwnedObject:
        metadata = raw["metadata"]
        annotations = dict(metadata.get("annotations") or {})
        is_trust = metadata["name"] == TRUST_CONFIG_MAP
        is_wrong = is_trust and (raw.get("data") or {}).get(TRUST_KEY) != self.public_keys()
        path = resource.path(metadata["namespace"], metadata["name"])
        if is_wrong or self._facts.is_drifted(path, raw):
            annotations = _without_hash(annotations)
        return OwnedObject(
            kind=kind,
            name=metadata["name"],
            owner_uid=owner_of(metadata).get("uid", ""),
            content_hash=annotations.get(CONTENT_HASH_ANNOTATION, ""),
        )

    async def _find(self, resource: Resource, key: Key) -> Object | None:
        """Return an object of the workload's name, with our label or without."""
        return self._cache.find(resource, *key) or await self._live(
            resource, key, TARGET_AGE_SECONDS
        )

    async def _live(self, resource: Resource, place: Key, max_age_seconds: float) -> Object | None:
        path = resource.path(*place)
        now = self._clock.monotonic()
        read_at, raw = self._read.get(path, (-max_age_seconds, None))
        # What was not there is looked for each time: it is what everything waits for.
        if raw is None or now - read_at >= max_age_seconds:
            raw = await self._api.find(path)
            self._read[path] = (now, raw)
        return raw

    def _restarts(self, key: Key) -> Iterator[Restart]:
        for raw in self._cache.members(RESTARTS, key):
            if not raw["metadata"].get("deletionTimestamp"):
                try:
                    yield read_restart(raw)
                except InvalidObjectError:
                    # The schema admits what we write; what else is there is not ours to act on.
                    continue

    def _with_pod(self, restart: Restart, pods: Collection[Pod]) -> Restart:
        """Return a restart that a person wrote by the pod's name with the UID of that pod."""
        if restart.spec.pod.uid:
            return restart
        if restart.status.outcome is not None:
            self._facts.forget_meant_pod(restart.uid)
            return restart
        found = next((pod.uid for pod in pods if pod.is_present and concerns(restart, pod)), "")
        uid = self._facts.meant_pod(restart.uid, found)
        spec = structs.replace(restart.spec, pod=structs.replace(restart.spec.pod, uid=uid))
        return replace(restart, spec=spec)

    def _rivals(self, key: Key, spec: WorkloadSpec) -> Iterator[Rival]:
        if spec.target_ref is None:
            return
        for raw in self._cache.every(WORKLOADS):
            metadata = raw["metadata"]
            ref = raw["spec"].get("targetRef") or {}
            same = (ref.get("kind"), ref.get("name")) == (
                spec.target_ref.kind,
                spec.target_ref.name,
            )
            if metadata["namespace"] == key[0] and metadata["name"] != key[1] and same:
                created = parse_time(metadata["creationTimestamp"])
                yield Rival(name=metadata["name"], created=created)

    def _cluster(self) -> Cluster:
        return Cluster(
            total_pods=sum(not is_finished_pod(pod) for pod in self._cache.every(PODS)),
            active_restarts=tuple(
                ActiveRestart(
                    namespace=raw["metadata"]["namespace"],
                    name=raw["metadata"]["name"],
                    workload=raw["spec"]["workload"],
                    node=self._node_of(raw),
                )
                for raw in self._cache.every(RESTARTS)
                if is_active(raw)
            ),
        )

    def _node_of(self, restart: Object) -> str:
        pod_name = restart["spec"]["pod"]["name"]
        pod = self._cache.find(PODS, restart["metadata"]["namespace"], pod_name)
        return "" if pod is None else str(pod["spec"].get("nodeName", ""))


def is_active(restart: Object) -> bool:
    """Is a GPUPodRestart admitted and not finished?"""
    status = restart.get("status") or {}
    return not status.get("outcome") and any(
        one["type"] == RestartCondition.ADMITTED and one["status"] == "True"
        for one in status.get("conditions") or []
    )


def _without_hash(annotations: object) -> dict[str, str]:
    items = dict(annotations) if isinstance(annotations, dict) else {}
    items.pop(CONTENT_HASH_ANNOTATION, None)
    return items
