"""One visit in words: what was seen, what would be done, and which rule says so.

Why it exists: ``vram-operator explain`` shows a person what the plan rests on. Called by the module
``explain`` of the shell. Pure: it decides nothing, and what it says is what ``plan`` decided from
the same snapshot at the same moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from vram_operator.api import RestartCondition, RestartTrigger, WorkloadCondition
from vram_operator.core.admission import concurrency_cap, find_leave, unavailable_limit
from vram_operator.core.breaker import failure_streak
from vram_operator.core.condition_list import find_condition, is_true
from vram_operator.core.figures import say_jitter, show_bytes, show_span, show_time
from vram_operator.core.forecast import foresee
from vram_operator.core.phases import is_finished, phase_of
from vram_operator.core.plan import (
    Action,
    AnnotateWorkload,
    CallRecycle,
    CallRestart,
    CreateRestart,
    DeletePod,
    DeleteRestart,
    DryRunEvict,
    EmitEvent,
    EnsureObject,
    Evict,
    Knock,
    PatchRestartStatus,
    PatchWorkloadStatus,
    Plan,
    PushConfig,
)
from vram_operator.core.schedule import (
    SHORTEST_DEADLINE_SECONDS,
    find_opening,
    next_opening,
)
from vram_operator.core.snapshot import Agent, Pod, Snapshot
from vram_operator.core.standing import find_standing, say_dry_run
from vram_operator.core.trend import FURTHEST
from vram_operator.core.visit import Visit, begin_visit


def explain(snapshot: Snapshot, planned: Plan, now: datetime) -> str:
    """Return the explanation as text. ``planned`` is the plan of the snapshot at ``now``."""
    visit, workload = begin_visit(snapshot, now), snapshot.workload
    # The status is what this is instead of, and who explains has seen less than who writes it.
    actions = [one for one in planned.actions if not isinstance(one, PatchWorkloadStatus)]
    sections = {
        "answer": [_say_answer(visit, planned)],
        "accepted": [_say_accepted(visit)],
        "pods": list(_say_pods(visit)) or ["none"],
        "schedule": list(_say_schedule(visit, planned)),
        "windows": list(_say_windows(visit)),
        "limits": list(_say_limits(visit)),
        "restarts": list(_say_restarts(visit)) or ["none is open"],
        "plan": [_say_action(action) for action in actions] or ["nothing to do"],
        "next look": [_say_next_look(actions, planned.requeue_at)],
        "status, as the operator wrote it last": list(_say_status(visit)),
    }
    name = f"GPUModelWorkload {workload.namespace}/{workload.name}"
    lines = [f"{name}, generation {workload.generation}, at {show_time(now)}"]
    for title, said in sections.items():
        lines += [title, *(f"  {line}" for line in said)]
    return "\n".join(lines)


def _say_answer(visit: Visit, planned: Plan) -> str:
    restarting = find_condition(planned.conditions, WorkloadCondition.RESTARTING)
    if restarting is not None and is_true(planned.conditions, WorkloadCondition.RESTARTING):
        return f"a restart runs: {restarting.message}"
    decided = [one for one in planned.actions if isinstance(one, CreateRestart)]
    if decided:
        names = (one.manifest["spec"]["pod"]["name"] for one in decided)
        return f"restarts are decided now: {', '.join(names)}"
    standing = find_standing(visit, planned.blocked, planned.status.next_restart_time)
    figures = f": {standing.figures}" if standing.figures else ""
    return f"nothing is restarted: {standing.message}{figures}"


def _say_accepted(visit: Visit) -> str:
    if visit.refusal is None:
        return "yes"
    return f"no, {visit.refusal.reason}: {visit.refusal.message}"


def _say_pods(visit: Visit) -> Iterator[str]:
    for pod in visit.pods:
        agent = visit.agent_of(pod.uid)
        ready = "ready" if pod.ready else "not ready"
        yield f"{pod.name}: {ready}, node {pod.node or 'none'}"
        yield from (f"  {line}" for line in (*_say_agent(visit, agent), *_say_chances(visit, pod)))


def _say_agent(visit: Visit, agent: Agent) -> Iterator[str]:
    report = agent.report
    if report is None or agent.received_at is None:
        yield f"agent     no report{f': {agent.error}' if agent.error else ''}"
        return
    age = show_span(visit.now - agent.received_at)
    memory, quiet = report.memory, agent.history[-1].quiet
    yield f"agent     boot {report.agent.boot_id[:8]}, epoch {report.agent.epoch}, report {age} old"
    if agent.error:
        yield f"          since then: {agent.error}"
    yield (
        f"memory    used {show_bytes(memory.used_bytes)}, models "
        f"{show_bytes(memory.model_bytes)}, residual {show_bytes(memory.residual_bytes)} "
        f"(source {memory.source}, {'quiet' if quiet else 'not quiet'})"
    )


def _say_chances(visit: Visit, pod: Pod) -> Iterator[str]:
    agent, evidence = visit.agent_of(pod.uid), visit.evidence_of(pod)
    if evidence is not None:
        yield f"evidence  {evidence.reason}: {evidence.message}"
    yield f"trend     {_say_trend(visit, agent)}"
    for trigger in (RestartTrigger.RESIDUAL, RestartTrigger.SCHEDULED):
        wait = find_leave(visit, pod, trigger)
        may = "may begin" if wait is None else f"would wait, {wait.reason}: {wait.message}"
        yield f"{trigger.lower():9} {may}"


def _say_trend(visit: Visit, agent: Agent) -> str:
    trend = agent.track.trend
    if trend is None:
        return f"unknown: {len(agent.track.points)} quiet samples"
    over = f"({trend.points} samples over {show_span(trend.until - trend.since)})"
    if not trend.is_rising:
        return f"not rising {over}"
    rise = f"{show_bytes(round(trend.bytes_per_second * 3600))} an hour {over}"
    forecast = foresee(agent, visit.threshold_bytes)
    if forecast is None:
        return f"{rise}, leads nowhere within {show_span(FURTHEST)}"
    return (
        f"{rise}, the threshold {_say_at(forecast.threshold_at)}, "
        f"out of memory {_say_at(forecast.out_of_memory_at)}"
    )


def _say_schedule(visit: Visit, planned: Plan) -> Iterator[str]:
    runs = visit.timetable.runs
    if runs is None:
        yield "none"
        return
    allowed = timedelta(
        seconds=max(visit.policy.starting_deadline_seconds, SHORTEST_DEADLINE_SECONDS)
    )
    yield f"{runs.expression} in {runs.zone.key}" + (", suspended" if visit.policy.suspend else "")
    if planned.status.next_restart_time is not None:
        yield (
            f"next at {show_time(planned.status.next_restart_time)}{say_jitter(visit.jitter)}; "
            f"may begin for {show_span(allowed)} after that"
        )
    if planned.missed_run is not None:
        yield f"missed: {show_time(planned.missed_run)}"


def _say_windows(visit: Visit) -> Iterator[str]:
    windows = visit.timetable.windows
    if not windows:
        yield "none: residual restarts run at any time"
        return
    for window in windows:
        schedule = window.schedule
        yield f"{schedule.expression} in {schedule.zone.key} for {show_span(window.duration)}"
    opening = find_opening(windows, visit.now)
    if opening is None:
        opens = next_opening(windows, visit.now)
        yield f"closed; opens {'never' if opens is None else 'at ' + show_time(opens)}"
    elif opening.closes_at is None:
        yield f"open since {show_time(opening.opened_at)} or before, and does not close"
    else:
        then = "" if opening.next_at is None else f", opens again at {show_time(opening.next_at)}"
        yield f"open from {show_time(opening.opened_at)} to {show_time(opening.closes_at)}{then}"


def _say_limits(visit: Visit) -> Iterator[str]:
    snapshot, policy = visit.snapshot, visit.policy
    replicas = len(visit.pods) if snapshot.target is None else snapshot.target.replicas
    limit = unavailable_limit(policy.max_unavailable, replicas)
    yield f"maxUnavailable {policy.max_unavailable}: {limit} of {replicas} pods"
    total, active = snapshot.cluster.total_pods, snapshot.cluster.active_restarts
    cap = concurrency_cap(snapshot.settings.max_concurrent_restarts, total)
    setting, failures = snapshot.settings.max_concurrent_restarts, len(failure_streak(visit))
    yield (
        f"--max-concurrent-restarts {setting}: {cap} of {total} pods, {len(active)} run; "
        "one on each node"
    )
    yield f"maxConsecutiveFailures {policy.max_consecutive_failures}: {failures} in a row"
    if visit.dry_run:
        yield f"{say_dry_run(visit)}: nothing is carried out"


def _say_restarts(visit: Visit) -> Iterator[str]:
    for restart in sorted(visit.snapshot.restarts, key=lambda one: one.name):
        if is_finished(restart.status):
            continue
        spec, phase = restart.spec, phase_of(restart.status)
        yield f"{restart.name}: {spec.trigger} of {spec.pod.name}, {phase}: {spec.reason}"
        admitted = find_condition(restart.status.conditions, RestartCondition.ADMITTED)
        if admitted is not None:
            yield f"  Admitted={admitted.status}, {admitted.reason}: {admitted.message}"


def _say_action(action: Action) -> str:
    match action:
        case CreateRestart():
            spec = action.manifest["spec"]
            name, pod = action.manifest["metadata"]["name"], spec["pod"]["name"]
            return f"create GPUPodRestart {name}: {spec['trigger']} of {pod}: {spec['reason']}"
        case PatchRestartStatus():
            admitted = find_condition(action.status.conditions, RestartCondition.ADMITTED)
            said = "" if admitted is None else f": {admitted.reason}: {admitted.message}"
            outcome = f", {action.finished}" if action.finished is not None else ""
            return f"write the status of GPUPodRestart {action.name}{outcome}{said}"
        case EmitEvent():
            return f"tell {action.reason}: {action.message}"
        case _:
            return _say_deed(action)


def _say_deed(action: Action) -> str:
    words = {
        DryRunEvict: "ask the PodDisruptionBudgets about",
        CallRecycle: "recycle",
        CallRestart: "restart in place",
        Evict: "evict",
        DeletePod: "delete",
        PushConfig: "push the config to",
        Knock: "ask whether our calls are still refused by",
    }
    match action:
        case EnsureObject():
            return f"apply {action.manifest['kind']} {action.manifest['metadata']['name']}"
        case AnnotateWorkload():
            pairs = (f"{key}={value}" for key, value in sorted(action.annotations.items()))
            return f"annotate the workload: {', '.join(pairs)}"
        case DeleteRestart():
            return f"remove GPUPodRestart {action.name}, which ended long ago"
        case DryRunEvict() | CallRecycle() | CallRestart() | Evict() | DeletePod():
            return f"{words[type(action)]} pod {action.pod.name}"
        case PushConfig() | Knock():
            return f"{words[type(action)]} the agent of pod {action.pod.name}"
    return type(action).__name__


def _say_next_look(actions: Sequence[Action], requeue_at: datetime | None) -> str:
    news = "with news of pods, agents or the spec"
    if any(not isinstance(action, EmitEvent) for action in actions):
        return "at once, since something is done"
    return news if requeue_at is None else f"at {show_time(requeue_at)}, and {news}"


def _say_status(visit: Visit) -> Iterator[str]:
    status = visit.snapshot.workload.status
    if not status.conditions:
        yield "it has not looked at the workload yet"
    for one in status.conditions:
        yield f"{one.type}={one.status}, {one.reason}" + (f": {one.message}" if one.message else "")
    trend = status.vram.trend
    if trend is not None:
        yield (
            f"residual of {trend.pod} grows by {trend.growth_per_hour} an hour: "
            f"the threshold {_say_at(trend.threshold_time)}, "
            f"out of memory {_say_at(trend.out_of_memory_time)}"
        )
    last = status.last_restart
    if last is not None:
        yield (
            f"last restart {last.name}, {last.trigger}: {last.method} {last.outcome}, "
            f"{last.reclaimed} reclaimed, {show_time(last.time)}"
        )


def _say_at(moment: datetime | None) -> str:
    return "unknown" if moment is None else f"at {show_time(moment)}"
