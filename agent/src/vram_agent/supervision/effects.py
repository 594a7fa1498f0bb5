"""What a step does to the processes; its result comes back as one outcome.

Why it exists: effects take long and fail in many ways, and the supervisor's state must not change
meanwhile but by its one writer. Each effect runs as a task of its own, touches no cell, and never
raises: what went wrong is in the outcome. Called by the supervisor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from vram_agent.backend import GroupBackend, LoadedModel, Moved, Scrubbed, TaskResult
from vram_agent.core.pool import Step, StepKind
from vram_agent.errors import AgentError, ModelFailedError, TaskFailedError
from vram_agent.protocol import ModelSpec
from vram_agent.supervision.fleet import Waiting

_log = structlog.get_logger("vram_agent.supervisor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a transition ended. ``error`` is None where it did what was asked."""

    step: Step
    seconds: float
    loaded: LoadedModel | None = None
    moved: Moved | None = None
    error: AgentError | None = None
    has_lost_all: bool = False
    """The group had to be closed: nothing of it is in any memory."""

    @property
    def scrubbed(self) -> Scrubbed | None:
        """What the scrub of an offload gave back; None where there was none."""
        return None if self.moved is None else self.moved.scrubbed


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """How a task ended: exactly one of result and error."""

    seconds: float
    result: TaskResult | None = None
    error: AgentError | None = None


async def carry_out(
    step: Step, group: GroupBackend, spec: ModelSpec, monotonic: Callable[[], float]
) -> Outcome:
    """Carry out a transition. Never raises but when cancelled.

    A way out of VRAM that fails ends in the next harder one (offload → end the GPU process →
    close the group), since memory that was promised to another model must come back.
    """
    began = monotonic()
    loaded: LoadedModel | None = None
    moved: Moved | None = None
    error: AgentError | None = None
    has_lost_all = False
    try:
        match step.kind:
            case StepKind.LOAD:
                loaded = await group.load(spec)
            case StepKind.RESTORE:
                moved = await group.restore(step.model, step.device)
            case StepKind.OFFLOAD:
                moved = await group.offload(step.model)
            case StepKind.END_GPU:
                await group.end_gpu()
            case _:
                await group.unload(step.model)
    except AgentError as fault:
        error = fault
    except Exception as fault:
        # A fault of ours or of a library must not leave the model between two states.
        error = ModelFailedError(f"{type(fault).__name__}: {fault}")
    if error is not None and step.kind not in (StepKind.LOAD, StepKind.RESTORE):
        has_lost_all = not await _force_out(step, group)
    return Outcome(
        step=step,
        seconds=monotonic() - began,
        loaded=loaded,
        moved=moved,
        error=error,
        has_lost_all=has_lost_all,
    )


async def run_task(
    name: str, waiting: Waiting, group: GroupBackend, monotonic: Callable[[], float]
) -> TaskOutcome:
    """Run the task of a request. Never raises but when cancelled."""
    began = monotonic()
    try:
        result = await group.run(name, waiting.task, waiting.parts)
    except AgentError as fault:
        return TaskOutcome(seconds=monotonic() - began, error=fault)
    except Exception as fault:
        # The same: a lease that is never given back would hold the model for ever.
        error = TaskFailedError(f"{type(fault).__name__}: {fault}")
        return TaskOutcome(seconds=monotonic() - began, error=error)
    return TaskOutcome(seconds=monotonic() - began, result=result)


async def close_group(group: GroupBackend) -> None:
    """Close a group that has no model left; what goes wrong is logged."""
    try:
        await group.close()
    except AgentError as error:
        _log.warning("group not closed", error=error.message)


async def _force_out(step: Step, group: GroupBackend) -> bool:
    """End the GPU process, else everything. True where host memory still holds the weights."""
    if step.kind is StepKind.OFFLOAD:
        try:
            await group.end_gpu()
        except Exception:  # noqa: S110 - the next harder way follows
            pass
        else:
            return True
    with contextlib.suppress(Exception):  # nothing harder is left; a new group is opened
        await group.close()
    return False
