"""The rules that hold whatever goes wrong, asked at the moment at which something is done.

The judge stands at the apiserver and beside the agents and sees each write, call and step; that
the operator broke a rule and was back within it before anybody looked is no excuse. It knows the
objects and what each replica was told, and none of the operator's decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from vram_agent.protocol import ActionStep
from vram_operator.clock import Clock
from vram_operator.gather import is_active
from vram_operator.kube import Object

THRESHOLD_GIB = 8.0
FRESH = timedelta(seconds=30)
"""Nothing is done to a pod on the word of an agent that is older."""


@dataclass(frozen=True)
class Execution:
    """Something that an agent really did; ``life`` is pod, boot and epoch before it."""

    life: tuple[str, int, int]
    restart_id: str
    step: ActionStep


@dataclass
class Heard:
    """The last word of an agent to one replica."""

    at: datetime
    boot: int
    epoch: int
    residual_gib: float


class Witness(Protocol):
    """A replica: what agents told it, and which restarts it knows of."""

    heard: dict[str, Heard]

    def known_restarts(self) -> list[Object]: ...


@dataclass
class Judge:
    """``restarts`` are those that there are. ``cap`` and ``max_unavailable`` are of each leader."""

    clock: Clock
    restarts: Callable[[], list[Object]]
    cap: int
    max_unavailable: int
    leaders: int = 1
    witnesses: dict[str, Witness] = field(default_factory=dict)
    executions: list[Execution] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    most_active: int = 0
    """So many restarts ran at a time: where it never reaches the cap, the cap was not tried."""

    def see_creation(self, who: str, restart: Object) -> None:
        """Somebody decided that a pod is to be restarted."""
        if _trigger(restart) != "Residual":
            return
        self._judge_evidence(who, restart, "decided")
        pod = restart["spec"]["pod"]["uid"]
        for other in self.restarts():
            same = _trigger(other) == "Residual" and other["spec"]["pod"].get("uid") == pod
            if same and other is not restart and not _status(other).get("outcome"):
                self._object(restart, "a pod has two open restarts for one reason")

    def see_status(self, who: str, before: Object, after: Object) -> None:
        """The status of a restart was written."""
        for complaint in _find_rewriting(_status(before), _status(after)):
            self._object(after, complaint)
        if not is_active(after) or is_active(before):
            return
        if _trigger(after) == "Residual" and not _status(before).get("startTime"):
            self._judge_evidence(who, after, "begun")
        uid = after["metadata"]["uid"]
        there = [one for one in self.restarts() if one["metadata"]["uid"] != uid]
        # A leader that shares its power unknowingly can count only what it knows of.
        mine = there if self.leaders == 1 else self.witnesses[who].known_restarts()
        active = [one for one in mine if is_active(one) and one["metadata"]["uid"] != uid]
        self.most_active = max(self.most_active, len(active) + 1)
        self._judge_places(after, active, 1)
        if self.leaders > 1:
            self._judge_places(after, [one for one in there if is_active(one)], self.leaders)

    def see_order(self, who: str, pod_uid: str, restart_id: str) -> None:
        """An agent was asked for a step."""
        heard = self.witnesses[who].heard.get(pod_uid)
        if heard is None or self.clock.now() - heard.at > FRESH:
            self.violations.append(f"{restart_id}: ordered on stale evidence")

    def see_execution(self, execution: Execution) -> None:
        """An agent carried out a step."""
        for known in self.executions:
            if known.life == execution.life:
                self.violations.append(f"{execution}: one life was ended twice, by {known}")
            if known.restart_id == execution.restart_id:
                self.violations.append(f"{execution}: one restart ID was carried out twice")
        self.executions.append(execution)
        # A step is written down before it is asked for, and each that is written is done once.
        written = sum(
            attempt["method"] in {"Recycle", "InPlace"}
            for one in self.restarts()
            for attempt in _attempts(_status(one))
        )
        if len(self.executions) > written:
            self.violations.append(f"{execution}: more was done than was written")

    def _judge_evidence(self, who: str, restart: Object, what: str) -> None:
        heard = self.witnesses[who].heard.get(restart["spec"]["pod"]["uid"])
        if heard is None or self.clock.now() - heard.at > FRESH:
            self._object(restart, f"{what} on stale evidence")
        elif heard.residual_gib <= THRESHOLD_GIB:
            self._object(restart, f"{what} below the threshold")

    def _judge_places(self, restart: Object, active: list[Object], leaders: int) -> None:
        workload = restart["spec"]["workload"]
        own = [one for one in active if one["spec"]["workload"] == workload]
        if len(active) >= self.cap * leaders:
            self._object(restart, f"above the cap: {_names(active)} run")
        if len(own) >= self.max_unavailable * leaders:
            self._object(restart, f"above maxUnavailable: {_names(own)} run")

    def _object(self, restart: Object, complaint: str) -> None:
        self.violations.append(f"{restart['metadata']['name']}: {complaint}")


def _find_rewriting(before: Object, after: Object) -> Iterator[str]:
    """Find what of a restart's record was taken back: what was done stays written."""
    if before.get("outcome") and after != before:
        yield f"has ended {before['outcome']} and was written over"
    old, new = _attempts(before), _attempts(after)
    withdrawn = len(old) - len(new)
    is_leave = withdrawn == 1 and old[-1]["method"] == "Evict" and "endTime" not in old[-1]
    if withdrawn > 0 and not is_leave:
        yield f"a step was forgotten: {old[len(new) :]}"
    for was, is_ in zip(old, new, strict=False):
        kept = was if "endTime" in was else {name: was[name] for name in ("method", "startTime")}
        if {**is_, **kept} != is_:
            yield f"a step was written over: {was} by {is_}"


def _status(obj: Object) -> Object:
    return obj.get("status") or {}


def _attempts(status: Object) -> list[Object]:
    return status.get("attempts") or []


def _trigger(restart: Object) -> str:
    return str(restart["spec"].get("trigger", "Manual"))


def _names(objects: list[Object]) -> list[str]:
    return [one["metadata"]["name"] for one in objects]
