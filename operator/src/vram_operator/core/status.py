"""The workload's status: counts, quantised sums, and the conditions.

Why it exists: a status is written when something happened, not with every report, so that watches
stay quiet. Called by ``planning``.
"""

from __future__ import annotations

from datetime import datetime

from msgspec import structs
from vram_agent.protocol import ModelState, Report, parse_quantity

from vram_operator.api import (
    AgentCounts,
    Condition,
    LastRestart,
    ModelStatus,
    VramFigures,
    WorkloadStatus,
)
from vram_operator.core.condition_list import Finding, with_findings
from vram_operator.core.conditions import expected_agents, is_reporting
from vram_operator.core.figures import MIB, round_quantity
from vram_operator.core.snapshot import Restart
from vram_operator.core.trend_status import find_residual_trend
from vram_operator.core.visit import Visit

NOTICED_BYTES = 512 * MIB
"""Sums are written again when one of them has moved by more than this."""
_MESSAGE_CHARACTERS = 1024
_HELD = frozenset({ModelState.OFFLOADING, ModelState.OFFLOADED, ModelState.RESTORING})


def make_status(
    visit: Visit,
    findings: tuple[Finding, ...],
    next_restart_time: datetime | None,
) -> WorkloadStatus:
    """Return the status as it should read; equal to the old one when nothing happened."""
    snapshot = visit.snapshot
    workload, target, old = snapshot.workload, snapshot.target, snapshot.workload.status
    reports = tuple(
        agent.report
        for pod in visit.pods
        if is_reporting(visit, agent := visit.agent_of(pod.uid)) and agent.report is not None
    )
    sums = _sum_memory(reports)
    moved = _have_moved(old.vram, sums)
    conditions = with_findings(
        old.conditions, findings, workload.generation, visit.now, fresh_figures=moved
    )
    vram = old.vram
    if moved or _have_changed(old.conditions, conditions):
        vram = VramFigures(
            used=round_quantity(sums["used"]),
            residual=round_quantity(sums["residual"]),
            models=round_quantity(sums["models"]),
        )
    models = _count_models(visit, reports)
    resident = sum(model.resident for model in models)
    total = sum(model.resident + model.offloaded + model.failed for model in models)
    return WorkloadStatus(
        observed_generation=workload.generation,
        conditions=conditions,
        selector="" if target is None else target.selector,
        target=_name_target(visit),
        replicas=len(visit.pods) if target is None else target.current,
        ready_replicas=sum(pod.ready for pod in visit.pods),
        agents=AgentCounts(expected=len(expected_agents(visit)), reporting=len(reports)),
        vram=structs.replace(vram, trend=find_residual_trend(visit)),
        models=models,
        models_summary=f"{resident}/{max(total, len(models))}" if models else "",
        next_restart_time=next_restart_time,
        last_restart=_find_last_restart(snapshot.restarts) or old.last_restart,
    )


def _name_target(visit: Visit) -> str:
    workload = visit.snapshot.workload
    ref = workload.spec.target_ref
    return f"Deployment/{workload.name}" if ref is None else f"{ref.kind}/{ref.name}"


def _have_changed(old: list[Condition], new: list[Condition]) -> bool:
    return [(one.type, one.status, one.reason) for one in old] != [
        (one.type, one.status, one.reason) for one in new
    ]


def _sum_memory(reports: tuple[Report, ...]) -> dict[str, int]:
    return {
        "used": sum(report.memory.used_bytes for report in reports),
        "residual": sum(report.memory.residual_bytes for report in reports),
        "models": sum(report.memory.model_bytes for report in reports),
    }


def _have_moved(old: VramFigures, sums: dict[str, int]) -> bool:
    return any(
        abs(parse_quantity(getattr(old, name) or "0") - value) > NOTICED_BYTES
        for name, value in sums.items()
    )


def _count_models(visit: Visit, reports: tuple[Report, ...]) -> list[ModelStatus]:
    """Return where each model is, in the order of the spec, others that agents name after it."""
    reported = {model.name for report in reports for model in report.models}
    declared = [model.name for model in visit.snapshot.workload.spec.models]
    names = [*declared, *sorted(reported - set(declared))]
    return [_count_model(name, reports) for name in names]


def _count_model(name: str, reports: tuple[Report, ...]) -> ModelStatus:
    found = [model for report in reports for model in report.models if model.name == name]
    errors = sorted(
        model.error for model in found if model.state is ModelState.FAILED and model.error
    )
    return ModelStatus(
        name=name,
        resident=sum(model.state is ModelState.RESIDENT for model in found),
        offloaded=sum(model.state in _HELD for model in found),
        failed=sum(model.state is ModelState.FAILED for model in found),
        message=errors[0][:_MESSAGE_CHARACTERS] if errors else "",
    )


def _find_last_restart(restarts: tuple[Restart, ...]) -> LastRestart | None:
    ended = [
        (restart.status.completion_time, restart.name, restart)
        for restart in restarts
        if restart.status.completion_time is not None and restart.status.outcome is not None
    ]
    if not ended:
        return None
    time, name, restart = max(ended, key=lambda one: one[:2])
    status, outcome = restart.status, restart.status.outcome
    if outcome is None:  # pragma: no cover - filtered above
        return None
    return LastRestart(
        name=name,
        trigger=restart.spec.trigger,
        method=status.attempts[-1].method if status.attempts else restart.spec.method,
        outcome=outcome,
        reclaimed=status.reclaimed or "0",
        time=time,
    )
