"""Everything that one reconcile of one workload sees, frozen at one moment.

Why it exists: deciding is only testable, repeatable and explainable when all that it rests on is
one value. ``gather`` builds a Snapshot from watches, agent reports and what earlier calls
answered; ``plan(snapshot, now)`` reads it. Nothing here reads anything itself, knows a clock, or
holds a client. All times are aware UTC datetimes; bytes are bytes.

Rules for whoever gathers:

* objects are as the apiserver last showed them, our own writes included (read your writes);
* ``Agent`` hears reports through :func:`hear`, and its history grows through nothing else;
* answers to calls (``PushAnswer``, ``CallAnswer``, ``EvictionAnswer``) are facts of this process:
  they may be lost at a crash, and the plan then asks again, which changes nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from vram_agent.protocol import ActionStep, DeviceKind, ModelState, Report, ResidualSource

from vram_operator.api import RestartSpec, RestartStatus, WorkloadSpec, WorkloadStatus
from vram_operator.core.trend import NO_TRACK, Point, Track, extend_track

MAX_SAMPLES = 1024
"""Most residual samples kept of one pod; beyond it the older half is thinned out."""

FINISHED_PHASES = frozenset({"Succeeded", "Failed"})
"""Phases of pods that have ended: they hold no memory, and no agent runs in them."""

_MOVING = frozenset({ModelState.LOADING, ModelState.OFFLOADING, ModelState.RESTORING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The operator's flags, as far as decisions rest on them.

    ``max_concurrent_restarts`` is a number or a percentage as text, such as ``10%``.
    """

    agent_image: str
    max_concurrent_restarts: str = "10%"
    schedule_jitter_seconds: float = 30.0
    restart_ttl_seconds: float = 7 * 86_400.0
    poll_interval_seconds: float = 10.0
    allow_delete: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A GPUModelWorkload: what is wanted, and what we last said of it."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: datetime
    spec: WorkloadSpec
    status: WorkloadStatus
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One pod that carries the workload's label.

    ``control_port`` is resolved: the container port named ``control``, else the annotation
    ``vram.dev/control-port``, else 0 for none. ``ready_changed_at`` is the Ready condition's
    lastTransitionTime. ``unready_since`` is when Ready last turned false as far as the watch saw
    it, and stays after it turned true again; ``agent_finished_at`` is the agent container's
    lastState.terminated.finishedAt. ``agent_running_since`` is its state.running.startedAt, None
    while it does not run.
    """

    name: str
    uid: str
    resource_version: str
    created: datetime
    ip: str = ""
    node: str = ""
    phase: str = "Running"
    ready: bool = False
    ready_changed_at: datetime | None = None
    unready_since: datetime | None = None
    terminating: bool = False
    agent_running_since: datetime | None = None
    agent_finished_at: datetime | None = None
    restart_count: int = 0
    control_port: int = 0
    owner_kind: str = ""
    owner_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_present(self) -> bool:
        """Is it there to stay? One that ended (evicted by its node, say) only waits for removal."""
        return not self.terminating and self.phase not in FINISHED_PHASES


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The Deployment or StatefulSet that owns the pods, and how far its rollout is.

    ``annotations`` are its own; without ``vram.dev/content-hash`` the plan applies it again.
    ``replicas`` is what its spec wants; ``current``, ``updated``, ``available`` come from its
    status. ``to_update`` is how many pods its strategy brings to the newest template by itself,
    None for all of them. ``selector`` is its label selector as text, for the scale subresource.
    """

    kind: str
    name: str
    uid: str
    generation: int
    observed_generation: int
    replicas: int
    current: int
    updated: int
    available: int
    to_update: int | None = None
    paused: bool = False
    selector: str = ""
    owner_uid: str = ""
    owner_kind: str = ""
    owner_name: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    template_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedObject:
    """A Service or ConfigMap of the workload's name, or the namespace's trust ConfigMap.

    ``content_hash`` is its annotation ``vram.dev/content-hash``; empty makes the plan apply it
    again, which is how whoever gathers asks for a repair of drift.
    """

    kind: str
    name: str
    owner_uid: str = ""
    content_hash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualSample:
    """What one report says of the residual. ``context_bytes`` no restart can give back."""

    boot_id: str
    epoch: int
    observed_at: datetime
    received_at: datetime
    residual_bytes: int
    context_bytes: int
    source: ResidualSource
    idle: bool
    in_flight: int
    moving: bool
    """A model is loading, restoring or being offloaded."""

    @property
    def quiet(self) -> bool:
        """Nothing runs, waits or moves, so the residual is no passing peak."""
        return self.idle and self.in_flight == 0 and not self.moving


@dataclass(frozen=True, slots=True, kw_only=True)
class PushAnswer:
    """What an agent answered to the last ``PUT /config``; status 0: it could not be reached."""

    generation: int
    at: datetime
    status: int
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAnswer:
    """What an agent answered to ``POST /recycle`` or ``/restart``; status 0: not reached."""

    restart_id: str
    step: ActionStep
    at: datetime
    status: int
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """What is known of the agent in one pod: its latest report, history and answers.

    ``refuses`` is true when it last answered 401 or 403 to a signed call, ``refused_at`` when it
    did; ``error`` says why the last poll failed, empty when it did not. ``gpus`` are the UUIDs of
    all GPUs that it ever reported, ``gpus_missing_since`` since when not all are reported.
    """

    pod_uid: str
    report: Report | None = None
    received_at: datetime | None = None
    history: tuple[ResidualSample, ...] = ()
    track: Track = NO_TRACK
    gpus: frozenset[str] = frozenset()
    gpus_missing_since: datetime | None = None
    refuses: bool = False
    refused_at: datetime | None = None
    error: str = ""
    push: PushAnswer | None = None
    calls: tuple[CallAnswer, ...] = ()


class EvictionVerdict(StrEnum):
    """What the Eviction API says of one pod."""

    ALLOWED = "Allowed"  # 201
    BLOCKED = "Blocked"  # 429 with cause DisruptionBudget, or 500 for two budgets
    CONFLICT = "Conflict"  # 409: the preconditions do not hold any more
    GONE = "Gone"  # 404
    FAILED = "Failed"  # anything else, throttling included


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionAnswer:
    """The answer to the last eviction of a pod, dry run or real. ``blocker`` names the budget."""

    pod_uid: str
    at: datetime
    verdict: EvictionVerdict
    dry_run: bool = True
    blocker: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """A GPUPodRestart, open or finished."""

    name: str
    uid: str
    resource_version: str
    created: datetime
    spec: RestartSpec
    status: RestartStatus
    generation: int = 1
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveRestart:
    """An admitted, unfinished GPUPodRestart of any workload: it takes a place under the cap."""

    namespace: str
    name: str
    workload: str
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another workload of the namespace that names the same Deployment or StatefulSet."""

    name: str
    created: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Facts beyond this workload."""

    total_pods: int
    """Pods of all workloads; a percentage of concurrent restarts counts from it."""
    active_restarts: tuple[ActiveRestart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of one workload. The order of its tuples carries no meaning."""

    settings: Settings
    cluster: Cluster
    workload: Workload
    public_keys: str
    """PEM of the current and the previous public key, for the namespace's trust ConfigMap."""
    apply_error: str = ""
    """What the apiserver said when it refused a generated object of this generation for good."""
    target: Target | None = None
    namesake_kind: str = ""
    """The other kind of target, where there is one of the name that ``targetRef`` has."""
    objects: tuple[OwnedObject, ...] = ()
    pods: tuple[Pod, ...] = ()
    agents: tuple[Agent, ...] = ()
    restarts: tuple[Restart, ...] = ()
    evictions: tuple[EvictionAnswer, ...] = ()
    rivals: tuple[Rival, ...] = ()

    def find_pod(self, uid: str) -> Pod | None:
        """Return the pod of this UID."""
        return next((pod for pod in self.pods if pod.uid == uid), None)

    def find_object(self, kind: str, name: str) -> OwnedObject | None:
        """Return the Service or ConfigMap of this name."""
        return next((o for o in self.objects if (o.kind, o.name) == (kind, name)), None)

    def find_eviction(self, pod_uid: str) -> EvictionAnswer | None:
        """Return the latest answer of the Eviction API for this pod."""
        answers = [answer for answer in self.evictions if answer.pod_uid == pod_uid]
        return max(answers, key=lambda answer: answer.at, default=None)


def parse_time(text: str) -> datetime:
    """Return an RFC 3339 time as an aware datetime. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; write for example 2026-01-01T00:00:00Z")
    return moment


def sample_of(report: Report, received_at: datetime) -> ResidualSample:
    """Return what a report says of the residual. Raises ValueError when its time is no time."""
    return ResidualSample(
        boot_id=report.agent.boot_id,
        epoch=report.agent.epoch,
        observed_at=parse_time(report.observed_at),
        received_at=received_at,
        residual_bytes=report.memory.residual_bytes,
        context_bytes=report.memory.classes.context_and_libraries,
        source=report.memory.source,
        idle=report.idle,
        in_flight=sum(model.in_flight + model.queued for model in report.models),
        moving=any(model.state in _MOVING for model in report.models),
    )


def extend_history(
    history: tuple[ResidualSample, ...], sample: ResidualSample, keep_seconds: float
) -> tuple[ResidualSample, ...]:
    """Return the history with one more sample, oldest first.

    A sample that was not observed later than the last one of its boot and epoch is no new one: an
    agent that answers without measuring grows stale. Samples older than ``keep_seconds`` go, and
    so do those of another boot or epoch: they prove nothing of this one.
    """
    kept = tuple(
        old
        for old in history
        if (old.boot_id, old.epoch) == (sample.boot_id, sample.epoch)
        and sample.received_at - old.received_at <= timedelta(seconds=keep_seconds)
    )
    if kept and sample.observed_at <= kept[-1].observed_at:
        return kept
    if len(kept) >= MAX_SAMPLES:
        half = len(kept) // 2
        kept = kept[:half:2] + kept[half:]
    return (*kept, sample)


def hear(agent: Agent, report: Report, at: datetime, keep_seconds: float) -> Agent:
    """Return what is known of the agent after a report that came at ``at``.

    Raises ValueError when the report's time is no time.
    """
    sample = sample_of(report, at)
    present = gpus_of(report)
    is_complete = agent.gpus <= present
    return replace(
        agent,
        report=report,
        received_at=at,
        history=extend_history(agent.history, sample, keep_seconds),
        track=extend_track(agent.track, (sample.boot_id, sample.epoch), _point_of(report, sample)),
        gpus=agent.gpus | present,
        gpus_missing_since=None if is_complete else agent.gpus_missing_since or at,
        error="",
    )


def gpus_of(report: Report) -> frozenset[str]:
    """Return the UUIDs of the GPUs and slices in a report."""
    return frozenset(one.uuid for one in report.devices if one.kind is not DeviceKind.CPU)


def _point_of(report: Report, sample: ResidualSample) -> Point | None:
    """Return what a report says of the trend; None when its residual may be a passing one.

    Which device a leak grows on is not known, so the one with the least room counts.
    """
    if not sample.quiet or sample.source is ResidualSource.UNKNOWN:
        return None
    free = (device.total_bytes - device.used_bytes for device in report.devices)
    room = min(free, default=None)
    limit = 0 if room is None else sample.residual_bytes + max(0, room)
    return Point(sample.observed_at, sample.residual_bytes, limit)
