"""What the watches have shown, and what our own writes answered: the newest of each object.

Objects are raw JSON, cut down to what is ever read. `handlers` and `apply` write here, `gather`
and `poller` read. A resource version never goes back: an event that is older than our own write is
dropped, and so is one that would bring a deleted object back. All of it belongs to one event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from vram_agent.protocol import CONTROL_PORT_ANNOTATION, WORKLOAD_LABEL

from vram_operator.api import FIELD_MANAGER
from vram_operator.clock import Clock, parse_time
from vram_operator.kube import PODS, RESTARTS, WORKLOADS, Object, Resource

Key = tuple[str, str]
"""Namespace and name of a workload."""

_REMEMBERED_DELETIONS = 4096
_POD_METADATA = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "deletionTimestamp",
    "labels",
    "ownerReferences",
)


def workload_key(resource: Resource, obj: Object) -> Key | None:
    """Return which workload an object belongs to; None if it says so nowhere."""
    metadata = obj["metadata"]
    if resource is WORKLOADS:
        name = metadata["name"]
    elif resource is RESTARTS:
        name = (obj.get("spec") or {}).get("workload")
    else:
        name = (metadata.get("labels") or {}).get(WORKLOAD_LABEL)
    return (metadata["namespace"], name) if name else None


def trimmed(resource: Resource, obj: Object) -> Object:
    """Return an object without what nobody reads: a pod of 4 KiB becomes one of 1 KiB."""
    if resource is not PODS:
        metadata = {k: v for k, v in obj["metadata"].items() if k != "managedFields"}
        own = own_fields(obj)
        if own:
            metadata["managedFields"] = own
        return {**obj, "metadata": metadata}
    metadata = {name: obj["metadata"][name] for name in _POD_METADATA if name in obj["metadata"]}
    annotations = obj["metadata"].get("annotations") or {}
    if CONTROL_PORT_ANNOTATION in annotations:
        metadata["annotations"] = {CONTROL_PORT_ANNOTATION: annotations[CONTROL_PORT_ANNOTATION]}
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    containers = [
        {"name": container["name"], "ports": container.get("ports") or []}
        for container in spec.get("containers") or []
    ]
    kept = ("phase", "podIP", "startTime", "conditions", "containerStatuses")
    return {
        "metadata": metadata,
        "spec": {"nodeName": spec.get("nodeName", ""), "containers": containers},
        "status": {name: status[name] for name in kept if name in status},
    }


def own_fields(obj: Object) -> list[Object]:
    """Return which fields are ours: the part of ``managedFields`` that our apply wrote."""
    return [
        entry
        for entry in obj["metadata"].get("managedFields") or []
        if (entry.get("manager"), entry.get("operation")) == (FIELD_MANAGER, "Apply")
    ]


def ready_condition(pod: Object) -> dict[str, Any] | None:
    """Return the pod's Ready condition, if it has one yet."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one.get("type") == "Ready"), None)


class Cache:
    """The newest known state of each watched object, by workload."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._objects: dict[Resource, dict[Key, Object]] = {}
        self._members: dict[Resource, dict[Key, dict[str, Object]]] = {}
        self._deleted: OrderedDict[str, int] = OrderedDict()
        self._unready_since: dict[str, datetime] = {}

    def observe(self, resource: Resource, obj: Object) -> Key | None:
        """Take in an object as it is now; returns the workload to look at, None for old news."""
        place, uid = _place(obj), obj["metadata"]["uid"]
        known = self._objects.setdefault(resource, {}).get(place)
        if uid in self._deleted:
            return None
        if known is not None:
            if known["metadata"]["uid"] == uid and _version(known) >= _version(obj):
                return None
            self._remove(resource, known)
        kept = trimmed(resource, obj)
        self._objects[resource][place] = kept
        key = workload_key(resource, kept)
        if key is not None:
            self._members.setdefault(resource, {}).setdefault(key, {})[place[1]] = kept
        if resource is PODS:
            self._note_readiness(kept)
        return key

    def observe_deletion(self, resource: Resource, obj: Object) -> Key | None:
        """Forget an object; returns the workload that it belonged to."""
        uid = obj["metadata"]["uid"]
        self._deleted[uid] = _version(obj)
        if len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)
        self._unready_since.pop(uid, None)
        known = self._objects.get(resource, {}).get(_place(obj))
        if known is not None and known["metadata"]["uid"] == uid:
            self._remove(resource, known)
        return workload_key(resource, obj)

    def replace_all(
        self, resource: Resource, namespace: str | None, listed: Iterable[Object], version: int
    ) -> set[Key]:
        """Make the cache agree with a list of a namespace, None for all of them.

        Returns the workloads that changed. What is newer than the list stays: a watch may have
        been faster.
        """
        changed: set[Key | None] = set()
        found: set[str] = set()
        for obj in listed:
            found.add(obj["metadata"]["uid"])
            changed.add(self.observe(resource, obj))
        for known in list(self._objects.get(resource, {}).values()):
            elsewhere = namespace is not None and known["metadata"]["namespace"] != namespace
            if elsewhere or known["metadata"]["uid"] in found:
                continue
            if _version(known) <= version:
                changed.add(self.observe_deletion(resource, known))
        return {key for key in changed if key is not None}

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """Return an object by its name."""
        return self._objects.get(resource, {}).get((namespace, name))

    def every(self, resource: Resource) -> Iterator[Object]:
        """Iterate over all objects of a kind; do not await in between."""
        return iter(self._objects.get(resource, {}).values())

    def count(self, resource: Resource) -> int:
        """Return how many objects of a kind there are."""
        return len(self._objects.get(resource, {}))

    def members(self, resource: Resource, key: Key) -> list[Object]:
        """Return the objects of a kind that belong to a workload."""
        return list(self._members.get(resource, {}).get(key, {}).values())

    def unready_since(self, pod_uid: str) -> datetime | None:
        """Return when the pod last turned not ready, as far as it was seen."""
        return self._unready_since.get(pod_uid)

    def _remove(self, resource: Resource, known: Object) -> None:
        self._objects[resource].pop(_place(known), None)
        key = workload_key(resource, known)
        if key is not None:
            members = self._members.get(resource, {}).get(key, {})
            members.pop(known["metadata"]["name"], None)
            if not members:
                self._members.get(resource, {}).pop(key, None)

    def _note_readiness(self, pod: Object) -> None:
        condition = ready_condition(pod)
        if condition is not None and condition.get("status") != "True":
            changed = condition.get("lastTransitionTime")
            moment = parse_time(changed) if changed else self._clock.now()
            self._unready_since[pod["metadata"]["uid"]] = moment


def _place(obj: Object) -> Key:
    return (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def _version(obj: Object) -> int:
    """Return the resource version as a number, comparable since Kubernetes 1.35 (KEP-5504)."""
    text = str(obj["metadata"].get("resourceVersion") or "0")
    return int(text) if text.isdecimal() else 0
