"""A small model of the cluster: it carries plans out, forgets, repeats and crashes.

It stands for the apiserver (resource versions, deterministic names), the agents (restart IDs, boots
and epochs, leaks), the kubelet and the Eviction API with one budget. Statuses go through the wire
form and back, as they do in a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from msgspec import structs
from vram_agent.protocol import ActionReport, ActionState, ActionStep
from vram_operator.api import (
    PodRef,
    RestartSpec,
    RestartStatus,
    WorkloadStatus,
    decode,
    encode,
)
from vram_operator.core.phases import is_active, is_finished
from vram_operator.core.plan import (
    Action,
    AnnotateWorkload,
    CallRecycle,
    CallRestart,
    CreateRestart,
    DeletePod,
    DeleteRestart,
    DryRunEvict,
    EnsureObject,
    Evict,
    PatchRestartStatus,
    PatchWorkloadStatus,
    Plan,
    PushConfig,
)
from vram_operator.core.planning import plan
from vram_operator.core.resources import CONTENT_HASH_ANNOTATION
from vram_operator.core.snapshot import (
    Agent,
    CallAnswer,
    Cluster,
    EvictionAnswer,
    EvictionVerdict,
    OwnedObject,
    Pod,
    PushAnswer,
    Restart,
    Settings,
    Snapshot,
    Workload,
    hear,
)

from tests.support.factories import (
    NOW,
    PUBLIC_KEYS,
    make_pod,
    make_report,
    make_settings,
    make_target,
    make_workload,
    rfc3339,
)

START_SECONDS = 3


class Conflict(Exception):  # noqa: N818 - what the apiserver calls it
    """The resource version is not the one that was meant."""


@dataclass
class FakeAgent:
    """The agent in one pod; what it remembers of restart IDs lies on a volume."""

    boot: int = 1
    epoch: int = 0
    residual_gib: float = 1.0
    sticky: set[ActionStep] = field(default_factory=set)
    """Steps that do not give this pod's memory back."""
    silent: bool = False
    busy: int = 0
    action: ActionReport | None = None
    generation: int = 3
    exits_at: datetime | None = None


@dataclass
class Execution:
    """Something that really happened to a pod, and in which life of it."""

    pod: str
    life: tuple[str, int, int]
    step: str
    restart_id: str
    at: datetime


def _with_replicas(workload: Workload, replicas: int) -> Workload:
    template = workload.spec.template
    if template is None:
        return workload
    spec = structs.replace(workload.spec, template=structs.replace(template, replicas=replicas))
    return replace(workload, spec=spec)


class World:
    """One workload with its pods."""

    def __init__(
        self,
        pods: int = 1,
        workload: Workload | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.now = NOW
        self.version = 1000
        self.workload = _with_replicas(workload or make_workload(), pods)
        self.replicas = pods
        self.settings = settings or make_settings()
        self.pods = {f"speech-{n}": make_pod(f"speech-{n}") for n in range(pods)}
        self.fakes = {pod.uid: FakeAgent() for pod in self.pods.values()}
        self.restarts: dict[str, Restart] = {}
        self.objects: dict[tuple[str, str], OwnedObject] = {}
        self.deployed = False
        self.budget_allows = True
        self.volume = True
        """Do agents remember their last restart ID beyond a restart of the container?"""
        self.executions: list[Execution] = []
        self.evicted: list[str] = []
        self.agents: dict[str, Agent] = {}
        self.answers: dict[str, EvictionAnswer] = {}
        self.template_hash = ""
        self.poll()

    # --- what the operator sees -------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        target = make_target(self.workload, replicas=self.replicas)
        if self.workload.spec.template is not None:
            target = replace(target, annotations={CONTENT_HASH_ANNOTATION: self.template_hash})
        return Snapshot(
            settings=self.settings,
            cluster=Cluster(total_pods=len(self.pods)),
            workload=self.workload,
            public_keys=PUBLIC_KEYS,
            target=target,
            objects=tuple(self.objects.values()),
            pods=tuple(self.pods.values()),
            agents=tuple(
                self.agents.get(pod.uid, Agent(pod_uid=pod.uid)) for pod in self.pods.values()
            ),
            restarts=tuple(self.restarts.values()),
            evictions=tuple(self.answers.values()),
        )

    def plan(self) -> Plan:
        return plan(self.snapshot(), self.now)

    # --- time and trouble -------------------------------------------------------------------------

    def poll(self) -> None:
        """Every agent that speaks reports."""
        for pod in self.pods.values():
            fake = self.fakes[pod.uid]
            if fake.silent or pod.agent_running_since is None:
                continue
            report = make_report(
                pod,
                fake.residual_gib,
                self.now,
                boot_id=f"{pod.uid}-boot-{fake.boot}",
                epoch=fake.epoch,
                action=fake.action,
                idle=fake.busy == 0,
                config_generation=fake.generation,
            )
            known = self.agents.get(pod.uid, Agent(pod_uid=pod.uid))
            self.agents[pod.uid] = hear(known, report, self.now, 600)

    def pass_time(self, seconds: float) -> None:
        """Let time pass in small steps, with a poll after each."""
        longest = 5.0 if seconds <= 120 else 30.0
        while seconds > 0:
            step = min(longest, seconds)
            seconds -= step
            self.now += timedelta(seconds=step)
            for pod in list(self.pods.values()):
                self._live(pod)
            self.poll()

    def _live(self, pod: Pod) -> None:
        fake = self.fakes[pod.uid]
        if pod.agent_running_since is None:
            self.pods[pod.name] = replace(pod, agent_running_since=self.now)
            return
        if not pod.ready and self.now - pod.agent_running_since >= timedelta(seconds=START_SECONDS):
            self.pods[pod.name] = replace(pod, ready=True, ready_changed_at=self.now)
        action = fake.action
        if action is None or action.state is not ActionState.ACTING:
            return
        done = ActionReport(
            restart_id=action.restart_id,
            step=action.step,
            state=ActionState.DONE,
            at=rfc3339(self.now),
        )
        fake.action = done
        self._record(pod, fake, action.step, action.restart_id)
        if action.step not in fake.sticky:
            fake.residual_gib = 0.5
        if action.step is ActionStep.RECYCLE:
            fake.epoch += 1
        else:
            self.exit_container(pod.name)

    def exit_container(self, name: str) -> None:
        """PID 1 ends; the kubelet starts it again."""
        pod = self.pods[name]
        fake = self.fakes[pod.uid]
        fake.boot, fake.epoch = fake.boot + 1, 0
        if not self.volume:
            fake.action = None
        self.pods[name] = replace(
            pod,
            ready=False,
            ready_changed_at=self.now,
            unready_since=self.now,
            agent_running_since=None,
            agent_finished_at=self.now,
            restart_count=pod.restart_count + 1,
        )

    def forget(self) -> None:
        """The operator's process ends: facts are lost, objects stay."""
        self.agents.clear()
        self.answers.clear()

    def _record(self, pod: Pod, fake: FakeAgent, step: str, restart_id: str) -> None:
        life = (pod.uid, fake.boot, fake.epoch)
        self.executions.append(Execution(pod.name, life, step, restart_id, self.now))

    # --- carrying out -----------------------------------------------------------------------------

    def apply(self, planned: Plan, stop_after: int | None = None, times: int = 1) -> None:
        """Carry out the first actions of a plan, each so many times; a conflict ends it."""
        for action in planned.actions[:stop_after]:
            for _ in range(times):
                try:
                    self._carry_out(action)
                except Conflict:
                    if times == 1:
                        return

    def settle(self, rounds: int = 12) -> int:
        """Plan and apply until there is nothing to do; returns how many plans did something."""
        for done in range(rounds):
            planned = self.plan()
            if not planned.actions:
                return done
            self.apply(planned)
        raise AssertionError(f"still planning after {rounds} rounds: {self.plan().actions}")

    def run(self, seconds: float, step: float = 10.0) -> None:
        """Let time pass and reconcile, again and again."""
        while seconds > 0:
            self.pass_time(min(step, seconds))
            seconds -= step
            self.settle()

    def _carry_out(self, action: Action) -> None:  # noqa: PLR0912 - one branch for each action
        self.version += 1
        version = str(self.version)
        match action:
            case EnsureObject():
                self._ensure(action)
            case AnnotateWorkload():
                merged = {**self.workload.annotations, **action.annotations}
                self.workload = replace(self.workload, annotations=merged)
            case PushConfig():
                self._push(action)
            case CreateRestart():
                self._create(action, version)
            case PatchRestartStatus():
                known = self.restarts[action.name]
                if (known.uid, known.resource_version) != (action.uid, action.resource_version):
                    raise Conflict
                status = decode(encode(action.status), RestartStatus)
                self.restarts[action.name] = replace(known, status=status, resource_version=version)
            case PatchWorkloadStatus():
                status_ = decode(encode(action.status), WorkloadStatus)
                self.workload = replace(self.workload, status=status_, resource_version=version)
            case CallRecycle():
                self._call(action, ActionStep.RECYCLE)
            case CallRestart():
                self._call(action, ActionStep.IN_PLACE)
            case DryRunEvict():
                self._ask(action.pod, dry_run=True)
            case Evict():
                if self._ask(action.pod, dry_run=False):
                    self.replace_pod(action.pod.name)
            case DeletePod():
                self.replace_pod(action.pod.name)
            case DeleteRestart():
                self.restarts.pop(action.name, None)

    def _ensure(self, action: EnsureObject) -> None:
        manifest = action.manifest
        kind, metadata = manifest["kind"], manifest["metadata"]
        annotations = metadata.get("annotations", {})
        if kind == "Deployment":
            self.template_hash = annotations.get(CONTENT_HASH_ANNOTATION, self.template_hash)
            return
        owners = metadata.get("ownerReferences", [])
        self.objects[kind, metadata["name"]] = OwnedObject(
            kind=kind,
            name=metadata["name"],
            owner_uid=owners[0]["uid"] if owners else "",
            content_hash=annotations[CONTENT_HASH_ANNOTATION],
        )

    def _push(self, action: PushConfig) -> None:
        generation = action.config.metadata.generation
        fake = self.fakes[action.pod.uid]
        if not fake.silent:
            fake.generation = generation
        status = 0 if fake.silent else 200
        known = self.agents.get(action.pod.uid, Agent(pod_uid=action.pod.uid))
        answer = PushAnswer(generation=generation, at=self.now, status=status)
        self.agents[action.pod.uid] = replace(known, push=answer)

    def _create(self, action: CreateRestart, version: str) -> None:
        metadata = action.manifest["metadata"]
        if metadata["name"] in self.restarts:
            return
        self.restarts[metadata["name"]] = Restart(
            name=metadata["name"],
            uid=f"uid-{version}",
            resource_version=version,
            created=self.now.replace(microsecond=0),
            spec=decode(action.manifest["spec"], RestartSpec),
            status=RestartStatus(),
            annotations=metadata["annotations"],
            labels=metadata["labels"],
        )

    def add_restart(self, name: str, pod: str, **fields: object) -> None:
        """A person creates a restart by hand."""
        self.version += 1
        spec = RestartSpec(workload="speech", pod=PodRef(name=pod), **fields)  # type: ignore[arg-type]
        self.restarts[name] = Restart(
            name=name,
            uid=f"uid-{self.version}",
            resource_version=str(self.version),
            created=self.now,
            spec=spec,
            status=RestartStatus(),
        )

    def _call(self, action: CallRecycle | CallRestart, step: ActionStep) -> None:
        fake, pod = self.fakes.get(action.pod.uid), self.pods.get(action.pod.name)
        if fake is None or pod is None:
            return
        reachable = not fake.silent and pod.agent_running_since is not None
        if reachable and (fake.action is None or fake.action.restart_id != action.restart_id):
            fake.action = ActionReport(
                restart_id=action.restart_id,
                step=step,
                state=ActionState.ACTING,
                at=rfc3339(self.now),
            )
        known = self.agents.get(action.pod.uid, Agent(pod_uid=action.pod.uid))
        answer = CallAnswer(
            restart_id=action.restart_id, step=step, at=self.now, status=202 if reachable else 0
        )
        self.agents[action.pod.uid] = replace(known, calls=(*known.calls, answer)[-8:])

    def _ask(self, pod: Pod, *, dry_run: bool) -> bool:
        there = pod.name in self.pods and self.pods[pod.name].uid == pod.uid
        verdict = EvictionVerdict.ALLOWED if self.budget_allows else EvictionVerdict.BLOCKED
        self.answers[pod.uid] = EvictionAnswer(
            pod_uid=pod.uid,
            at=self.now,
            verdict=verdict if there else EvictionVerdict.GONE,
            dry_run=dry_run,
            blocker="" if self.budget_allows else "one-at-least",
            message="" if self.budget_allows else "needs 1 healthy pods and has 1 currently",
        )
        return there and self.budget_allows

    def replace_pod(self, name: str) -> None:
        """The pod goes, and its owner makes another."""
        pod = self.pods.pop(name)
        fake = self.fakes[pod.uid]
        self._record(pod, fake, "Evict", "")
        self.evicted.append(pod.uid)
        self.version += 1
        new = make_pod(
            f"{name}x",
            uid=f"uid-{self.version}",
            created=self.now.replace(microsecond=0),
            ready=False,
            ready_changed_at=self.now,
            agent_running_since=None,
        )
        self.pods[new.name] = new
        self.fakes[new.uid] = FakeAgent(generation=self.workload.generation)

    # --- what must always hold --------------------------------------------------------------------

    def check(self) -> None:
        """Assert the safety rules."""
        lives = [one.life for one in self.executions]
        assert len(lives) == len(set(lives)), f"one life was ended twice: {self.executions}"
        ids = [one.restart_id for one in self.executions if one.restart_id]
        assert len(ids) == len(set(ids)), f"one restart ID was carried out twice: {ids}"
        open_pods = [
            one.spec.pod.uid for one in self.restarts.values() if not is_finished(one.status)
        ]
        decided = [uid for uid in open_pods if uid]
        assert len(decided) == len(set(decided)), "a pod has two open restarts"

    def active(self) -> list[Restart]:
        return [one for one in self.restarts.values() if is_active(one.status)]

    def finished(self) -> list[Restart]:
        return [one for one in self.restarts.values() if is_finished(one.status)]
