"""One visit to a workload: the snapshot, the moment, and whether the spec can be acted on.

Why it exists: what every later decision asks for (Accepted or not, the timetable, how old a report
may be) is found once, in one place. Called by ``planning`` first; read by all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from vram_agent.protocol import Report, parse_quantity

from vram_operator.api import (
    WORKLOAD_KIND,
    WORKLOAD_LABEL,
    Reason,
    RestartMethod,
    RestartOutcome,
    RestartPolicy,
)
from vram_operator.core.evidence import Evidence, fresh_seconds, silent_seconds, weigh_evidence
from vram_operator.core.forecast import Outlook, weigh_forecast
from vram_operator.core.phases import concerns
from vram_operator.core.podspec import InvalidTemplateError
from vram_operator.core.resources import make_deployment
from vram_operator.core.schedule import (
    InvalidScheduleError,
    Timetable,
    next_run,
    parse_timetable,
    spread,
)
from vram_operator.core.snapshot import Agent, Pod, Restart, Snapshot, gpus_of
from vram_operator.core.targets import is_of_another

GPU_IS_LOST = timedelta(seconds=30)
"""A GPU that reports leave out for so long is gone from the node."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the spec is not acted on; becomes ``Accepted=False``."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What all decisions about one workload at one moment share."""

    snapshot: Snapshot
    now: datetime
    timetable: Timetable
    refusal: Refusal | None
    pods: tuple[Pod, ...]
    """The pods of the target that are there to stay, by name."""
    strays: tuple[Pod, ...]
    """Pods that carry the workload's label and are run by something else: left alone."""
    agents: Mapping[str, Agent]
    """What is known of agents, by the UID of their pods."""
    _weighed: dict[str, Evidence | None] = field(default_factory=dict, compare=False, repr=False)
    """Evidence by pod, weighed once a visit: conditions, triggers and admission all ask for it."""

    @property
    def policy(self) -> RestartPolicy:
        """``spec.restart``."""
        return self.snapshot.workload.spec.restart

    @property
    def dry_run(self) -> bool:
        """Is nothing to be restarted, by spec or flag?"""
        return self.policy.dry_run or self.snapshot.settings.dry_run

    @property
    def threshold_bytes(self) -> int | None:
        """The residual above which a pod is restarted; None without one."""
        residual = self.policy.residual
        return None if residual is None else parse_quantity(residual.threshold)

    @property
    def fresh(self) -> timedelta:
        """For how long a report may be acted on."""
        return timedelta(seconds=fresh_seconds(self.snapshot.settings.poll_interval_seconds))

    @property
    def silent(self) -> timedelta:
        """After how long without a report an agent counts as silent."""
        return timedelta(seconds=silent_seconds(self.snapshot.settings.poll_interval_seconds))

    def with_restarts(self, restarts: tuple[Restart, ...]) -> Visit:
        """Return the visit with the restarts as this visit leaves them."""
        return replace(self, snapshot=replace(self.snapshot, restarts=restarts), _weighed={})

    def agent_of(self, pod_uid: str) -> Agent:
        """Return what is known of the pod's agent; one that says nothing when nothing is."""
        return self.agents.get(pod_uid) or Agent(pod_uid=pod_uid)

    def fresh_report(self, agent: Agent) -> Report | None:
        """Return the agent's report if it may be acted on."""
        if agent.received_at is None or self.now - agent.received_at > self.fresh:
            return None
        return agent.report

    def lost_gpus(self, pod: Pod) -> tuple[str, ...]:
        """Return the GPUs that the pod had and that its node does not have any more.

        One that a report or two leave out is not lost: a driver may be slow to answer.
        """
        agent = self.agent_of(pod.uid)
        report, since = self.fresh_report(agent), agent.gpus_missing_since
        if report is None or since is None or self.now - since < GPU_IS_LOST:
            return ()
        return tuple(sorted(agent.gpus - gpus_of(report)))

    def evidence_of(self, pod: Pod) -> Evidence | None:
        """Weigh the pod's residual, as it is and as it will be; None without a residual policy."""
        if pod.uid not in self._weighed:
            self._weighed[pod.uid] = self._weigh(pod)
        return self._weighed[pod.uid]

    def _weigh(self, pod: Pod) -> Evidence | None:
        policy, threshold = self.policy.residual, self.threshold_bytes
        if policy is None or threshold is None:
            return None
        agent = self.agent_of(pod.uid)
        evidence = weigh_evidence(agent, policy, self.fresh.total_seconds(), self.now)
        outlook = Outlook(
            windows=self.timetable.windows,
            next_run=self.next_run,
            threshold_bytes=threshold,
            for_seconds=policy.for_seconds,
            fresh_since=self.fresh_since(pod),
            now=self.now,
        )
        return weigh_forecast(evidence, agent, outlook)

    @property
    def jitter(self) -> timedelta:
        """By how much later than its schedule the workload's runs start."""
        settings = self.snapshot.settings
        return spread(self.snapshot.workload.uid, settings.schedule_jitter_seconds)

    @property
    def next_run(self) -> datetime | None:
        """When the schedule restarts the pods next; None without one, or while it is suspended."""
        runs = self.timetable.runs
        return None if runs is None or self.policy.suspend else next_run(runs, self.now)

    def fresh_since(self, pod: Pod) -> datetime:
        """Return when the pod was last made anew: it started, or a restart of it ended.

        A dry run counts, since it stands for one.
        """
        ends = (
            restart.status.completion_time
            for restart in self.snapshot.restarts
            if concerns(restart, pod)
            and (
                restart.status.start_time is not None
                or restart.status.outcome is RestartOutcome.DRY_RUN
            )
        )
        started = pod.agent_running_since or pod.created
        return max([pod.created, started, *(end for end in ends if end is not None)])


def begin_visit(snapshot: Snapshot, now: datetime) -> Visit:
    """Return the visit; total: whatever is wrong with the spec becomes a refusal.

    The rules, in order; the first that applies is said:

    1. the schedules, windows and time zones parse;
    2. method Delete needs --allow-delete;
    3. no older workload names the same target, and none runs it;
    4. with targetRef: the target exists and its pods carry the label;
    5. with template: there is an image, the template is one, no foreign object has its name;
    6. and the apiserver took what was generated.
    """
    timetable = Timetable(None, ())
    refusal = None
    try:
        timetable = parse_timetable(snapshot.workload.spec.restart)
    except InvalidScheduleError as error:  # 1
        refusal = Refusal(Reason.INVALID_SCHEDULE, str(error))
    refusal = (
        refusal
        or _refuse_delete(snapshot)
        or _refuse_conflict(snapshot)
        or _refuse_target(snapshot)
        or _refuse_template(snapshot)
    )
    target = snapshot.target
    present = sorted(
        (pod for pod in snapshot.pods if pod.is_present), key=lambda pod: (pod.name, pod.uid)
    )
    strays = tuple(pod for pod in present if target is not None and is_of_another(pod, target))
    return Visit(
        snapshot=snapshot,
        now=now,
        timetable=timetable,
        refusal=refusal,
        pods=tuple(pod for pod in present if pod not in strays),
        strays=strays,
        agents={agent.pod_uid: agent for agent in snapshot.agents},
    )


def _refuse_delete(snapshot: Snapshot) -> Refusal | None:
    method = snapshot.workload.spec.restart.method
    if method is RestartMethod.DELETE and not snapshot.settings.allow_delete:  # 2
        return Refusal(
            Reason.DELETE_NOT_ALLOWED, "restart.method Delete needs the operator's --allow-delete"
        )
    return None


def _refuse_conflict(snapshot: Snapshot) -> Refusal | None:
    workload = snapshot.workload
    elder = min(snapshot.rivals, key=lambda rival: (rival.created, rival.name), default=None)
    if elder is not None and (elder.created, elder.name) < (workload.created, workload.name):  # 3
        return Refusal(
            Reason.CONFLICTED,
            f"GPUModelWorkload {elder.name} is older and names the same target; "
            "delete one of the two",
        )
    target = snapshot.target
    is_reference = workload.spec.target_ref is not None
    if is_reference and target is not None and target.owner_kind == WORKLOAD_KIND:  # 3
        return Refusal(
            Reason.CONFLICTED,
            f"{target.kind} {target.name} is run by the template of GPUModelWorkload "
            f"{target.owner_name}, which watches over it; delete this one",
        )
    return None


def _refuse_target(snapshot: Snapshot) -> Refusal | None:
    workload, target = snapshot.workload, snapshot.target
    ref = workload.spec.target_ref
    if ref is None:
        return None
    if target is None:  # 4
        missing = f"there is no {ref.kind} {ref.name} in namespace {workload.namespace}"
        other = snapshot.namesake_kind
        hint = (
            f"there is a {other} of that name: make the workload anew with targetRef.kind {other}"
            if other
            else "it is looked for again and again; targetRef itself cannot be changed"
        )
        return Refusal(Reason.TARGET_NOT_FOUND, f"{missing}; {hint}")
    label = target.template_labels.get(WORKLOAD_LABEL, "")
    if label != workload.name:  # 4
        instead = f" and carries {label!r} instead" if label else ""
        return Refusal(
            Reason.MISSING_LABEL,
            f"the pod template of {ref.kind} {ref.name} lacks the label "
            f"{WORKLOAD_LABEL}: {workload.name}{instead}; set it in spec.template.metadata.labels, "
            "which rolls the pods once",
        )
    return None


def _refuse_template(snapshot: Snapshot) -> Refusal | None:
    workload, template = snapshot.workload, snapshot.workload.spec.template
    if template is None:
        return None
    image = template.image or snapshot.settings.agent_image
    if not image:  # 5
        return Refusal(
            Reason.INVALID_SPEC, "template.image is empty, and so is the operator's --agent-image"
        )
    try:
        make_deployment(workload, template, image)
    except InvalidTemplateError as error:  # 5
        return Refusal(Reason.INVALID_SPEC, str(error))
    for kind, owner_uid in _named_like(snapshot):  # 5
        if owner_uid != workload.uid:
            return Refusal(
                Reason.CONFLICTED, f"{kind} {workload.name} exists and is not this workload's"
            )
    if snapshot.apply_error:  # 6
        return Refusal(Reason.INVALID_TEMPLATE, snapshot.apply_error)
    return None


def _named_like(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield kind and owner of the objects that bear the workload's name."""
    if snapshot.target is not None:
        yield snapshot.target.kind, snapshot.target.owner_uid
    for object_ in snapshot.objects:
        if object_.name == snapshot.workload.name:
            yield object_.kind, object_.owner_uid
