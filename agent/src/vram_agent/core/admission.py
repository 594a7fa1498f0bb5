"""Whether a model may come into VRAM now, and which models leave for it.

Why it exists: the one place that compares what a model needs with what there is. Called by
``policy`` alone; pure. All figures are bytes, times are seconds of one monotonic clock.

What there is has three bounds: the budget over all devices and the device's capacity (both in the
ledger), and the memory that the driver says is free (contexts and strangers are in no ledger).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vram_agent.core.dirty import CHECK_SECONDS
from vram_agent.core.ledger import UNLIMITED_BYTES
from vram_agent.core.pool import ModelFacts, Pool
from vram_agent.protocol import ModelState, Tier

SETTLE_SECONDS: Final = 5.0
"""How long memory that none of our models holds may take to come back before a request fails:
drivers return it after the process that held it has gone."""
SETTLE_CHECK_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """The bytes are there: reserve them."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """These leave first; a minimal set of models that no task runs on."""

    device: str
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndIdleProcess:
    """The GPU process of this group, which holds no resident model, is in the way.

    Its context takes what is missing; or it is the model's own, and on a device without room.
    """

    device: str
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """The bytes are on their way, or will be when the held models' tasks end."""

    device: str
    held: tuple[str, ...] = ()
    """No new task begins on these until the model is up: their turn is over."""
    until: float | None = None
    is_short: bool = False
    """What is missing is held by no model of ours."""
    note: str = ""
    """Why, where no model or process of ours has a part in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLarge:
    """It never fits, whatever leaves."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """It does not fit beside what others than our models hold, and waiting did not help."""

    message: str


Admission = Fits | Evict | EndIdleProcess | Wait | TooLarge | NoRoom
_LONG_WAIT: Final = 4
_COSTS: Final = {Fits: 0, EndIdleProcess: 3, NoRoom: 6, TooLarge: 7}
"""See ``_cost``, which places Evict and the kinds of Wait between them."""


@dataclass(slots=True)
class Earmarks:
    """What models that came earlier in the same decision wait for; later ones leave it to them."""

    by_device: dict[str, int] = field(default_factory=dict)

    def add(self, device: str, wanted_bytes: int) -> None:
        """Set bytes aside."""
        self.by_device[device] = self.by_device.get(device, 0) + wanted_bytes

    def total(self) -> int:
        """Over all devices."""
        return sum(self.by_device.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """What is missing, in the budget and on the device; negative where there is more than enough.

    ``needs_leavers``: covered only once models that are leaving have left.
    """

    budget_bytes: int
    device_bytes: int
    measured_bytes: int
    needs_leavers: bool

    @property
    def is_covered(self) -> bool:
        """Whether nothing is missing once what leaves has left."""
        return self.budget_bytes <= 0 and self.device_bytes <= 0 and self.measured_bytes <= 0

    @property
    def is_foreign(self) -> bool:
        """Whether only the measured figure is short: no model of ours holds what is missing."""
        return self.budget_bytes <= 0 and self.device_bytes <= 0 < self.measured_bytes


def decide_admission(pool: Pool, model: ModelFacts, earmarks: Earmarks, now: float) -> Admission:
    """Decide whether, and where, a model whose weights are in host memory may be restored.

    Every device that it may go to is judged by itself; what costs least wins. Nothing to do comes
    before memory that is on its way back, that before an eviction, that before a longer wait, and
    a wait before a refusal. Of two evictions the one whose dearest victim matters less, then the
    one with fewer victims; else the order of ``rank_devices``.

    A GPU process that would keep its model waiting is ended where the model fits on another device
    right away; and one whose device can never hold the model, as soon as its other models let go.
    """

    def judge(devices: Iterable[str]) -> Admission:
        verdicts = [admit_on(device, pool, model, earmarks, now) for device in devices]
        return min(verdicts, key=lambda admission: _cost(pool, admission))

    admission = judge(rank_devices(pool, model))
    if isinstance(admission, TooLarge) and model.needed_bytes <= largest_limit_bytes(pool, model):
        return _leave_device(pool, model, now)
    if _cost(pool, admission)[0] >= _LONG_WAIT and _can_change_device(pool, model):
        elsewhere = judge(pool.vram.capacity_bytes)
        if isinstance(elsewhere, Fits):
            return EndIdleProcess(device=elsewhere.device, group=model.group)
    return admission


def admit_on(  # noqa: PLR0911 - one return for each branch of the docstring
    device: str, pool: Pool, model: ModelFacts, earmarks: Earmarks, now: float
) -> Admission:
    """Decide for one device.

    1. The model is larger than the budget or the device: TooLarge, with the figures.
    2. Others use the device, and the config says to stay away: NoRoom, or Wait until they leave.
    3. Nothing is missing: Fits.
    4. What is missing is leaving already: Wait.
    5. Models that no task runs on cover it: Evict a minimal set of them.
    6. So they do together with models whose turn is over: Evict those that can leave, then Wait,
       holding back new tasks on the others.
    7. Models in their turn would be needed: Wait for the end of it.
    8. No set of models covers it, so contexts or strangers hold the rest: Evict what is idle on
       the device, one after the other, then EndIdleProcess, then Wait for SETTLE_SECONDS, then
       NoRoom.
    """
    # 1
    limit = pool.vram.limit_bytes(device)
    if model.needed_bytes > limit:
        return TooLarge(
            message=f"model {model.name} needs {model.needed_bytes} bytes of VRAM; "
            f"the budget is {_show(pool.vram.budget_bytes)}, "
            f"device {device or '(any)'} has {_show(pool.vram.capacity_of(device))} "
            "after the headroom"
        )
    # 2
    if (closed := pool.closed.get(device)) is not None:
        if closed.is_refused:
            return NoRoom(message=f"model {model.name} was not brought up: {closed.explain()}")
        return Wait(device=device, until=now + CHECK_SECONDS, note=closed.explain())
    shortage = compute_shortage(pool, model, device, earmarks)
    # 3, 4
    if shortage.is_covered:
        return Wait(device=device) if shortage.needs_leavers else Fits(device=device)
    # 5
    ranked = rank_candidates(pool, model.name)
    ready = [m for m in ranked if is_evictable(pool, m, now)]
    if victims := choose_victims(pool, ready, shortage, device):
        return Evict(device=device, victims=victims)
    # 6
    yielding = [m for m in ranked if _turn_ends_at(m) <= now]
    if chosen := choose_victims(pool, yielding, shortage, device):
        free = tuple(name for name in chosen if is_evictable(pool, pool.model(name), now))
        if free:
            return Evict(device=device, victims=free)
        return Wait(device=device, held=chosen)
    # 7
    if choose_victims(pool, ranked, shortage, device):
        ends = [_turn_ends_at(m) for m in ranked if _turn_ends_at(m) > now]
        return Wait(device=device, until=min(ends, default=None))
    # 8
    for idle in ready:
        if not idle.wants_vram and _device_of(pool, idle) == device:
            return Evict(device=device, victims=(idle.name,))
    return _admit_among_strangers(pool, model, shortage, (device, now))


def largest_limit_bytes(pool: Pool, model: ModelFacts) -> int:
    """Return the most that the model could hold on any device that its config allows."""
    devices = [model.device] if model.device else pool.vram.capacity_bytes or [""]
    return max(map(pool.vram.limit_bytes, devices))


def rank_devices(pool: Pool, model: ModelFacts) -> list[str]:
    """Return the devices that the model may go to, the best fit in front; one at least.

    1. Where its group's GPU process is, or its config says: there alone.
    2. Devices with room for it, the one that keeps the least room in front, so that large models
       find a place elsewhere; then the others, the one with the most room in front.
    3. How much it needs is not known yet: the one with the most room in front.
    """
    # 1
    bound = pool.groups[model.group].device or model.device
    if bound or not pool.vram.capacity_bytes:
        return [bound]

    # 2, 3
    def place(uuid: str) -> tuple[bool, int]:
        left = pool.vram.device_left_bytes(uuid)
        free = pool.free_bytes.get(uuid, UNLIMITED_BYTES) - pool.vram.uncommitted_on(uuid)
        room = min(left, free)
        is_enough = 0 < model.needed_bytes <= room and uuid not in model.out_of_vram_on
        return not is_enough, room if is_enough else -room

    # The sort is stable: devices with the same room stay in the order of their indexes.
    return sorted(pool.vram.capacity_bytes, key=place)


def _cost(pool: Pool, admission: Admission) -> tuple[int, tuple[tuple[bool, int], ...]]:
    """What it costs to go along with a verdict, for comparison with the other devices'."""
    match admission:
        case Evict(victims=victims):
            dear = [(m.wants_vram, m.priority) for m in map(pool.model, victims)]
            return 2, tuple(sorted(dear, reverse=True))
        case Wait(held=held, until=until, is_short=is_short):
            is_leaving = not held and until is None
            return (1 if is_leaving else _LONG_WAIT + is_short), ()
        case _:
            return _COSTS[type(admission)], ()


def compute_shortage(pool: Pool, model: ModelFacts, device: str, earmarks: Earmarks) -> Shortage:
    """Return what is missing for the model once everything that leaves has left."""
    leaving_here = leaving_anywhere = 0
    for other in pool.models:
        if other.residence.state is ModelState.OFFLOADING:
            charge = pool.vram.charges.get(other.name)
            if charge is not None:
                leaving_anywhere += charge.held_bytes
                leaving_here += charge.held_bytes if charge.device == device else 0
    marked = earmarks.by_device.get(device, 0)
    budget_left = pool.vram.budget_left_bytes() - earmarks.total()
    device_left = pool.vram.device_left_bytes(device) - marked
    free = pool.free_bytes.get(device, UNLIMITED_BYTES)
    measured_left = free - pool.vram.uncommitted_on(device) - marked
    if device in model.out_of_vram_on:
        measured_left = 0
    need = model.needed_bytes
    return Shortage(
        budget_bytes=need - budget_left - leaving_anywhere,
        device_bytes=need - device_left - leaving_here,
        measured_bytes=need - measured_left - leaving_here,
        needs_leavers=need > min(budget_left, device_left, measured_left),
    )


def rank_candidates(pool: Pool, beneficiary: str = "") -> list[ModelFacts]:
    """Return the resident models but for the beneficiary, those that should leave first in front.

    Without waiting requests before with, then lower priority, then least recently used.
    """
    held = [
        m for m in pool.models if m.is_resident and m.name != beneficiary and pool.held_bytes(m) > 0
    ]
    return sorted(held, key=lambda m: (m.wants_vram, m.priority, m.last_used_at, m.name))


def is_evictable(pool: Pool, model: ModelFacts, now: float) -> bool:
    """Whether the model may leave VRAM now: no task on it, and nobody in its turn waits for it."""
    return model.leases == 0 and pool.is_free(model) and _turn_ends_at(model) <= now


def choose_victims(
    pool: Pool, ranked: Sequence[ModelFacts], shortage: Shortage, device: str
) -> tuple[str, ...]:
    """Return a minimal set that covers the shortage, nothing where there is none.

    Takes in order until enough, then gives back, from the last that should leave, each one that
    is not needed: no victim of the result could stay.
    """
    chosen: list[ModelFacts] = []
    for candidate in ranked:
        if _covers(pool, chosen, shortage, device):
            break
        if shortage.budget_bytes > 0 or _device_of(pool, candidate) == device:
            chosen.append(candidate)
    if not _covers(pool, chosen, shortage, device):
        return ()
    for candidate in reversed(chosen[:]):
        rest = [m for m in chosen if m is not candidate]
        if _covers(pool, rest, shortage, device):
            chosen = rest
    return tuple(m.name for m in chosen)


def _covers(pool: Pool, chosen: Iterable[ModelFacts], shortage: Shortage, device: str) -> bool:
    here = anywhere = 0
    for model in chosen:
        held = pool.held_bytes(model)
        anywhere += held
        here += held if _device_of(pool, model) == device else 0
    return (
        anywhere >= shortage.budget_bytes
        and here >= shortage.device_bytes
        and here >= shortage.measured_bytes
    )


def _can_change_device(pool: Pool, model: ModelFacts) -> bool:
    """Whether only an idle GPU process, which loses nothing by its end, binds it to a device."""
    members = [model, *pool.mates(model)]
    return (
        pool.groups[model.group].device != ""
        and not model.device
        and not any(m.is_resident or m.loads_on_device for m in members)
    )


def _leave_device(pool: Pool, model: ModelFacts, now: float) -> Admission:
    device = pool.groups[model.group].device
    residents = [mate for mate in pool.mates(model) if mate.is_resident]
    if not residents:
        return EndIdleProcess(device=device, group=model.group)
    free = tuple(mate.name for mate in residents if is_evictable(pool, mate, now))
    if free:
        return Evict(device=device, victims=free)
    return Wait(device=device, held=tuple(mate.name for mate in residents))


def _device_of(pool: Pool, model: ModelFacts) -> str:
    charge = pool.vram.charges.get(model.name)
    return model.device if charge is None else charge.device


def _turn_ends_at(model: ModelFacts) -> float:
    """A model that nobody waits for has no turn to finish."""
    if not model.queued:
        return float("-inf")
    return model.resident_since + model.turn_seconds


def _admit_among_strangers(
    pool: Pool, model: ModelFacts, shortage: Shortage, where: tuple[str, float]
) -> Admission:
    device, now = where
    for name, group in sorted(pool.groups.items()):
        members = [m for m in pool.models if m.group == name]
        is_pinned_only = all(m.residence.tier is not Tier.VRAM for m in members)
        if (
            name != model.group
            and group.device in ("", device)
            and group.has_gpu_process
            and not group.is_busy
            and is_pinned_only
            and (group.device_bytes or 0) > 0
            and not any(m.wants_vram for m in members)
        ):
            return EndIdleProcess(device=device, group=name)
    is_busy = any(g.is_busy and g.device in ("", device) for g in pool.groups.values())
    if not shortage.is_foreign or is_busy:
        return Wait(device=device, until=now + SETTLE_CHECK_SECONDS)
    since = now if model.short_since is None else model.short_since
    if now - since < SETTLE_SECONDS:
        return Wait(device=device, until=now + SETTLE_CHECK_SECONDS, is_short=True)
    return NoRoom(
        message=f"model {model.name} needs {model.needed_bytes} bytes of VRAM on device "
        f"{device or '(any)'}; {max(0, model.needed_bytes - shortage.measured_bytes)} are free "
        "and no model of this pod could leave for it"
    )


def _show(limit_bytes: int) -> str:
    return "unlimited" if limit_bytes >= UNLIMITED_BYTES else f"{limit_bytes} bytes"
