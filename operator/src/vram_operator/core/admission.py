"""Whether a queued restart may take its next step now, and what it waits for if not.

Why it exists: storms, budgets and back-off are stopped here and nowhere else, before each step and
not only before the first. Called by ``queue_phase``. What it says is the condition ``Admitted``,
the workload's ``RestartBlocked`` and the metric, all with the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import floor

from vram_agent.protocol import AgentMode

from vram_operator.api import (
    MINIMUM_IN_PLACE_COOLDOWN_SECONDS,
    Reason,
    RestartMethod,
    RestartOutcome,
    RestartTrigger,
)
from vram_operator.core.breaker import is_degraded, say_degraded
from vram_operator.core.evidence import EvidenceReason
from vram_operator.core.figures import show_time
from vram_operator.core.phases import concerns, is_active, open_attempt
from vram_operator.core.schedule import is_open, next_opening
from vram_operator.core.snapshot import (
    ActiveRestart,
    EvictionAnswer,
    EvictionVerdict,
    Pod,
    Restart,
)
from vram_operator.core.targets import is_rolling_out, say_rollout
from vram_operator.core.visit import Visit

ANSWER_COUNTS = timedelta(seconds=15)
"""For how long an answer of the Eviction API may be acted on, and when it is asked again."""
IN_PLACE_AGE = timedelta(seconds=MINIMUM_IN_PLACE_COOLDOWN_SECONDS)
IN_LINE = frozenset({Reason.NODE_BUSY, Reason.CONCURRENCY_CAP, Reason.MAX_UNAVAILABLE})
"""Waiting for other restarts to end: what a restart waits for in a storm, now this and now that."""
AGENT_STEPS = frozenset({RestartMethod.RECYCLE, RestartMethod.IN_PLACE})
"""Steps that the agent carries out itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A restart that asks to take a step on a pod, and the restarts that run meanwhile."""

    restart: Restart
    pod: Pod
    method: RestartMethod
    active: tuple[ActiveRestart, ...]
    """The others, of all workloads, those admitted in this visit included."""

    @property
    def is_first(self) -> bool:
        """Has no step been taken yet? One that was impossible from the start does not count."""
        return self.restart.status.start_time is None

    @property
    def trigger(self) -> RestartTrigger:
        """Why the restart was asked for."""
        return self.restart.spec.trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What a candidate waits for. ``ask`` wants a dry-run eviction, whose answer is missing.

    ``figures`` go with the message, and do not make another one of it when they move.
    """

    reason: Reason
    message: str
    figures: str = ""
    requeue_at: datetime | None = None
    ask: bool = False


def find_wait(visit: Visit, candidate: Candidate) -> Wait | None:
    """Return what the candidate waits for first; None when it may go.

    The rules, in order:

    1. the spec is accepted;
    2. no other restart of this pod, or of its node, runs;
    3. suspend, cooldown, windows, the circuit breaker and evidence, for what a person did not ask
       for, before the first step;
    4. no rollout is in progress, and for a step of the agent, the agent reports;
    5. a container that is to exit has run for longer than the kubelet's back-off;
    6. the cluster-wide cap;
    7. maxUnavailable of the workload;
    8. the PodDisruptionBudgets, by a dry-run eviction, for a step that takes a ready pod away.
    """
    rules: tuple[Callable[[Visit, Candidate], Wait | None], ...] = (
        _wait_for_acceptance,  # 1
        _wait_for_node,  # 2
        _wait_for_leave,  # 3
        _wait_for_evidence,  # 3
        _wait_for_rollout,  # 4
        _wait_for_report,  # 4
        _wait_for_age,  # 5
        _wait_for_cap,  # 6
        _wait_for_availability,  # 7
        _wait_for_budgets,  # 8
    )
    return next((wait for rule in rules if (wait := rule(visit, candidate)) is not None), None)


def cooldown_end(visit: Visit, pod: Pod) -> datetime | None:
    """Return until when the pod is left alone after its last restart; None if it is not.

    1. A restart counts that was carried out.
    2. While the dry run lasts, one that it pretended to carry out counts too, for long enough that
    records do not pile up; a real one does not wait for it.
    """
    cooldown, untils = timedelta(seconds=visit.policy.cooldown_seconds), []
    for restart in visit.snapshot.restarts:
        end = restart.status.completion_time
        if end is None or not concerns(restart, pod):
            continue
        if restart.status.start_time is not None:  # 1
            untils.append(end + cooldown)
        elif visit.dry_run and restart.status.outcome is RestartOutcome.DRY_RUN:  # 2
            untils.append(end + max(cooldown, IN_PLACE_AGE))
    until = max(untils, default=None)
    return until if until is not None and until > visit.now else None


def find_leave(visit: Visit, pod: Pod, trigger: RestartTrigger) -> Wait | None:
    """Return why a scheduled or residual restart may not begin; rule 3 without the evidence."""
    if trigger is RestartTrigger.MANUAL:
        return None
    if visit.policy.suspend:
        return Wait(reason=Reason.SUSPENDED, message="restart.suspend is true")
    until = cooldown_end(visit, pod)
    if until is not None:
        return Wait(
            reason=Reason.COOLDOWN,
            message=f"pod {pod.name} is left alone until {show_time(until)}",
            requeue_at=until,
        )
    windows = visit.timetable.windows
    if trigger is RestartTrigger.RESIDUAL and not is_open(windows, visit.now):
        opening = next_opening(windows, visit.now)
        when = "never" if opening is None else f"at {show_time(opening)}"
        return Wait(
            reason=Reason.OUTSIDE_WINDOW,
            message=f"the next window of restart.windows opens {when}",
            requeue_at=opening,
        )
    return None


def concurrency_cap(setting: str, total_pods: int) -> int:
    """Return how many restarts may run at a time; a percentage is of all pods, at least 1."""
    if setting.endswith("%"):
        return max(1, total_pods * int(setting[:-1]) // 100)
    return max(1, int(setting))


def unavailable_limit(setting: int | str, replicas: int) -> int:
    """Return how many pods of a workload may be unavailable, at least 1."""
    if isinstance(setting, str):
        return max(1, floor(replicas * int(setting.removesuffix("%")) / 100))
    return max(1, setting)


def _wait_for_acceptance(visit: Visit, _: Candidate) -> Wait | None:
    if visit.refusal is None:
        return None
    return Wait(reason=visit.refusal.reason, message=visit.refusal.message)


def _wait_for_node(visit: Visit, candidate: Candidate) -> Wait | None:
    pod = candidate.pod
    for restart in visit.snapshot.restarts:
        is_other = restart.uid != candidate.restart.uid
        if is_other and concerns(restart, pod) and is_active(restart.status):
            message = f"restart {restart.name} of the same pod runs"
            return Wait(reason=Reason.NODE_BUSY, message=message)
    for active in candidate.active:
        if active.node and active.node == pod.node:
            message = f"restart {active.namespace}/{active.name} runs on node {pod.node}"
            return Wait(reason=Reason.NODE_BUSY, message=message)
    return None


def _wait_for_leave(visit: Visit, candidate: Candidate) -> Wait | None:
    if not candidate.is_first:
        return None
    return find_leave(visit, candidate.pod, candidate.trigger) or _wait_for_breaker(
        visit, candidate
    )


def _wait_for_breaker(visit: Visit, candidate: Candidate) -> Wait | None:
    """Hold those that were decided, with others at once, before these did not help."""
    if candidate.trigger is not RestartTrigger.RESIDUAL or not is_degraded(visit):
        return None
    return Wait(reason=Reason.RESTARTS_DO_NOT_HELP, message=say_degraded(visit))


def _wait_for_evidence(visit: Visit, candidate: Candidate) -> Wait | None:
    if not candidate.is_first or candidate.trigger is not RestartTrigger.RESIDUAL:
        return None
    evidence = visit.evidence_of(candidate.pod)
    if evidence is None or evidence.is_sufficient:
        return None
    quiet = evidence.reason is not EvidenceReason.NOT_QUIET
    return Wait(
        reason=Reason.NO_EVIDENCE if quiet else Reason.NOT_IDLE,
        message=f"pod {candidate.pod.name}: the evidence does not hold now ({evidence.reason})",
        figures=evidence.message,
        requeue_at=evidence.requeue_at,
    )


def _wait_for_rollout(visit: Visit, _: Candidate) -> Wait | None:
    target = visit.snapshot.target
    if target is None or not is_rolling_out(target):
        return None
    return Wait(reason=Reason.ROLLOUT_IN_PROGRESS, message=say_rollout(target))


def _wait_for_report(visit: Visit, candidate: Candidate) -> Wait | None:
    if candidate.method not in AGENT_STEPS:
        return None
    agent = visit.agent_of(candidate.pod.uid)
    if visit.fresh_report(agent) is not None:
        return None
    return Wait(
        reason=Reason.AGENT_SILENT,
        message=f"the agent of pod {candidate.pod.name} does not report, so it cannot be asked; "
        "a GPUPodRestart with method Evict does without it",
    )


def _wait_for_age(visit: Visit, candidate: Candidate) -> Wait | None:
    if candidate.method is not RestartMethod.IN_PLACE:
        return None
    since = candidate.pod.agent_running_since
    if since is None:
        message = f"the agent's container in pod {candidate.pod.name} is not running"
        return Wait(reason=Reason.TOO_YOUNG, message=message)
    old_enough = since + IN_PLACE_AGE
    if visit.now >= old_enough:
        return None
    return Wait(
        reason=Reason.TOO_YOUNG,
        message=f"pod {candidate.pod.name}: its container runs since {show_time(since)}; an exit "
        f"before {show_time(old_enough)} would count into the kubelet's back-off",
        requeue_at=old_enough,
    )


def _wait_for_cap(visit: Visit, candidate: Candidate) -> Wait | None:
    setting = visit.snapshot.settings.max_concurrent_restarts
    cap = concurrency_cap(setting, visit.snapshot.cluster.total_pods)
    if len(candidate.active) < cap:
        return None
    first = min(candidate.active, key=lambda active: (active.namespace, active.name))
    return Wait(
        reason=Reason.CONCURRENCY_CAP,
        message=f"{cap} of {cap} restarts run",
        # They come and go: what all others wait for would be written anew with each of them.
        figures=f"{first.namespace}/{first.name} among them",
    )


def _wait_for_availability(visit: Visit, candidate: Candidate) -> Wait | None:
    snapshot = visit.snapshot
    replicas = len(visit.pods) if snapshot.target is None else snapshot.target.replicas
    limit = unavailable_limit(visit.policy.max_unavailable, replicas)
    namespace, workload = snapshot.workload.namespace, snapshot.workload.name
    running = {
        active.name
        for active in candidate.active
        if (active.namespace, active.workload) == (namespace, workload)
    }
    restarting = {
        restart.spec.pod.name for restart in snapshot.restarts if restart.name in running
    } - {candidate.pod.name}
    away = {pod.name for pod in visit.pods if not pod.ready} - {candidate.pod.name}
    missing = max(0, replicas - len(visit.pods))
    # A pod that is being replaced is both a running restart and a missing pod: count it once.
    gone = restarting - {pod.name for pod in visit.pods}
    count = len(restarting | away) + max(0, missing - len(gone))
    if count < limit:
        return None
    # A pod that is away for another reason stays the blocker; those that are restarted take turns.
    broken = ", ".join(sorted(away - restarting)[:3]) or (
        "" if restarting else f"{missing} missing"
    )
    unavailable = f"{count} of at most {limit} pods are unavailable"
    return Wait(
        reason=Reason.MAX_UNAVAILABLE,
        message=": ".join(filter(None, (unavailable, broken))),
        figures=", ".join(sorted(restarting)[:3]),
    )


def _wait_for_budgets(visit: Visit, candidate: Candidate) -> Wait | None:
    pod, method = candidate.pod, candidate.method
    takes_away = pod.ready and not _stays_ready(visit, pod, method)
    if not takes_away and method is not RestartMethod.EVICT:
        return None
    hidden = _hidden_disruption(visit, candidate)
    if hidden:
        return Wait(
            reason=Reason.POD_DISRUPTION_BUDGET,
            message=f"restart {hidden} was just admitted; its disruption does not show yet",
        )
    answer = visit.snapshot.find_eviction(pod.uid)
    if answer is None or visit.now - answer.at >= ANSWER_COUNTS:
        return _unanswered(answer)
    return _refused(answer, answer.at + ANSWER_COUNTS)


def _refused(answer: EvictionAnswer, again: datetime) -> Wait | None:
    if answer.verdict is EvictionVerdict.ALLOWED:
        return None
    if answer.verdict is EvictionVerdict.BLOCKED:
        return Wait(reason=Reason.POD_DISRUPTION_BUDGET, message=_budget(answer), requeue_at=again)
    return Wait(
        reason=Reason.EVICTION_REFUSED,
        message=f"a dry-run eviction answered {answer.verdict}: {answer.message}",
        requeue_at=again,
    )


def _budget(answer: EvictionAnswer) -> str:
    name = f"PodDisruptionBudget {answer.blocker}: " if answer.blocker else ""
    return f"{name}{answer.message}"


def _unanswered(old: EvictionAnswer | None) -> Wait:
    """Return the wait for an answer; what the last one said stays said until there is another."""
    if old is not None and old.verdict is EvictionVerdict.BLOCKED:
        return Wait(reason=Reason.POD_DISRUPTION_BUDGET, message=_budget(old), ask=True)
    return Wait(reason=Reason.PENDING, message="the PodDisruptionBudgets are being asked", ask=True)


def _hidden_disruption(visit: Visit, candidate: Candidate) -> str:
    """Return a restart that runs and whose pod is still ready: no budget counts it yet."""
    running = {active.name for active in candidate.active}
    for restart in sorted(visit.snapshot.restarts, key=lambda one: one.name):
        if restart.name not in running or restart.uid == candidate.restart.uid:
            continue
        pod = next((pod for pod in visit.pods if pod.name == restart.spec.pod.name), None)
        if pod is None or not pod.ready:
            continue
        is_at_work = is_active(restart.status)
        if not is_at_work or not _stays_ready(visit, pod, open_attempt(restart.status).method):
            return restart.name
    return ""


def _stays_ready(visit: Visit, pod: Pod, method: RestartMethod) -> bool:
    """Does the pod serve on through the step? A wrapped application has to start anew."""
    report = visit.agent_of(pod.uid).report
    is_wrapped = report is not None and report.agent.mode is AgentMode.RUN
    return method is RestartMethod.RECYCLE and not is_wrapped
