"""The workload's conditions: what holds, why, since when, and which changes are worth an Event.

Why it exists: every condition is there from the first visit on, each with one documented reason,
and no message carries a figure that moves with every report. Called by ``status``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from msgspec import structs
from vram_agent.protocol import (
    CONTROL_PORT_ANNOTATION,
    AgentMode,
    HostMemoryPolicy,
    ModelState,
    QueuePolicy,
    VramPolicy,
    parse_quantity,
)

from vram_operator.api import (
    Condition,
    ConditionStatus,
    EventReason,
    Reason,
    WorkloadCondition,
)
from vram_operator.core.condition_list import Finding, find_condition, is_true
from vram_operator.core.evidence import BLIND, COLLECTING, Evidence, EvidenceReason
from vram_operator.core.figures import MIB, NAMED, name_some, show_bytes
from vram_operator.core.phases import is_active, open_attempt
from vram_operator.core.plan import Blocked, EmitEvent, EventType
from vram_operator.core.reporting import AgentState, agent_state, is_heard, should_report
from vram_operator.core.snapshot import Agent, Pod, Restart
from vram_operator.core.standing import find_standing
from vram_operator.core.visit import Visit

_TRUE, _FALSE, _UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
_EVENTS = {
    Reason.INVALID_SCHEDULE: EventReason.INVALID_SCHEDULE,
    Reason.CONFLICTED: EventReason.CONFLICTED,
    Reason.MODEL_FAILED: EventReason.MODEL_FAILED,
    Reason.AGENT_SILENT: EventReason.AGENT_SILENT,
    Reason.ABOVE_THRESHOLD: EventReason.RESIDUAL_HIGH,
    Reason.ABOVE_WARNING: EventReason.VRAM_HIGH,
    Reason.RESTARTS_DO_NOT_HELP: EventReason.RESTART_BLOCKED,
}
"""Reasons whose appearance is told in an Event."""


_RESIDUALS = (
    (
        frozenset({EvidenceReason.SUFFICIENT}),
        _TRUE,
        Reason.ABOVE_THRESHOLD,
        "more than {} without a model",
    ),
    (
        COLLECTING,
        _FALSE,
        Reason.COLLECTING_EVIDENCE,
        "above {}, not for long enough and quiet yet",
    ),
    (
        frozenset({EvidenceReason.PREDICTED}),
        _FALSE,
        Reason.PREDICTED_ABOVE_THRESHOLD,
        "predicted to be above {} before the next window opens",
    ),
    (
        frozenset({EvidenceReason.THRESHOLD_TOO_LOW}),
        _FALSE,
        Reason.THRESHOLD_TOO_LOW,
        "context and libraries alone hold more than {}",
    ),
)
"""What evidence of a pod means for ResidualHigh: the first that some pod has; {} is the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the visit's restarts came to, as far as conditions speak of it."""

    restarts: tuple[Restart, ...]
    blocked: tuple[Blocked, ...]
    failures: int
    next_restart_time: datetime | None = None


def find_conditions(visit: Visit, progress: Progress) -> tuple[Finding, ...]:
    """Return a finding for every condition type of a workload."""
    return (
        _accepted(visit),
        _ready(visit),
        _agents_reporting(visit),
        _residual_high(visit),
        _vram_high(visit),
        _restarting(visit, progress),
        _restart_blocked(progress),
        _degraded(visit, progress),
    )


def events_of(before: Sequence[Condition], findings: Sequence[Finding]) -> tuple[EmitEvent, ...]:
    """Return the Events of what has changed: reasons that were not there before.

    What blocks a restart is told by the restart itself, or by ``tell_blocked``.
    """
    events = []
    for finding in findings:
        if finding.type == WorkloadCondition.RESTART_BLOCKED:
            continue
        old = find_condition(before, finding.type)
        reason = _EVENTS.get(finding.reason)
        if reason is not None and (old is None or old.reason != finding.reason):
            events.append(EmitEvent(reason=reason, message=finding.message, type=EventType.WARNING))
    return tuple(events)


def tell_blocked(before: Sequence[Condition], progress: Progress) -> tuple[EmitEvent, ...]:
    """Return the Event of what keeps a restart from being decided, when that has changed.

    A restart that is decided tells its own; that restarts do not help is told with Degraded.
    """
    first = _first_waiting(progress)
    if first is None or first.restart or first.reason is Reason.RESTARTS_DO_NOT_HELP:
        return ()
    old = find_condition(before, WorkloadCondition.RESTART_BLOCKED)
    if old is not None and old.reason == first.reason:
        return ()
    message = f"{first.pod}: {first.reason}: {first.message}"
    return (EmitEvent(reason=EventReason.RESTART_BLOCKED, message=message, pod=first.pod),)


def _first_waiting(progress: Progress) -> Blocked | None:
    return min(_waiting(progress), key=lambda one: (one.restart, one.pod), default=None)


def _waiting(progress: Progress) -> list[Blocked]:
    return [one for one in progress.blocked if one.reason is not Reason.PENDING]


def _accepted(visit: Visit) -> Finding:
    type_ = WorkloadCondition.ACCEPTED
    if visit.refusal is not None:
        return Finding(type_, _FALSE, visit.refusal.reason, visit.refusal.message)
    return Finding(type_, _TRUE, Reason.ACCEPTED, "; ".join(_find_oddities(visit)))


def _find_oddities(visit: Visit) -> Iterator[str]:
    """Yield what of an accepted spec has no effect, or not the one that may be expected."""
    spec = visit.snapshot.workload.spec
    sent = {
        "vram": structs.replace(spec.vram, warn_above="") != VramPolicy(),
        "hostMemory": spec.host_memory != HostMemoryPolicy(),
        "queue": spec.queue != QueuePolicy(),
    }
    unsent = [name for name, is_set in sent.items() if is_set]
    if spec.target_ref is not None and not spec.models and unsent:
        yield (
            f"{', '.join(unsent)} of the spec are sent to no agent: without spec.models the agents "
            "keep the config that they were started with"
        )
    if visit.strays:
        names = name_some([pod.name for pod in visit.strays])
        yield f"{names}: the label is there, but something else runs these pods; left alone"


def _ready(visit: Visit) -> Finding:
    """Are all replicas ready, and no model Failed?

    1. Not accepted. 2. Nothing is wanted. 3. A model is Failed. 4. Pods are missing or not ready.
    """
    type_, target = WorkloadCondition.READY, visit.snapshot.target
    if visit.refusal is not None:  # 1
        return Finding(type_, _FALSE, Reason.NOT_ACCEPTED, "see the condition Accepted")
    if target is not None and target.replicas == 0:  # 2
        return Finding(type_, _TRUE, Reason.SCALED_TO_ZERO)
    failed = sorted(
        f"{model.name} on {pod.name}: {model.error or 'no reason given'}"
        for pod in visit.pods
        if (report := visit.agent_of(pod.uid).report) is not None
        for model in report.models
        if model.state is ModelState.FAILED
    )
    if failed:  # 3
        return Finding(type_, _FALSE, Reason.MODEL_FAILED, "; ".join(failed[:NAMED]))
    ready = sum(pod.ready for pod in visit.pods)
    template = visit.snapshot.workload.spec.template
    wanted = target.replicas if target is not None else template.replicas if template else 0
    if target is None or ready < wanted:  # 4
        message = f"{ready} of {wanted} pods are ready"
        return Finding(type_, _FALSE, Reason.REPLICAS_NOT_READY, message)
    return Finding(type_, _TRUE, Reason.READY)


def expected_agents(visit: Visit) -> tuple[Pod, ...]:
    """Return the pods whose agent should report: those whose container runs."""
    return tuple(pod for pod in visit.pods if should_report(pod))


def is_reporting(visit: Visit, agent: Agent) -> bool:
    """Is the agent not silent?"""
    return is_heard(agent, visit.silent, visit.now)


def next_silence(visit: Visit) -> datetime | None:
    """Return when the next agent turns silent if nothing more is heard of it."""
    heard = [
        visit.agent_of(pod.uid).received_at or pod.agent_running_since
        for pod in expected_agents(visit)
    ]
    turns = [moment + visit.silent + timedelta(seconds=1) for moment in heard if moment]
    return min((moment for moment in turns if moment > visit.now), default=None)


def _agents_reporting(visit: Visit) -> Finding:
    """Do all agents report, and take our word?

    1. There are none. 2. One cannot be found. 3. One was silent for too long. 4. One refuses our
    calls. 5. One does not take its config. 6. One is so young that its first report may still come.
    """
    type_ = WorkloadCondition.AGENTS_REPORTING
    expected = expected_agents(visit)
    agents = {pod.name: visit.agent_of(pod.uid) for pod in expected}
    if not expected:  # 1
        return Finding(type_, _UNKNOWN, Reason.NO_AGENTS, "no pod of the workload runs an agent")
    homeless = [pod.name for pod in expected if not pod.control_port]
    if homeless:  # 2
        return Finding(type_, _FALSE, Reason.NO_CONTROL_PORT, _say_homeless(homeless))
    states = {
        pod.name: agent_state(pod, agents[pod.name], visit.silent, visit.now) for pod in expected
    }
    silent = _names_in(states, AgentState.SILENT)
    if silent:  # 3
        return Finding(
            type_,
            _FALSE,
            Reason.AGENT_SILENT,
            f"no fresh report from {name_some(silent)}; see that vram-agent runs there and that "
            "the operator can reach its control port",
            agents[silent[0]].error,
        )
    refusing = _names_in(states, AgentState.REFUSING)
    if refusing:  # 4
        return Finding(
            type_,
            _FALSE,
            Reason.CONTROL_REFUSED,
            f"{name_some(refusing)}: the agent refuses the operator's calls and can only be "
            "evicted; mount the ConfigMap vram-agent-trust and set POD_UID",
        )
    unpushed = {name: why for name, agent in agents.items() if (why := _why_unpushed(visit, agent))}
    if unpushed:  # 5
        first = min(unpushed)
        return Finding(type_, _FALSE, Reason.CONFIG_REFUSED, f"{first}: {unpushed[first]}")
    return _say_starting(type_, _names_in(states, AgentState.STARTING))  # 6


def _say_homeless(names: list[str]) -> str:
    return (
        f"{name_some(names)}: no container port is named control, and there is no annotation "
        f"{CONTROL_PORT_ANNOTATION}; add one of them to the pod template"
    )


def _say_starting(type_: WorkloadCondition, names: list[str]) -> Finding:
    if not names:
        return Finding(type_, _TRUE, Reason.REPORTING)
    message = f"waiting for the first report of {name_some(names)}"
    return Finding(type_, _UNKNOWN, Reason.PENDING, message)


def _why_unpushed(visit: Visit, agent: Agent) -> str:
    """Return why the agent does not run by the workload's config, empty if it does or may yet."""
    workload, report, push = visit.snapshot.workload, agent.report, agent.push
    if report is None or report.config_generation == workload.generation:
        return ""
    if workload.spec.models and report.agent.mode is AgentMode.RUN:
        return (
            "its agent wraps an application, whose models are its own; "
            "leave spec.models out, or serve them with vram-agent serve"
        )
    is_refused = push is not None and 400 <= push.status < 500
    if push is None or not is_refused or push.generation != workload.generation:
        return ""
    return push.message


def _names_in(states: Mapping[str, AgentState], wanted: AgentState) -> list[str]:
    return [name for name, state in states.items() if state is wanted]


def _residual_high(visit: Visit) -> Finding:
    """Does a pod hold more than the threshold without a model?

    1. There is no threshold. 2. One does, proven. 3. One does, not proven yet. 4. One will, while
    no window is open. 5. The threshold is below what a context alone holds. 6. Nothing can be said
    of any. 7. None does.
    """
    type_ = WorkloadCondition.RESIDUAL_HIGH
    threshold = visit.threshold_bytes
    if threshold is None:  # 1
        return Finding(type_, _FALSE, Reason.NO_THRESHOLD)
    limit = show_bytes(threshold)
    found = {
        pod.name: evidence for pod in visit.pods if (evidence := visit.evidence_of(pod)) is not None
    }
    for reasons, status, reason, what in _RESIDUALS:  # 2 to 5
        names = _names_with(found, reasons)
        if names:
            return Finding(type_, status, reason, f"{name_some(names)}: {what.format(limit)}")
    blind = _names_with(found, BLIND)
    if len(blind) == len(found):  # 6
        return Finding(type_, _UNKNOWN, Reason.NO_EVIDENCE, "no fresh report of a known source")
    return Finding(type_, _FALSE, Reason.BELOW_THRESHOLD)  # 7


def _names_with(found: dict[str, Evidence], reasons: frozenset[EvidenceReason]) -> list[str]:
    return sorted(name for name, evidence in found.items() if evidence.reason in reasons)


def _vram_high(visit: Visit) -> Finding:
    """Does a pod use more than vram.warnAbove? Once it did, until it is 5 % below again."""
    type_ = WorkloadCondition.VRAM_HIGH
    setting = visit.snapshot.workload.spec.vram.warn_above
    if not setting:
        return Finding(type_, _FALSE, Reason.NO_WARNING)
    warn = parse_quantity(setting)
    was_high = is_true(visit.snapshot.workload.status.conditions, type_)
    limit = warn - max(warn // 20, MIB) if was_high else warn
    reports = {
        pod.name: report
        for pod in visit.pods
        if is_reporting(visit, agent := visit.agent_of(pod.uid))
        and (report := agent.report) is not None
    }
    if not reports:
        return Finding(type_, _UNKNOWN, Reason.NO_EVIDENCE, "no fresh report")
    high = [name for name, report in reports.items() if report.memory.used_bytes > limit]
    if high:
        message = f"{name_some(high)}: more than {show_bytes(warn)} in use"
        return Finding(type_, _TRUE, Reason.ABOVE_WARNING, message)
    return Finding(type_, _FALSE, Reason.BELOW_WARNING)


def _restarting(visit: Visit, progress: Progress) -> Finding:
    """Is a restart being carried out? If not, the message says why: here is what people ask for."""
    type_ = WorkloadCondition.RESTARTING
    running = [
        f"{one.name} ({open_attempt(one.status).method} of {one.spec.pod.name})"
        for one in progress.restarts
        if is_active(one.status)
    ]
    if running:
        return Finding(type_, _TRUE, Reason.RESTARTING, name_some(running))
    standing = find_standing(visit, progress.blocked, progress.next_restart_time)
    return Finding(type_, _FALSE, Reason.NOT_RESTARTING, standing.message, standing.figures)


def _restart_blocked(progress: Progress) -> Finding:
    type_ = WorkloadCondition.RESTART_BLOCKED
    first = _first_waiting(progress)
    if first is None:
        return Finding(type_, _FALSE, Reason.NOT_BLOCKED)
    others = len(_waiting(progress)) - 1
    figures = "; ".join(filter(None, (first.figures, f"{others} more wait" if others else "")))
    message = f"{first.restart or first.pod}: {first.message}"
    return Finding(type_, _TRUE, first.reason, message, figures)


def _degraded(visit: Visit, progress: Progress) -> Finding:
    type_ = WorkloadCondition.DEGRADED
    if progress.failures < visit.policy.max_consecutive_failures:
        return Finding(type_, _FALSE, Reason.HEALTHY)
    message = (
        f"{visit.policy.max_consecutive_failures} restarts in a row did not help: no further "
        "residual restart until one helps or the spec changes"
    )
    return Finding(type_, _TRUE, Reason.RESTARTS_DO_NOT_HELP, message)
