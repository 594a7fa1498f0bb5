"""What this process has learned from agents and from the Eviction API.

Facts are not state: they may be lost at any moment, and the plan then asks again. `poller` and
`apply` write here, `gather` and the metrics read. All of it belongs to one event loop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime

from vram_agent.protocol import Report

from vram_operator.cache import own_fields
from vram_operator.core.snapshot import (
    Agent,
    CallAnswer,
    EvictionAnswer,
    PushAnswer,
    hear,
)
from vram_operator.kube import Object

KEPT_CALLS = 8
REFUSING = frozenset({401, 403})
"""What an agent answers that does not take our signed calls."""
_REPLICAS = "f:replicas"


class Facts:
    """The latest facts about each pod, by its UID; and the content of what we applied."""

    def __init__(self) -> None:
        self._agents: dict[str, Agent] = {}
        self._evictions: dict[str, EvictionAnswer] = {}
        self._applied: dict[str, str] = {}
        self._refused: dict[str, tuple[int, str]] = {}
        self._meant: dict[str, str] = {}

    def agent(self, pod_uid: str) -> Agent:
        """Return what is known of the agent; one that says nothing when nothing is."""
        return self._agents.get(pod_uid) or Agent(pod_uid=pod_uid)

    def eviction(self, pod_uid: str) -> EvictionAnswer | None:
        """Return the latest answer of the Eviction API."""
        return self._evictions.get(pod_uid)

    def record_report(
        self, pod_uid: str, report: Report, at: datetime, keep_seconds: float
    ) -> None:
        """Keep a report, and its figures in history and trend. Raises ValueError for a bad time."""
        self._agents[pod_uid] = hear(self.agent(pod_uid), report, at, keep_seconds)

    def record_silence(self, pod_uid: str, error: str) -> None:
        """Keep why the agent gave no report; the last report stays, with its age."""
        self._agents[pod_uid] = replace(self.agent(pod_uid), error=error)

    def record_push(self, pod_uid: str, answer: PushAnswer) -> None:
        """Keep the answer to a pushed config."""
        self.record_word(pod_uid, answer.status, answer.at)
        self._agents[pod_uid] = replace(self.agent(pod_uid), push=answer)

    def record_call(self, pod_uid: str, answer: CallAnswer) -> None:
        """Keep the answer to a restart or recycle."""
        self.record_word(pod_uid, answer.status, answer.at)
        agent = self.agent(pod_uid)
        self._agents[pod_uid] = replace(agent, calls=(*agent.calls, answer)[-KEPT_CALLS:])

    def record_word(self, pod_uid: str, status: int, at: datetime) -> None:
        """Keep whether the agent takes our signed calls, by its answer to one.

        1. It refused. 2. It could not be reached, which says nothing new; one that refused is asked
        again later. 3. It takes them.
        """
        agent = self.agent(pod_uid)
        if status in REFUSING or (status == 0 and agent.refuses):  # 1, 2
            agent = replace(agent, refuses=True, refused_at=at)
        elif status:  # 3
            agent = replace(agent, refuses=False, refused_at=None)
        self._agents[pod_uid] = agent

    def record_eviction(self, answer: EvictionAnswer) -> None:
        """Keep the answer to an eviction, dry run or real."""
        self._evictions[answer.pod_uid] = answer

    def meant_pod(self, restart_uid: str, found: str) -> str:
        """Return the UID of the pod that a restart by name is about: the first that was found.

        A StatefulSet gives the replacement the same name, maybe within the same second.
        """
        return (
            self._meant.setdefault(restart_uid, found)
            if found
            else self._meant.get(restart_uid, "")
        )

    def forget_meant_pod(self, restart_uid: str) -> None:
        """Drop it: the restart has ended."""
        self._meant.pop(restart_uid, None)

    def record_applied(self, path: str, obj: Object) -> None:
        """Keep which fields of the object at ``path`` are ours after we applied it."""
        self._applied[path] = _ownership_digest(obj)

    def is_drifted(self, path: str, obj: Object) -> bool:
        """Did someone change what we applied? Objects that were not seen before count as applied.

        Who changes a field of ours takes it over. What others add is theirs, and what the
        apiserver fills in, anew after its upgrade, is nobody's: neither is put back, since that
        could roll pods.
        """
        digest = _ownership_digest(obj)
        return self._applied.setdefault(path, digest) != digest

    def record_refusal(self, workload_uid: str, generation: int, message: str) -> None:
        """Keep what the apiserver said of the objects generated for this generation."""
        self._refused[workload_uid] = (generation, message)

    def refusal(self, workload_uid: str, generation: int) -> str:
        """Return why the apiserver refused what was generated, empty if it did not."""
        refused_generation, message = self._refused.get(workload_uid, (generation, ""))
        return message if refused_generation == generation else ""

    def forget_refusal(self, workload_uid: str) -> None:
        """Drop a refusal: the apiserver took it after all."""
        self._refused.pop(workload_uid, None)

    def retain(self, pod_uids: Collection[str]) -> None:
        """Drop everything about pods that are not among these."""
        for pod_uid in (self._agents.keys() | self._evictions.keys()) - set(pod_uids):
            self.forget(pod_uid)

    def forget(self, pod_uid: str) -> None:
        """Drop everything about a pod that is gone."""
        self._agents.pop(pod_uid, None)
        self._evictions.pop(pod_uid, None)


def _ownership_digest(obj: Object) -> str:
    fields = [_without_replicas(entry.get("fieldsV1") or {}) for entry in own_fields(obj)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _without_replicas(fields: Object) -> Object:
    """Return fields without the number of pods: to scale is the user's to do."""
    spec = {name: value for name, value in fields.get("f:spec", {}).items() if name != _REPLICAS}
    return {**fields, "f:spec": spec}
