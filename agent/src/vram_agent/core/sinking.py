"""Where an unused model should be, and what brings it there.

Why it exists: afterTask, idleTimeout, keep-alive, callers and the models of one group all have a
say in how deep a model sinks; this is the one place that weighs them. Called by ``policy`` alone;
pure. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vram_agent.core.pool import ModelFacts, Pool, Reason, StepKind
from vram_agent.protocol import AfterTask, ModelState, OffloadTier, Tier

MOVABLE: Final = frozenset({ModelState.RESIDENT, ModelState.OFFLOADED, ModelState.FAILED})
"""States from which a model can sink."""

_DEPTH: Final = {Tier.VRAM: 0, Tier.PINNED_HOST: 1, Tier.HOST: 2, Tier.DISK: 3}


@dataclass(frozen=True, slots=True)
class Sinking:
    """Where an unused model should be, why, and when it should sink further."""

    tier: OffloadTier | None = None
    reason: Reason = Reason.AFTER_TASK
    wakes_at: float | None = None


def decide_sinking(model: ModelFacts, now: float) -> Sinking:
    """Return where an unused model should be now.

    1. In use, waited for, or not at rest: it stays.
    2. It failed: to Disk, since a new attempt loads it anew.
    3. The idle time is over: idleTier, if that is deeper.
    4. A caller's wish since its last use: at once.
    5. The last request's own wish: at once (0), never (-1), or so many seconds later.
    6. Else afterTask: at once, or never.
    The deepest of what is due; only ever deeper than where it is.
    """
    # 1
    if model.leases or model.wants_vram or model.residence.state not in MOVABLE:
        return Sinking()
    if model.is_on_disk or model.is_retiring:
        return Sinking()
    due: list[tuple[OffloadTier, Reason]] = []
    wakes: list[float] = []

    def consider(at: float, tier: OffloadTier, reason: Reason) -> None:
        if _DEPTH[Tier(tier)] <= _DEPTH[model.residence.tier]:
            return
        if at <= now:
            due.append((tier, reason))
        else:
            wakes.append(at)

    # 2
    if model.residence.state is ModelState.FAILED:
        return Sinking(tier=OffloadTier.DISK, reason=Reason.FAILED)
    residency = model.residency
    # 3
    if residency.idle_timeout_seconds > 0:
        idle_at = model.last_used_at + residency.idle_timeout_seconds
        consider(idle_at, residency.idle_tier, Reason.IDLE)
    # 4
    if model.called_tier is not None:
        consider(now, model.called_tier, Reason.CALLED)
    # 5
    if model.keep_alive_seconds is not None:
        if model.keep_alive_seconds >= 0:
            at = model.last_used_at + model.keep_alive_seconds
            consider(at, residency.offload_tier, Reason.KEEP_ALIVE)
    # 6
    elif residency.after_task is AfterTask.OFFLOAD:
        consider(now, residency.offload_tier, Reason.AFTER_TASK)
    deepest = max(due, key=lambda d: _DEPTH[Tier(d[0])], default=None)
    return Sinking(
        tier=None if deepest is None else deepest[0],
        reason=Reason.AFTER_TASK if deepest is None else deepest[1],
        wakes_at=min(wakes, default=None),
    )


def choose_mechanism(
    pool: Pool, model: ModelFacts, tier: OffloadTier, now: float
) -> StepKind | None:
    """Return what brings the model as near to a tier as its group allows; None: it is there.

    1. Below PinnedHost the GPU process ends. While a model of the group needs it, the model only
       leaves VRAM, and sinks with the last one.
    2. Without a template there is no Host tier: such a model goes to Disk.
    """
    if model.residence.state not in MOVABLE or model.is_on_disk:
        return None
    out_of_vram = StepKind.OFFLOAD if model.is_resident else None
    # 1
    if tier is OffloadTier.PINNED_HOST or any(
        _needs_gpu_process(mate, now) for mate in pool.mates(model)
    ):
        return out_of_vram
    # 2
    group = pool.groups[model.group]
    if tier is OffloadTier.DISK or model.loads_on_device or group.is_orphaned:
        return StepKind.UNLOAD
    return StepKind.END_GPU if is_in_gpu_process(model) else None


def _needs_gpu_process(model: ModelFacts, now: float) -> bool:
    if model.wants_vram and not model.is_on_disk:
        return True
    if not is_in_gpu_process(model):
        return False
    tier = decide_sinking(model, now).tier
    return tier is None or tier is OffloadTier.PINNED_HOST


def is_in_gpu_process(model: ModelFacts) -> bool:
    """Whether the model would lose something if the GPU process ended."""
    return model.residence.tier in (Tier.VRAM, Tier.PINNED_HOST)
