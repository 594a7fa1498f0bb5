"""An apiserver in memory, for the operator's real client: versions, uids, conflicts, a watch log.

`MemoryApi` is the operator's own `Api` with another wire: guards, errors and parsing are the real
ones. Faults are one per request that changes something, taken from a list, and may be a crash of
the operator before or after the request was carried out.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vram_operator.clock import Clock, format_time
from vram_operator.handlers import WATCHED
from vram_operator.kube import APPLY_PATCH, EVENTS, PODS, RESTARTS, Api, Call, Object, Resource

Place = tuple[str, str]


class Crash(BaseException):
    """The operator's process ends here and now."""


class Fault(StrEnum):
    """What happens to one request that changes something."""

    CONFLICT = "409"
    GONE = "410"
    THROTTLED = "429"
    ERROR = "500"
    UNREACHED = "never arrived"
    UNANSWERED = "carried out, the answer lost"
    CRASH_BEFORE = "crash before it"
    CRASH_AFTER = "crash after it"


@dataclass(frozen=True)
class Event:
    """What a watch shows."""

    resource: Resource
    obj: Object
    deleted: bool


class Refusal(Exception):  # noqa: N818 - an answer, not a failure of ours
    def __init__(self, status: int, reason: str, **details: Any) -> None:
        self.status = status
        self.body = {"kind": "Status", "reason": reason, "message": reason, "details": details}


@dataclass
class Apiserver:
    """Objects by collection and name. ``log`` is everything that ever happened to them."""

    clock: Clock
    objects: dict[str, dict[str, Object]] = field(default_factory=dict)
    log: list[Event] = field(default_factory=list)
    version: int = 1000
    budget_allows: bool = True
    on_evict: Callable[[Object], None] = lambda _: None
    on_create: Callable[[str, Object], None] = lambda _who, _obj: None
    on_status: Callable[[str, Object, Object], None] = lambda _who, _before, _after: None
    """Told of each status of a GPUPodRestart that is written."""

    # --- for the world ----------------------------------------------------------------------------

    def find(self, collection: str, name: str) -> Object | None:
        return self.objects.get(collection, {}).get(name)

    def items(self, collection: str) -> list[Object]:
        return list(self.objects.get(collection, {}).values())

    def store(self, collection: str, obj: Object) -> Object:
        """Write an object whatever its version; returns it as it is now."""
        self.version += 1
        obj = copy.deepcopy(obj)
        metadata = obj["metadata"]
        metadata["resourceVersion"] = str(self.version)
        metadata.setdefault("uid", f"uid-{self.version}")
        metadata.setdefault("creationTimestamp", format_time(self.clock.now()))
        metadata.setdefault("generation", 1)
        self.objects.setdefault(collection, {})[metadata["name"]] = obj
        self._tell(collection, obj, deleted=False)
        return obj

    def remove(self, collection: str, name: str) -> None:
        gone = self.objects.get(collection, {}).pop(name, None)
        if gone is not None:
            self.version += 1
            gone["metadata"]["resourceVersion"] = str(self.version)
            self._tell(collection, gone, deleted=True)

    def _tell(self, collection: str, obj: Object, *, deleted: bool) -> None:
        for resource in WATCHED:
            if collection == resource.path(obj["metadata"]["namespace"]):
                self.log.append(Event(resource, copy.deepcopy(obj), deleted))

    # --- for clients ------------------------------------------------------------------------------

    def answer(self, call: Call, who: str) -> Object:  # noqa: PLR0911 - one for each kind of call
        """Carry out a request. Raises Refusal."""
        if call.path.startswith(EVENTS.path("lab")):
            return {"metadata": {"name": "an-event"}}
        collection, name, subresource = self._split(call.path)
        if subresource == "eviction":
            return self._evict(collection, name, call.body["deleteOptions"])
        if call.method == "GET" and not name:
            items = copy.deepcopy(self.items(collection))
            return {"metadata": {"resourceVersion": str(self.version)}, "items": items}
        if call.method == "POST":
            return self._create(collection, call.body, who)
        known = self.find(collection, name)
        if known is None and call.content_type == APPLY_PATCH:
            return copy.deepcopy(self.store(collection, call.body))
        if known is None:
            raise Refusal(404, "NotFound")
        if call.method == "GET":
            return copy.deepcopy(known)
        self._check(known, call)
        if call.method == "DELETE":
            if collection == PODS.path("lab"):
                self.on_evict(known)
            else:
                self.remove(collection, name)
            return {}
        after = self.store(collection, _changed(known, call, subresource))
        if subresource == "status" and collection == RESTARTS.path("lab"):
            self.on_status(who, known, after)
        return copy.deepcopy(after)

    @staticmethod
    def _split(path: str) -> tuple[str, str, str]:
        prefix, _, rest = path.partition("/namespaces/")
        namespace, plural, *more = rest.split("/")
        name, subresource = [*more, "", ""][:2]
        return f"{prefix}/namespaces/{namespace}/{plural}", name, subresource

    def _create(self, collection: str, body: Object, who: str) -> Object:
        if self.find(collection, body["metadata"]["name"]) is not None:
            raise Refusal(409, "AlreadyExists")
        obj = self.store(collection, body)
        self.on_create(who, obj)
        return copy.deepcopy(obj)

    @staticmethod
    def _check(known: Object, call: Call) -> None:
        """Hold the uid and the version that the caller means against what is there."""
        body = call.body or {}
        meant = body.get("preconditions") or body.get("metadata") or {}
        for name in ("uid", "resourceVersion"):
            if name in meant and meant[name] != known["metadata"][name]:
                raise Refusal(409, "Conflict")

    def _evict(self, collection: str, name: str, options: Object) -> Object:
        pod = self.find(collection, name)
        if pod is None:
            raise Refusal(404, "NotFound")
        for key, value in options["preconditions"].items():
            if pod["metadata"][key] != value:
                raise Refusal(409, "Conflict")
        if not self.budget_allows:
            cause = {"reason": "DisruptionBudget", "message": "The disruption budget b needs 1"}
            raise Refusal(429, "TooManyRequests", causes=[cause])
        if not options.get("dryRun"):
            self.on_evict(pod)
        return {}


def _changed(known: Object, call: Call, subresource: str) -> Object:
    """Return an object after a PUT or PATCH; the generation moves with the spec."""
    if subresource == "status":
        return {**known, "status": call.body["status"]}
    annotations = {
        **(known["metadata"].get("annotations") or {}),
        **(call.body["metadata"].get("annotations") or {}),
    }
    metadata = {**known["metadata"], "annotations": annotations}
    content = {name: value for name, value in call.body.items() if name != "metadata"}
    if "spec" in content and content["spec"] != known.get("spec"):
        metadata["generation"] += 1
    return {**known, **content, "metadata": metadata}


class MemoryApi(Api):
    """The operator's client, whose wire is the apiserver above."""

    def __init__(self, server: Apiserver, who: str, guard: Callable[[], None]) -> None:
        self._server = server
        self._who = who
        self._guard = guard
        self.faults: list[Fault | None] = []
        self.yields = 0
        """So many turns of the loop others have before each request."""

    async def _exchange(self, call: Call) -> tuple[int, bytes, str]:
        for _ in range(self.yields):
            await asyncio.sleep(0)
        fault = self._next_fault(call)
        if fault is Fault.CRASH_BEFORE:
            raise Crash
        if fault is Fault.UNREACHED:
            raise TimeoutError
        if fault in _STATUSES:
            status = _STATUSES[fault]
            return status, json.dumps({"reason": "Injected", "message": fault}).encode(), "1"
        try:
            answer, status = self._server.answer(call, self._who), 200
        except Refusal as refusal:
            answer, status = refusal.body, refusal.status
        if fault is Fault.CRASH_AFTER:
            raise Crash
        if fault is Fault.UNANSWERED:
            raise TimeoutError
        return status, json.dumps(answer).encode(), ""

    def _next_fault(self, call: Call) -> Fault | None:
        changes = call.method != "GET" and "/events" not in call.path
        return self.faults.pop(0) if changes and self.faults else None


_STATUSES: dict[Fault | None, int] = {
    Fault.CONFLICT: 409,
    Fault.GONE: 410,
    Fault.THROTTLED: 429,
    Fault.ERROR: 500,
}
