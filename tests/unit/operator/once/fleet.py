"""Two workloads with their pods, kubelet and agents, and replicas of the operator that act on them.

The replicas run the real gather, plan and apply; only the wire, the agents and the time are of
memory. What the agents really did is kept in ``executions``, and what went wrong at the moment that
it happened in ``violations``.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from vram_agent.protocol import ActionReport, ActionState, ActionStep, Report
from vram_operator.agent_client import AgentAddress, AgentError, Answer
from vram_operator.api import ResidualPolicy, encode
from vram_operator.apply import Applier, Tools
from vram_operator.cache import Cache, Key
from vram_operator.clock import format_time
from vram_operator.core.snapshot import Settings
from vram_operator.events import EventWriter
from vram_operator.facts import Facts
from vram_operator.gather import Gatherer, is_active
from vram_operator.kube import DEPLOYMENTS, PODS, RESTARTS, WORKLOADS, Object
from vram_operator.metrics import Metrics
from vram_operator.queue import RetryError
from vram_operator.reconcile import Reconciler
from vram_operator.resync import resync

from tests.support.factories import (
    NOW,
    make_pod,
    make_policy,
    make_report,
    make_settings,
    make_template_spec,
    rfc3339,
)
from tests.unit.operator.once.apiserver import Apiserver, Crash, MemoryApi

NAMESPACE = "lab"
THRESHOLD_GIB = 8.0
FRESH = timedelta(seconds=30)
"""Nothing is done to a pod on the word of an agent that is older."""
START = timedelta(seconds=3)
KEEP_SECONDS = 600


@dataclass
class FakeClock:
    """It stands until it is moved."""

    moment: datetime = NOW

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return (self.moment - NOW).total_seconds()


@dataclass(frozen=True)
class Execution:
    """Something that an agent really did; ``life`` is pod, boot and epoch before it."""

    life: tuple[str, int, int]
    restart_id: str
    step: ActionStep


@dataclass
class Agent:
    """The agent of one pod. What it remembers lies on a volume of the pod."""

    uid: str
    ip: str
    generation: int = 1
    boot: int = 1
    epoch: int = 0
    residual_gib: float = 1.0
    is_sticky: bool = False
    is_silent: bool = False
    lost_answers: int = 0
    action: ActionReport | None = None
    running_since: datetime | None = NOW - timedelta(days=1)

    @property
    def is_reachable(self) -> bool:
        return self.running_since is not None and not self.is_silent


@dataclass
class Heard:
    """The last word of an agent to one replica."""

    at: datetime
    boot: int
    epoch: int
    residual_gib: float


class Fleet:
    """The cluster. ``cap`` is of all workloads, ``max_unavailable`` of each."""

    def __init__(self, pods: int = 2, cap: str = "1", max_unavailable: int = 1) -> None:
        self.clock = FakeClock()
        self.server = Apiserver(self.clock)
        self.server.on_evict = self.replace_pod
        self.server.on_create = self._judge_creation
        self.settings: Settings = make_settings(max_concurrent_restarts=cap)
        self.names = ("speech", "vision")
        self.agents: dict[str, Agent] = {}
        self.executions: list[Execution] = []
        self.violations: list[str] = []
        self.replicas: list[Replica] = []
        self.pods = pods
        self._number = 0
        for name in self.names:
            residual = ResidualPolicy(threshold="8Gi", for_seconds=0, min_samples=1)
            policy = make_policy(
                max_unavailable=max_unavailable, cooldown_seconds=60, residual=residual
            )
            spec = make_template_spec(restart=policy)
            body = encode(spec)
            body["template"]["replicas"] = pods
            metadata = {"name": name, "namespace": NAMESPACE, "annotations": {}}
            self.server.store(WORKLOADS.path(NAMESPACE), {"metadata": metadata, "spec": body})
            for index in range(pods):
                self._make_pod(name, f"{name}-{index}", NOW - timedelta(days=1))

    # --- the cluster's own life -------------------------------------------------------------------

    def collection(self, resource: Any) -> list[Object]:
        return self.server.items(resource.path(NAMESPACE))

    def pod_names(self) -> list[str]:
        return sorted(pod["metadata"]["name"] for pod in self.collection(PODS))

    def agent_of(self, pod_name: str) -> Agent:
        pod = self.server.find(PODS.path(NAMESPACE), pod_name)
        assert pod is not None
        return self.agents[pod["metadata"]["uid"]]

    def _make_pod(self, workload: str, name: str, created: datetime) -> None:
        self._number += 1
        uid = f"pod-{self._number}"
        # A replacement has the name and the address of the one before it, as a StatefulSet's may.
        self.agents[uid] = Agent(uid, ip=f"10.0.0.{name}", running_since=created)
        pod = {
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "uid": uid,
                "creationTimestamp": format_time(created),
                "labels": {"vram.dev/workload": workload},
                "ownerReferences": [
                    {"kind": "ReplicaSet", "name": workload, "uid": "rs", "controller": True}
                ],
            },
            "spec": {
                "nodeName": f"node-of-{name}",
                "containers": [
                    {"name": "agent", "ports": [{"name": "control", "containerPort": 8001}]}
                ],
            },
        }
        self._write_pod(pod, created, restarts=0)

    def _write_pod(self, pod: Object, ready_changed: datetime, restarts: int) -> None:
        agent = self.agents[pod["metadata"]["uid"]]
        since = agent.running_since
        ready = since is not None and self.clock.now() - since >= START
        state = {"running": {"startedAt": format_time(since)}} if since is not None else {}
        finished = {"terminated": {"finishedAt": format_time(ready_changed)}} if restarts else {}
        status = {
            "phase": "Running",
            "podIP": agent.ip,
            "startTime": pod["metadata"]["creationTimestamp"],
            "conditions": [
                {
                    "type": "Ready",
                    "status": "True" if ready else "False",
                    "lastTransitionTime": format_time(ready_changed),
                }
            ],
            "containerStatuses": [
                {
                    "name": "agent",
                    "restartCount": restarts,
                    "state": state,
                    "lastState": finished,
                }
            ],
        }
        self.server.store(PODS.path(NAMESPACE), {**pod, "status": status})

    def exit_container(self, name: str) -> None:
        """PID 1 ends; the kubelet starts it again as time passes."""
        pod = self.server.find(PODS.path(NAMESPACE), name)
        assert pod is not None
        agent = self.agents[pod["metadata"]["uid"]]
        agent.boot, agent.epoch, agent.running_since = agent.boot + 1, 0, None
        agent.residual_gib = 9.0 if agent.is_sticky else 0.5
        if agent.action is not None and agent.action.state is ActionState.ACTING:
            agent.action = self._noted(agent.action, ActionState.DONE)
        self._write_pod(pod, self.clock.now(), _restarts(pod) + 1)

    def replace_pod(self, pod: Object) -> None:
        """The pod goes, and its owner makes another of the same name."""
        metadata = pod["metadata"]
        workload = metadata["labels"]["vram.dev/workload"]
        self.server.remove(PODS.path(NAMESPACE), metadata["name"])
        self._make_pod(workload, metadata["name"], self.clock.now())

    def pass_time(self, seconds: float) -> None:
        """Time passes in small steps; agents and kubelet do what they are at."""
        while seconds > 0:
            step = min(5.0, seconds)
            seconds -= step
            self.clock.moment += timedelta(seconds=step)
            for pod in self.collection(PODS):
                self._live(pod)
            self._roll_out()

    def _live(self, pod: Object) -> None:
        agent = self.agents[pod["metadata"]["uid"]]
        ready = pod["status"]["conditions"][0]["status"] == "True"
        if agent.running_since is None:
            agent.running_since = self.clock.now()
            self._write_pod(pod, self.clock.now(), _restarts(pod))
        elif not ready and self.clock.now() - agent.running_since >= START:
            self._write_pod(pod, self.clock.now(), _restarts(pod))
        elif agent.action is not None and agent.action.state is ActionState.ACTING:
            self._act(pod, agent, agent.action)

    def _act(self, pod: Object, agent: Agent, action: ActionReport) -> None:
        life = (agent.uid, agent.boot, agent.epoch)
        self.executions.append(Execution(life, action.restart_id, action.step))
        if action.step is ActionStep.IN_PLACE:
            self.exit_container(pod["metadata"]["name"])
            return
        agent.epoch += 1
        agent.residual_gib = 9.0 if agent.is_sticky else 0.5
        agent.action = self._noted(action, ActionState.DONE)

    def _noted(self, action: ActionReport, state: ActionState) -> ActionReport:
        at = rfc3339(self.clock.now())
        return ActionReport(restart_id=action.restart_id, step=action.step, state=state, at=at)

    def _roll_out(self) -> None:
        """Play the Deployment's controller: its pods are of its template, as many as are ready."""
        for obj in self.collection(DEPLOYMENTS):
            name = obj["metadata"]["name"]
            ready = sum(
                pod["status"]["conditions"][0]["status"] == "True"
                for pod in self.collection(PODS)
                if pod["metadata"]["labels"]["vram.dev/workload"] == name
            )
            status = {
                "observedGeneration": obj["metadata"]["generation"],
                "replicas": self.pods,
                "updatedReplicas": self.pods,
                "availableReplicas": ready,
            }
            if obj.get("status") != status:
                self.server.store(DEPLOYMENTS.path(NAMESPACE), {**obj, "status": status})

    # --- agents -----------------------------------------------------------------------------------

    def at(self, ip: str) -> Agent | None:
        """Who listens at an address now: the agent of a pod that is there."""
        uids = {pod["metadata"]["uid"] for pod in self.collection(PODS)}
        return next((one for one in self.agents.values() if one.ip == ip and one.uid in uids), None)

    def begin(self, agent: Agent, restart_id: str, step: ActionStep) -> int:
        """Take a call as the agent does; returns the status of its answer."""
        known = agent.action
        if known is not None and known.restart_id == restart_id:
            return 202
        if known is not None and known.state is ActionState.ACTING:
            return 503
        at = rfc3339(self.clock.now())
        agent.action = ActionReport(
            restart_id=restart_id, step=step, state=ActionState.ACTING, at=at
        )
        return 202

    # --- people -----------------------------------------------------------------------------------

    def add_restart(self, name: str, pod_name: str, method: str) -> None:
        spec = {"workload": pod_name.rsplit("-", 1)[0], "pod": {"name": pod_name}, "method": method}
        metadata = {"name": name, "namespace": NAMESPACE}
        self.server.store(RESTARTS.path(NAMESPACE), {"metadata": metadata, "spec": spec})

    def annotate(self, workload: str, value: str) -> None:
        raw = self.server.find(WORKLOADS.path(NAMESPACE), workload)
        assert raw is not None
        annotations = {**raw["metadata"]["annotations"], "vram.dev/restart": value}
        changed = {**raw, "metadata": {**raw["metadata"], "annotations": annotations}}
        self.server.store(WORKLOADS.path(NAMESPACE), changed)

    # --- what must hold ---------------------------------------------------------------------------

    def active(self) -> list[Object]:
        return [one for one in self.collection(RESTARTS) if is_active(one)]

    def open(self) -> list[Object]:
        return [
            one for one in self.collection(RESTARTS) if not (one.get("status") or {}).get("outcome")
        ]

    def check(self, replicas_at_once: int, cap: int, max_unavailable: int) -> None:
        """Assert the rules; several replicas that act at once may each fill the caps."""
        assert not self.violations, self.violations
        lives = [one.life for one in self.executions]
        assert len(lives) == len(set(lives)), f"one life was ended twice: {self.executions}"
        ids = [one.restart_id for one in self.executions]
        assert len(ids) == len(set(ids)), f"one restart ID was carried out twice: {ids}"
        # A step is written down before it is asked for, and each that is written is done once.
        written = sum(
            attempt["method"] in {"Recycle", "InPlace"}
            for one in self.collection(RESTARTS)
            for attempt in (one.get("status") or {}).get("attempts") or []
        )
        assert len(self.executions) <= written, f"more than was written: {self.executions}"
        active = self.active()
        assert len(active) <= cap * replicas_at_once, f"cap: {_names(active)}"
        for name in self.names:
            own = [one for one in active if one["spec"]["workload"] == name]
            assert len(own) <= max_unavailable * replicas_at_once, f"maxUnavailable: {_names(own)}"
        keys = [
            one["spec"]["pod"]["uid"]
            for one in self.open()
            if one["spec"].get("trigger", "Manual") == "Residual"
        ]
        assert len(keys) == len(set(keys)), "a pod has two open restarts for one reason"

    def _judge_creation(self, who: str, obj: Object) -> None:
        spec = obj.get("spec") or {}
        if spec.get("trigger") != "Residual":
            return
        replica = next(one for one in self.replicas if one.who == who)
        heard = replica.heard.get(spec["pod"]["uid"])
        if heard is None or self.clock.now() - heard.at > FRESH:
            self.violations.append(f"{obj['metadata']['name']}: decided on stale evidence")
        elif heard.residual_gib <= THRESHOLD_GIB:
            self.violations.append(f"{obj['metadata']['name']}: decided below the threshold")


def _restarts(pod: Object) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


def _names(objects: list[Object]) -> list[str]:
    return [one["metadata"]["name"] for one in objects]


@dataclass
class Replica:
    """One process of the operator, from its start to its crash."""

    fleet: Fleet
    who: str
    loop: asyncio.AbstractEventLoop
    seen: int = 0
    """How much of the apiserver's log its watches have shown."""
    heard: dict[str, Heard] = field(default_factory=dict)
    crash_at_call: str = ""

    def __post_init__(self) -> None:
        fleet = self.fleet
        self.api = MemoryApi(fleet.server, self.who, lambda: None)
        self.cache = Cache(fleet.clock)
        self.facts = Facts()
        agents: Any = self
        metrics = Metrics()
        gatherer = Gatherer(self.api, self.cache, self.facts, fleet.clock, fleet.settings)
        gatherer.public_keys = lambda: "-----BEGIN PUBLIC KEY-----\n"
        self.applier = Applier(
            Tools(
                api=self.api,
                agents=agents,
                cache=self.cache,
                facts=self.facts,
                events=EventWriter(self.api, fleet.clock, self.who),
                metrics=metrics,
                clock=fleet.clock,
            )
        )
        self.reconciler = Reconciler(gatherer, self.applier, metrics, fleet.clock)

    # --- what the operator's shell does around visits ---------------------------------------------

    def start(self) -> None:
        """List everything and ask every agent, as before the first visit."""
        self.resync()
        self.listen()

    def resync(self) -> None:
        self.run(resync(self.api, self.cache, (NAMESPACE,)))
        self.seen = len(self.fleet.server.log)
        self.facts.retain({pod["metadata"]["uid"] for pod in self.cache.every(PODS)})

    def watch(self, count: int) -> None:
        """The watches show the next events."""
        for event in self.fleet.server.log[self.seen : self.seen + count]:
            self._observe(event)
        self.seen = min(self.seen + count, len(self.fleet.server.log))

    def watch_again(self, start: int, count: int) -> None:
        """The watches show old events once more, as after a reconnection."""
        for event in self.fleet.server.log[: self.seen][start : start + count]:
            if not event.deleted:
                self._observe(event)

    def _observe(self, event: Any) -> None:
        obj = copy.deepcopy(event.obj)
        if event.deleted:
            self.cache.observe_deletion(event.resource, obj)
            if event.resource is PODS:
                self.facts.forget(obj["metadata"]["uid"])
        else:
            self.cache.observe(event.resource, obj)

    def listen(self) -> None:
        """Ask every agent that is known for its report."""
        for pod in list(self.cache.every(PODS)):
            uid = pod["metadata"]["uid"]
            try:
                report = self._report(AgentAddress(pod["status"]["podIP"], 8001, uid))
            except AgentError as error:
                self.facts.record_silence(uid, str(error))
            else:
                self.facts.record_report(uid, report, self.fleet.clock.now(), KEEP_SECONDS)

    def _report(self, address: AgentAddress) -> Report:
        agent = self.fleet.at(address.ip)
        if agent is None or not agent.is_reachable or agent.uid != address.pod_uid:
            raise AgentError("no answer")
        now = self.fleet.clock.now()
        self.heard[agent.uid] = Heard(now, agent.boot, agent.epoch, agent.residual_gib)
        pod = make_pod("any", uid=agent.uid)
        return make_report(
            pod,
            agent.residual_gib,
            now,
            boot_id=f"{agent.uid}-boot-{agent.boot}",
            epoch=agent.epoch,
            action=agent.action,
            config_generation=agent.generation,
        )

    async def call(self, address: AgentAddress, method: str, path: str, body: Any) -> Answer:
        """Stand for the client of the agents."""
        for _ in range(self.api.yields):
            await asyncio.sleep(0)
        if self.crash_at_call == "before" and path in {"/recycle", "/restart"}:
            raise Crash
        agent = self.fleet.at(address.ip)
        if agent is None or not agent.is_reachable:
            return Answer(0, "no answer")
        if agent.uid != address.pod_uid:
            return Answer(401, "the token is for another pod")
        status = 200
        if method == "PUT":
            agent.generation = body["metadata"]["generation"]
        elif path in {"/recycle", "/restart"}:
            status = self._order(agent, path, body["restartID"])
        if agent.lost_answers:
            agent.lost_answers -= 1
            return Answer(0, "the answer was lost")
        return Answer(status)

    def _order(self, agent: Agent, path: str, restart_id: str) -> int:
        heard = self.heard.get(agent.uid)
        if heard is None or self.fleet.clock.now() - heard.at > FRESH:
            self.fleet.violations.append(f"{restart_id}: ordered on stale evidence")
        step = ActionStep.RECYCLE if path == "/recycle" else ActionStep.IN_PLACE
        status = self.fleet.begin(agent, restart_id, step)
        if self.crash_at_call == "after":
            raise Crash
        return status

    # --- visits -----------------------------------------------------------------------------------

    async def visit(self, key: Key) -> None:
        """Visit once; what the queue would repeat later ends the visit."""
        try:
            await self.reconciler.reconcile(key)
        except RetryError:
            return

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run on the loop until it ends, slow calls of it included."""

        async def whole() -> None:
            await work
            for _ in range(2 + 4 * self.api.yields):
                await asyncio.sleep(0)

        self.loop.run_until_complete(whole())
