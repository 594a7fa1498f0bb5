"""Two workloads with their pods, kubelet and agents, and the judge of what is done to them.

Only the wire, the agents and the time are of memory; see `replica` for who acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from vram_agent.protocol import ActionReport, ActionState, ActionStep
from vram_operator.api import ResidualPolicy, encode
from vram_operator.clock import format_time
from vram_operator.core.snapshot import Settings
from vram_operator.kube import DEPLOYMENTS, PODS, RESTARTS, WORKLOADS, Object

from tests.support.factories import (
    NOW,
    make_policy,
    make_settings,
    make_template_spec,
    rfc3339,
)
from tests.unit.operator.once.apiserver import Apiserver
from tests.unit.operator.once.judge import Execution, Judge

NAMESPACE = "lab"
START = timedelta(seconds=3)
COOLDOWN_SECONDS = 60


@dataclass
class FakeClock:
    """It stands until it is moved."""

    moment: datetime = NOW

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return (self.moment - NOW).total_seconds()


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


class Fleet:
    """The cluster: ``pods`` of each workload, each on a node of its own.

    ``cap`` is of all workloads, ``max_unavailable`` of each.
    """

    def __init__(self, pods: int = 2, cap: int = 1, max_unavailable: int = 1) -> None:
        self.clock = FakeClock()
        self.server = Apiserver(self.clock)
        self.server.on_evict = self.replace_pod
        self.judge = Judge(self.clock, self.restarts, cap, max_unavailable)
        self.server.on_create = self.judge.see_creation
        self.server.on_status = self.judge.see_status
        self.settings: Settings = make_settings(max_concurrent_restarts=str(cap))
        self.names = ("speech", "vision")
        self.agents: dict[str, Agent] = {}
        self.pods = pods
        self._number = 0
        for name in self.names:
            residual = ResidualPolicy(threshold="8Gi", for_seconds=0, min_samples=1)
            policy = make_policy(
                max_unavailable=max_unavailable,
                cooldown_seconds=COOLDOWN_SECONDS,
                residual=residual,
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

    def restarts(self) -> list[Object]:
        return self.collection(RESTARTS)

    def open(self) -> list[Object]:
        return [one for one in self.restarts() if not (one.get("status") or {}).get("outcome")]

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
        self.judge.see_execution(Execution(life, action.restart_id, action.step))
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


def _restarts(pod: Object) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])
