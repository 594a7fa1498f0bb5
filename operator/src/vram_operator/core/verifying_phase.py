"""The phase Verifying: the step was carried out, and the agent measures again.

Called by ``restarts``. It finds out what the step gave: the residual after it, the memory that came
back and for how long the pod was away. Only a measurement leads to a harder step.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from vram_agent.protocol import Report, ResidualSource, format_quantity, parse_quantity

from vram_operator.api import Reason, RestartCondition, RestartMethod, RestartOutcome
from vram_operator.core.admission import AGENT_STEPS
from vram_operator.core.condition_list import find_condition
from vram_operator.core.figures import show_bytes, show_time
from vram_operator.core.phases import boot_before, open_attempt, restart_id
from vram_operator.core.queue_phase import find_restart_pod, say_lost
from vram_operator.core.snapshot import Pod, ResidualSample, Restart, parse_time, sample_of
from vram_operator.core.turn import (
    End,
    Turn,
    change,
    climb,
    earliest,
    end_attempt,
    figures_of,
    finish,
)
from vram_operator.core.visit import Visit

SETTLE = timedelta(seconds=10)
"""A residual that is still high counts only when it was seen this long after the step."""
MEASURED_WITHIN = {
    RestartMethod.RECYCLE: timedelta(seconds=300),
    RestartMethod.IN_PLACE: timedelta(seconds=900),
    RestartMethod.EVICT: timedelta(seconds=1800),  # the replacement may wait for a GPU
    RestartMethod.DELETE: timedelta(seconds=1800),
}
"""How long the pod may take to be ready and measured again."""


def advance_verifying(visit: Visit, restart: Restart) -> Turn:
    """Give a restart whose step was carried out its turn.

    1. The pod that keeps its place went away: there is nothing left to measure.
    2. The pod is not ready, or has no fresh report from after the step: it waits, then Failed.
    3. A GPU of the pod is gone from the node: the next step, or NotRecovered.
    4. There is no threshold, or the residual is not above it: Recovered.
    5. The residual is above it, quiet and settled: the next step, or NotRecovered.
    6. Nothing can be told from the report: it waits, then Failed.
    """
    attempt = open_attempt(restart.status)
    pod = _find_subject(visit, restart)
    if pod is None and attempt.method in AGENT_STEPS:  # 1
        message = f"pod {restart.spec.pod.name} went away before it was measured"
        end = End(RestartOutcome.SKIPPED, RestartCondition.RECOVERED, Reason.POD_GONE, message)
        return finish(visit, end_attempt(visit, restart, RestartOutcome.SKIPPED, message), end)
    report = None if pod is None else _report_after(visit, restart, pod)
    if pod is None or report is None:  # 2
        return _wait(visit, restart, Reason.NO_REPORT, _say_missing(pod, restart))
    if visit.agent_of(pod.uid).gpus_missing_since is not None:  # 3
        return _without_gpu(visit, restart, pod, report)
    threshold = visit.threshold_bytes
    sample = sample_of(report, visit.now)
    known = sample.source is not ResidualSource.UNKNOWN
    if threshold is None or (known and sample.residual_bytes <= threshold):  # 4
        return _recover(visit, restart, pod, report)
    settled = _restarted_at(restart) + SETTLE
    if known and sample.quiet and _received_at(visit, pod) >= settled:  # 5
        message = (
            f"{attempt.method} left a residual of {show_bytes(sample.residual_bytes)}, "
            f"above {show_bytes(threshold)}"
        )
        measured = _measure(restart, pod, report)
        return climb(visit, measured, RestartOutcome.NOT_RECOVERED, message)
    return _wait(visit, restart, Reason.NOT_IDLE, _say_unclear(sample))  # 6


def _without_gpu(visit: Visit, restart: Restart, pod: Pod, report: Report) -> Turn:
    """Branch 3: an agent that fell back to the CPU has no residual, and has not recovered."""
    lost = visit.lost_gpus(pod)
    if not lost:
        return _wait(visit, restart, Reason.NO_EVIDENCE, "its report leaves out a GPU that it had")
    measured = _measure(restart, pod, report)
    return climb(visit, measured, RestartOutcome.NOT_RECOVERED, say_lost(lost))


def _find_subject(visit: Visit, restart: Restart) -> Pod | None:
    """Return the pod to measure: the same one, or after an eviction its replacement.

    A replacement has the same kind of owner, came after the step began and was not taken as the
    replacement of another pod.
    """
    attempt = open_attempt(restart.status)
    if attempt.method in AGENT_STEPS:
        return find_restart_pod(visit, restart)
    taken = {
        other.status.after.boot_id
        for other in visit.snapshot.restarts
        if other.uid != restart.uid and other.status.after is not None
    }
    for pod in sorted(visit.pods, key=lambda pod: (pod.created, pod.name)):
        report = visit.agent_of(pod.uid).report
        if pod.uid == restart.spec.pod.uid or pod.created < attempt.start_time:
            continue
        if report is None or report.agent.boot_id not in taken:
            return pod
    return None


def _report_after(visit: Visit, restart: Restart, pod: Pod) -> Report | None:
    """Return a fresh report of a ready pod that speaks of the time after the step."""
    report = visit.fresh_report(visit.agent_of(pod.uid))
    if report is None or _has_lost_readiness(restart, pod):
        return None
    method = open_attempt(restart.status).method
    if method not in AGENT_STEPS or report.agent.boot_id != boot_before(restart.status):
        return report
    action = report.action
    if action is None or action.restart_id != restart_id(restart, method):
        return None
    try:
        is_later = parse_time(report.observed_at) >= parse_time(action.at)
    except ValueError:
        return None
    return report if is_later else None


def _has_lost_readiness(restart: Restart, pod: Pod) -> bool:
    """Is the pod not ready since the restart began? One that was not before need not be."""
    if pod.ready or pod.ready_changed_at is None:
        return not pod.ready
    began = restart.status.start_time or open_attempt(restart.status).start_time
    return pod.ready_changed_at >= began


def _say_missing(pod: Pod | None, restart: Restart) -> str:
    if pod is None:
        return f"the replacement of pod {restart.spec.pod.name} has not come"
    if not pod.ready:
        return f"pod {pod.name} is not ready"
    return f"pod {pod.name} has not reported since the step"


def _say_unclear(sample: ResidualSample) -> str:
    if sample.source is ResidualSource.UNKNOWN:
        return "the source of the residual is Unknown"
    return "the residual is above the threshold, and the agent has not been quiet since"


def _restarted_at(restart: Restart) -> datetime:
    """Return when the step was seen to have been carried out."""
    condition = find_condition(restart.status.conditions, RestartCondition.RESTARTED)
    if condition is None:  # pragma: no cover - the phase is read from this condition
        return open_attempt(restart.status).start_time
    return condition.last_transition_time


def _received_at(visit: Visit, pod: Pod) -> datetime:
    return visit.agent_of(pod.uid).received_at or visit.now


def _wait(visit: Visit, restart: Restart, reason: Reason, what: str) -> Turn:
    method = open_attempt(restart.status).method
    restarted = _restarted_at(restart)
    deadline = restarted + MEASURED_WITHIN[method]
    if visit.now < deadline:
        settled = restarted + SETTLE
        soon = settled if settled > visit.now else None
        return Turn(restart=restart, requeue_at=earliest([soon, deadline]))
    message = f"{what}; given up at {show_time(deadline)}"
    end = End(RestartOutcome.FAILED, RestartCondition.RECOVERED, reason, message)
    return finish(visit, end_attempt(visit, restart, RestartOutcome.FAILED, message), end)


def _measure(restart: Restart, pod: Pod, report: Report) -> Restart:
    """Return the restart with what the report says of the time after the step."""
    after = figures_of(report)
    before = restart.status.before
    reclaimed = None
    if before is not None:
        gained = parse_quantity(before.residual) - parse_quantity(after.residual)
        reclaimed = format_quantity(max(0, gained))
    return change(
        restart,
        after=after,
        reclaimed=reclaimed,
        downtime_seconds=_downtime_seconds(restart, pod),
    )


def _downtime_seconds(restart: Restart, pod: Pod) -> int:
    """Return for how long the pod, or the place it had, was not ready since the first step."""
    status = restart.status
    began = status.start_time or open_attempt(status).start_time
    ready = pod.ready_changed_at
    if ready is None or ready < began:
        return 0
    if pod.uid != restart.spec.pod.uid and pod.created >= open_attempt(status).start_time:
        return round((ready - open_attempt(status).start_time).total_seconds())
    losses = [pod.unready_since, pod.agent_finished_at]
    lost = earliest([one for one in losses if one is not None and began <= one <= ready])
    return 0 if lost is None else round((ready - lost).total_seconds())


def _recover(visit: Visit, restart: Restart, pod: Pod, report: Report) -> Turn:
    method = open_attempt(restart.status).method
    restart = _measure(restart, pod, report)
    gain = restart.status.reclaimed
    message = f"{method} of pod {pod.name}" + (
        f" gave {show_bytes(parse_quantity(gain))} back" if gain is not None else ""
    )
    end = End(RestartOutcome.RECOVERED, RestartCondition.RECOVERED, Reason.RECOVERED, message)
    return finish(visit, end_attempt(visit, restart, RestartOutcome.RECOVERED, message), end)
