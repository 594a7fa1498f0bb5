"""What happens next in a pod: what to load, what to evict for it, what sinks when unused.

Why it exists: all of the agent's choices in one pure function of one snapshot. Called by the
supervisor after every event, again and again until it has no further step. It must not log and
knows no process, clock or HTTP. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vram_agent.core.admission import (
    Earmarks,
    EndIdleProcess,
    Evict,
    Fits,
    NoRoom,
    Shortage,
    TooLarge,
    Wait,
    choose_victims,
    decide_admission,
    is_evictable,
    largest_limit_bytes,
    rank_candidates,
    rank_devices,
)
from vram_agent.core.ledger import HOST
from vram_agent.core.pool import (
    CommandKind,
    Decision,
    ModelFacts,
    Pool,
    Reason,
    Step,
    StepKind,
)
from vram_agent.core.sinking import (
    MOVABLE,
    choose_mechanism,
    decide_sinking,
    is_in_gpu_process,
)
from vram_agent.protocol import ModelState

HOST_CHECK_SECONDS: Final = 5.0
"""How often a container with a memory limit is looked at while it holds weights."""


def decide(pool: Pool, now: float) -> Decision:
    """Return the one step to take now, or none and the time to ask again. Pure.

    1. A model that the config changed or took away is unloaded.
    2. A command is fulfilled, or takes the model out of VRAM.
    3. The model that waits and had its turn longest ago is loaded, restored, or refused; others
       are evicted for it. One that must wait sets its bytes aside and lets the next one try.
    4. Where more is held than the limits admit, or the container is near its own, unused models
       leave; so do GPU processes that hold no model.
    5. An unused model sinks to the tier that its residency names.
    6. A task runs, on the model of the group whose last task is longest ago.
    """
    wakes: list[float] = []
    short: set[str] = set()
    held: set[str] = set()
    waits: dict[str, str] = {}
    steps = (
        _retire(pool),  # 1
        _obey(pool, now),  # 2
        _admit(pool, now, _Notes(wakes=wakes, short=short, held=held, waits=waits)),  # 3
        _shrink(pool, now, wakes),  # 4
        _sink(pool, now, wakes),  # 5
        _run(pool, held),  # 6
    )
    step = next((found for source in steps for found in source), None)
    return Decision(
        step=step, requeue_at=min(wakes, default=None), short=frozenset(short), waits=waits
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    """What the third branch leaves behind for the decision and for the sixth."""

    wakes: list[float]
    short: set[str]
    held: set[str]
    waits: dict[str, str]


def _retire(pool: Pool) -> Iterator[Step]:
    for model in pool.models:
        if model.is_retiring and pool.is_free(model) and not model.is_on_disk:
            yield Step(kind=StepKind.UNLOAD, model=model.name, reason=Reason.CONFIG_CHANGED)


def _obey(pool: Pool, now: float) -> Iterator[Step]:
    for model in pool.models:
        command = model.command
        if command is None or not pool.is_free(model):
            continue
        kind = StepKind.FINISH
        if command.kind is CommandKind.UNLOAD and not model.is_on_disk:
            kind = StepKind.UNLOAD
        elif command.kind is CommandKind.OFFLOAD:
            kind = choose_mechanism(pool, model, command.tier, now) or StepKind.FINISH
        elif command.kind in (CommandKind.LOAD, CommandKind.EAGER) and not model.is_resident:
            continue
        yield Step(kind=kind, model=model.name, reason=Reason.CALLED)


def _admit(pool: Pool, now: float, notes: _Notes) -> Iterator[Step]:
    earmarks = Earmarks()
    waiting = [m for m in pool.models if m.wants_vram and not m.is_resident]
    for model in sorted(waiting, key=lambda m: (m.resident_since, m.arrival, m.name)):
        if not pool.is_free(model):
            continue
        if model.not_before > now:
            notes.wakes.append(model.not_before)
        elif model.is_on_disk:
            yield from _load(pool, model)
        # A load ends the GPU process of the group: what is restored before it would be lost.
        elif not any(m.wants_vram and m.is_on_disk for m in pool.mates(model)):
            yield from _restore(pool, model, (earmarks, notes), now)


def _load(pool: Pool, model: ModelFacts) -> Iterator[Step]:
    """1. It can never fit, or no device is open to it: refuse. 2. The group's GPU process lives:
    end it. 3. Host memory is full: unload what is unused. 4. Load.
    """
    reason = _reason_to_come(model)
    # 1
    if fault := _find_lasting_fault(pool, model):
        yield _refuse_for_good(model, fault)
        return
    if fault := _find_passing_fault(pool, model):
        yield _refuse(model, fault)
        return
    # 2
    if pool.groups[model.group].has_gpu_process:
        yield from _end_group_of(pool, model, Reason.GROUP_CHANGED)
        return
    # 3
    expected = pool.host.expected_bytes(model.name, 0, 0)
    if expected > pool.host.budget_bytes:
        yield _refuse_for_good(model, _explain_host(pool, model, expected))
        return
    if expected > pool.host_left_bytes:
        if any(m.residence.state is ModelState.OFFLOADING for m in pool.models):
            return
        yield from _unload_unused(pool, model.name)
    # 4
    yield Step(
        kind=StepKind.LOAD,
        model=model.name,
        reason=reason,
        needed_bytes=min(expected, max(0, pool.host.available_bytes(HOST))),
    )


def _restore(
    pool: Pool, model: ModelFacts, sinks: tuple[Earmarks, _Notes], now: float
) -> Iterator[Step]:
    earmarks, notes = sinks
    charge = pool.host.charges.get(model.name)
    if charge is not None and charge.held_bytes > pool.host.budget_bytes:
        yield _refuse_for_good(model, _explain_host(pool, model, charge.held_bytes))
        return
    admission = decide_admission(pool, model, earmarks, now)
    is_eager = model.queued == 0 and _is_eager(model)
    match admission:
        case Fits(device=device):
            yield Step(
                kind=StepKind.RESTORE,
                model=model.name,
                reason=_reason_to_come(model),
                device=device,
                needed_bytes=model.needed_bytes,
            )
        case TooLarge(message=message):
            yield _refuse_for_good(model, message)
        case NoRoom(message=message):
            yield _refuse(model, message)
        case Wait(until=until, note=note) if until is not None and note:
            # Nothing is set aside: it may take long, and the others need not wait for it.
            notes.wakes.append(until)
            notes.waits[model.name] = note
        case _ if is_eager:
            yield _refuse(model, f"no room for {model.name} without taking another model out")
        case Evict(victims=victims):
            for name in victims:
                yield from _evict(pool, pool.model(name), model, now)
        case EndIdleProcess(group=group):
            yield from _end_idle(pool, group, model)
        case Wait(device=device, held=held, until=until, is_short=is_short):
            earmarks.add(device, model.needed_bytes)
            notes.held.update(held)
            if until is not None:
                notes.wakes.append(until)
            if is_short:
                notes.short.add(model.name)


def _refuse(model: ModelFacts, message: str) -> Step:
    return Step(kind=StepKind.REFUSE, model=model.name, reason=Reason.NO_VRAM, message=message)


def _refuse_for_good(model: ModelFacts, message: str) -> Step:
    return Step(
        kind=StepKind.REFUSE,
        model=model.name,
        reason=Reason.OVERSIZE,
        is_permanent=True,
        message=message,
    )


def _find_lasting_fault(pool: Pool, model: ModelFacts) -> str:
    """Return why no device will ever hold the model, empty where one may."""
    if model.missing_device:
        return (
            f"model {model.name} asks for device {model.missing_device}; this pod has "
            f"{len(pool.vram.capacity_bytes)}, numbered from 0"
        )
    limit = largest_limit_bytes(pool, model)
    if model.needed_bytes > limit:
        return (
            f"model {model.name} needs {model.needed_bytes} bytes of VRAM, more than the "
            f"{limit} bytes that budget and headroom leave for any model"
        )
    return ""


def _find_passing_fault(pool: Pool, model: ModelFacts) -> str:
    """Return why no device takes the model as things are, empty where one may."""
    closed = [pool.closed.get(device) for device in rank_devices(pool, model)]
    refused = [one for one in closed if one is not None and one.is_refused]
    if len(refused) < len(closed):
        return ""
    return f"model {model.name} was not loaded: {refused[0].explain()}"


def _explain_host(pool: Pool, model: ModelFacts, needed_bytes: int) -> str:
    return (
        f"model {model.name} needs {needed_bytes} bytes of host memory; "
        f"hostMemory.budget is {pool.host.budget_bytes}"
    )


def _evict(pool: Pool, victim: ModelFacts, model: ModelFacts, now: float) -> Iterator[Step]:
    kind = choose_mechanism(pool, victim, victim.residency.offload_tier, now)
    if kind is not None:
        yield Step(kind=kind, model=victim.name, reason=Reason.EVICTED, beneficiary=model.name)


def _end_group_of(
    pool: Pool, model: ModelFacts, reason: Reason, beneficiary: str = ""
) -> Iterator[Step]:
    """End the group's GPU process; models without a template cannot outlive it."""
    members = [model, *pool.mates(model)]
    for member in members:
        if member.loads_on_device and not member.is_on_disk:
            yield Step(
                kind=StepKind.UNLOAD, model=member.name, reason=reason, beneficiary=beneficiary
            )
    yield Step(kind=StepKind.END_GPU, model=model.name, reason=reason, beneficiary=beneficiary)


def _end_idle(pool: Pool, group: str, model: ModelFacts) -> Iterator[Step]:
    if group == model.group:
        yield from _end_group_of(pool, model, Reason.MOVED)
        return
    member = next(m for m in pool.models if m.group == group and not m.is_on_disk)
    yield from _end_group_of(pool, member, Reason.EVICTED, model.name)


def _unload_unused(pool: Pool, beneficiary: str = "") -> Iterator[Step]:
    unused = [
        m
        for m in pool.models
        if m.name != beneficiary
        and pool.is_free(m)
        and m.name in pool.host.charges
        and not m.wants_vram
        and m.residence.state in MOVABLE
        and not any(is_in_gpu_process(mate) for mate in pool.mates(m))
    ]
    is_budget = pool.host.available_bytes(HOST) <= pool.host_left_bytes
    for victim in sorted(unused, key=lambda m: (m.is_resident, m.priority, m.last_used_at, m.name)):
        yield Step(
            kind=StepKind.UNLOAD,
            model=victim.name,
            reason=Reason.HOST_BUDGET if is_budget else Reason.HOST_PRESSURE,
            beneficiary=beneficiary,
        )


def _shrink(pool: Pool, now: float, wakes: list[float]) -> Iterator[Step]:
    leaving = [m for m in pool.models if m.residence.state is ModelState.OFFLOADING]
    for device in pool.vram.capacity_bytes or ("",):
        shortage = Shortage(
            budget_bytes=-pool.vram.budget_left_bytes() - sum(map(pool.held_bytes, leaving)),
            device_bytes=-pool.vram.device_left_bytes(device)
            - sum(pool.held_bytes(m) for m in leaving if pool.is_charged_on(m, device)),
            measured_bytes=0,
            needs_leavers=False,
        )
        if shortage.is_covered:
            continue
        unused = [m for m in rank_candidates(pool) if is_evictable(pool, m, now) and not m.queued]
        names = choose_victims(pool, unused, shortage, device) or tuple(m.name for m in unused)
        for name in names:
            victim = pool.model(name)
            kind = choose_mechanism(pool, victim, victim.residency.offload_tier, now)
            if kind is not None:
                yield Step(kind=kind, model=name, reason=Reason.OVER_BUDGET)
    for group, facts in pool.groups.items():
        if not facts.has_gpu_process or facts.is_busy:
            continue
        members = [m for m in pool.models if m.group == group]
        if members and not any(is_in_gpu_process(m) or m.wants_vram for m in members):
            name = members[0].name
            yield Step(kind=StepKind.END_GPU, model=name, reason=Reason.UNUSED_PROCESS)
    if pool.host_room_bytes is not None and pool.host.charges:
        # Tasks take memory without a word; nothing but another look tells.
        wakes.append(now + HOST_CHECK_SECONDS)
    if pool.host_left_bytes < 0 and not leaving:
        yield from _unload_unused(pool)


def _sink(pool: Pool, now: float, wakes: list[float]) -> Iterator[Step]:
    for model in pool.models:
        sinking = decide_sinking(model, now)
        if sinking.wakes_at is not None:
            wakes.append(sinking.wakes_at)
        if sinking.tier is None or not pool.is_free(model):
            continue
        kind = choose_mechanism(pool, model, sinking.tier, now)
        if kind is not None:
            yield Step(kind=kind, model=model.name, reason=sinking.reason)


def _run(pool: Pool, held: set[str]) -> Iterator[Step]:
    ready = [
        m
        for m in pool.models
        if m.is_resident
        and m.queued
        and not m.is_retiring
        and m.name not in held
        and pool.is_free(m)
    ]
    for model in sorted(ready, key=lambda m: (m.last_run, m.arrival, m.name)):
        yield Step(kind=StepKind.RUN, model=model.name, reason=Reason.REQUEST)


def _reason_to_come(model: ModelFacts) -> Reason:
    if model.queued:
        return Reason.REQUEST
    return Reason.EAGER if _is_eager(model) else Reason.CALLED


def _is_eager(model: ModelFacts) -> bool:
    return model.command is not None and model.command.kind is CommandKind.EAGER
