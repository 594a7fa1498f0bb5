"""Deciding that a pod is to be restarted: residual, schedule or annotation.

Why it exists: every restart begins here (or by hand), with a reason, under a name that another
operator would choose too. Called by ``planning`` after the open restarts had their turn. A restart
is only written down here; ``admission`` says when it goes.

A trigger asks for a pod once:

* Residual: once per boot and epoch of the agent and end of the pod's last restart;
* Scheduled: once per run and pod, unless its container started after the run;
* Manual: once per value of the annotation and pod, for the pods that were there when the first of
  them was decided. The handled value is kept in an annotation beside it, so that neither the
  removal of old restarts nor new pods bring it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from vram_operator.api import (
    API_VERSION,
    RESTART_ANNOTATION,
    RESTART_KIND,
    WORKLOAD_LABEL,
    PodRef,
    Reason,
    RestartSpec,
    RestartTrigger,
    encode,
)
from vram_operator.core.admission import find_leave
from vram_operator.core.breaker import GENERATION_ANNOTATION, is_degraded, say_degraded
from vram_operator.core.evidence import COLLECTING, EvidenceReason
from vram_operator.core.figures import say_jitter, show_time
from vram_operator.core.phases import concerns, is_finished
from vram_operator.core.plan import Action, AnnotateWorkload, Blocked, CreateRestart
from vram_operator.core.resources import owner_reference
from vram_operator.core.schedule import (
    is_open,
    last_run,
    next_opening,
    next_run,
    starting_deadline,
)
from vram_operator.core.snapshot import Pod, Restart
from vram_operator.core.turn import earliest
from vram_operator.core.visit import Visit

HANDLED_ANNOTATION = "vram.dev/restart-handled"
"""On the workload: the last value of ``vram.dev/restart`` that all pods were restarted for."""

FORESEEN_EVERY = timedelta(minutes=10)
"""In an open window a residual is asked so often where it leads, whatever news comes of it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """That a pod is to be restarted. ``at`` is the trigger time, whatever it is made of."""

    pod: Pod
    trigger: RestartTrigger
    at: str
    reason: str
    scheduled_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What was decided, and what follows for the workload's status."""

    actions: tuple[Action, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    next_restart_time: datetime | None = None
    missed_run: datetime | None = None
    requeue_at: datetime | None = None


@dataclass(slots=True)
class _Draft:
    """Decisions while they are collected, one for each pod at most."""

    decided: dict[str, Decision] = field(default_factory=dict)
    blocked: list[Blocked] = field(default_factory=list)
    requeue: list[datetime | None] = field(default_factory=list)


def decide_restarts(visit: Visit) -> Decisions:
    """Decide on new restarts, given the old ones as their turns have left them.

    1. A refused spec decides nothing.
    2. A pod with an open restart gets no other.
    3. What a person asked for goes before the schedule, and that before the residual.
    """
    if visit.refusal is not None:  # 1
        return Decisions()
    restarts, draft = visit.snapshot.restarts, _Draft()
    free = tuple(pod for pod in visit.pods if not _has_open(restarts, pod))  # 2
    annotate = _decide_manual(visit, free, draft)  # 3
    next_time, missed = _decide_scheduled(visit, free, draft)
    _decide_residual(visit, free, draft)
    decisions = sorted(draft.decided.values(), key=lambda one: one.pod.name)
    creates = tuple(_create(visit, decision) for decision in decisions)
    return Decisions(
        actions=(*creates, *annotate),
        blocked=tuple(draft.blocked),
        next_restart_time=next_time,
        missed_run=missed,
        requeue_at=earliest(draft.requeue),
    )


def restart_name(visit: Visit, decision: Decision) -> str:
    """Return the name that every operator would give this restart: creating it is the lock."""
    report = visit.agent_of(decision.pod.uid).report
    boot = "" if report is None else f"{report.agent.boot_id}/{report.agent.epoch}"
    workload = visit.snapshot.workload
    parts = (workload.uid, decision.pod.uid, boot, decision.trigger, decision.at)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
    return f"{workload.name}-{digest}"


def _has_open(restarts: tuple[Restart, ...], pod: Pod) -> bool:
    return any(concerns(one, pod) and not is_finished(one.status) for one in restarts)


def _decide_manual(visit: Visit, free: tuple[Pod, ...], draft: _Draft) -> Iterator[Action]:
    """Decide for a new value of the annotation.

    1. The value was handled, or there is none.
    2. The workload was never seen before: nobody asked for its present pods to be restarted.
    3. Pods that had no restart for it and were there when the first was decided get one.
    4. When no pod is left that still has to wait for its turn, the value is handled.
    """
    workload = visit.snapshot.workload
    value = workload.annotations.get(RESTART_ANNOTATION, "")
    if not value or workload.annotations.get(HANDLED_ANNOTATION) == value:  # 1
        return iter(())
    handled = AnnotateWorkload(annotations={HANDLED_ANNOTATION: value})
    if not workload.status.conditions:  # 2
        return iter((handled,))
    mine = [
        one for one in visit.snapshot.restarts if one.annotations.get(RESTART_ANNOTATION) == value
    ]
    began = min((one.created for one in mine), default=None)
    done = {one.spec.pod.uid for one in mine}
    open_names = {pod.name for pod in visit.pods} - {pod.name for pod in free}
    waiting = False
    for pod in visit.pods:  # 3
        if pod.uid in done or (began is not None and _started(pod) > began):
            continue
        if pod.name in open_names:
            waiting = True
            continue
        reason = f"annotation {RESTART_ANNOTATION}: {value}"
        draft.decided[pod.uid] = Decision(pod, RestartTrigger.MANUAL, value, reason)
    return iter(() if waiting else (handled,))  # 4


def _started(pod: Pod) -> datetime:
    """Return since when the pod's agent runs, as far as is known."""
    return max(pod.created, pod.agent_running_since or pod.created)


def _decide_scheduled(
    visit: Visit, free: tuple[Pod, ...], draft: _Draft
) -> tuple[datetime | None, datetime | None]:
    """Decide for the latest run that is due; return the next run and one that was missed.

    A run is due when it was announced in ``status.nextRestartTime``, so that a new schedule, a new
    workload and the end of a suspension start nothing for times that are past.

    1. No schedule, or suspended: nothing is announced.
    2. Nothing was announced yet, or the schedule changed: the next run is.
    3. The announced run is still to come, its spread included: wait.
    4. The latest run is past its starting deadline: it is missed.
    5. Pods whose container has not started since, and that had no restart for it, get one.
    6. The next run is announced when no pod waits for its turn any more.
    """
    schedule, announced = visit.timetable.runs, visit.snapshot.workload.status.next_restart_time
    if schedule is None or visit.policy.suspend:  # 1
        return None, None
    following = next_run(schedule, visit.now)
    if announced is None or last_run(schedule, announced - _TICK, announced) is None:  # 2
        draft.requeue.append(following)
        return following, None
    jitter = visit.jitter
    due = last_run(schedule, announced - _TICK, visit.now - jitter)
    if due is None:  # 3
        # A schedule that was made denser has a run before the announced one.
        sooner = min(announced, following or announced)
        draft.requeue.append(sooner + jitter)
        return sooner, None
    if visit.now > starting_deadline(due, visit.policy, jitter):  # 4
        draft.requeue.append(following)
        return following, due
    waiting = False
    for pod in visit.pods:  # 5
        if _started(pod) > due or _had_run(visit, pod, due) or pod.uid in draft.decided:
            continue
        if pod not in free:
            waiting = True
            continue
        reason = f"schedule {schedule.expression} in {schedule.zone.key}" + say_jitter(jitter)
        at = show_time(due)
        draft.decided[pod.uid] = Decision(pod, RestartTrigger.SCHEDULED, at, reason, due)
    if waiting:  # 6
        draft.requeue.append(starting_deadline(due, visit.policy, jitter) + _TICK)
        return announced, None
    draft.requeue.append(None if following is None else following + jitter)
    return following, None


_TICK = timedelta(seconds=1)


def _had_run(visit: Visit, pod: Pod, run: datetime) -> bool:
    return any(
        one.spec.pod.uid == pod.uid and one.spec.scheduled_time == run
        for one in visit.snapshot.restarts
    )


def _decide_residual(visit: Visit, free: tuple[Pod, ...], draft: _Draft) -> None:
    """Decide for pods whose evidence suffices and that nothing keeps from it."""
    degraded = is_degraded(visit)
    for pod in free:
        evidence = visit.evidence_of(pod)
        if evidence is None or pod.uid in draft.decided:
            continue
        if evidence.reason in COLLECTING:
            draft.requeue.append(evidence.requeue_at)
        if evidence.reason is EvidenceReason.BELOW_THRESHOLD:
            draft.requeue.append(_next_foresight(visit))
        if not evidence.is_sufficient:
            continue
        wait = find_leave(visit, pod, RestartTrigger.RESIDUAL)
        if wait is None and degraded:
            reason, message = Reason.RESTARTS_DO_NOT_HELP, say_degraded(visit)
            draft.blocked.append(Blocked(pod=pod.name, restart="", reason=reason, message=message))
        elif wait is not None:
            draft.requeue.append(wait.requeue_at)
            draft.blocked.append(
                Blocked(pod=pod.name, restart="", reason=wait.reason, message=wait.message)
            )
        else:
            at = _last_word_of(visit, pod)
            draft.decided[pod.uid] = Decision(pod, RestartTrigger.RESIDUAL, at, evidence.message)


def _next_foresight(visit: Visit) -> datetime | None:
    """Return when to ask again whether a pod has to be restarted before its window closes."""
    windows = visit.timetable.windows
    if not windows:
        return None
    return (
        visit.now + FORESEEN_EVERY
        if is_open(windows, visit.now)
        else next_opening(windows, visit.now)
    )


def _last_word_of(visit: Visit, pod: Pod) -> str:
    """Return when the pod's last restart ended, whatever its outcome; empty for none.

    One that was skipped counts too: the next must not bear its name.
    """
    ends = (one.status.completion_time for one in visit.snapshot.restarts if concerns(one, pod))
    last = max((end for end in ends if end is not None), default=None)
    return "" if last is None else show_time(last)


def _create(visit: Visit, decision: Decision) -> CreateRestart:
    workload, pod = visit.snapshot.workload, decision.pod
    annotations = {GENERATION_ANNOTATION: str(workload.generation)}
    if decision.trigger is RestartTrigger.MANUAL:
        annotations[RESTART_ANNOTATION] = decision.at
    spec = RestartSpec(
        workload=workload.name,
        pod=PodRef(name=pod.name, uid=pod.uid),
        trigger=decision.trigger,
        scheduled_time=decision.scheduled_time,
        method=visit.policy.method,
        drain_timeout_seconds=visit.policy.drain_timeout_seconds,
        reason=decision.reason[:1024],
    )
    manifest: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": RESTART_KIND,
        "metadata": {
            "name": restart_name(visit, decision),
            "namespace": workload.namespace,
            "labels": {WORKLOAD_LABEL: workload.name},
            "annotations": annotations,
            "ownerReferences": [owner_reference(workload)],
        },
        # Said even where they are defaults: this is a record that people read.
        "spec": {"trigger": str(spec.trigger), "method": str(spec.method), **encode(spec)},
    }
    return CreateRestart(manifest=manifest)
