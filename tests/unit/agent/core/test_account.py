"""Ledger alone by example, ledger and lifecycle together by a rule-based state machine."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from vram_agent.core.ledger import Ledger, OverCapacityError, UnknownChargeError
from vram_agent.core.lifecycle import ABSENT, Event, Residence, decide_residence
from vram_agent.protocol import ModelState, Tier

CAPACITY = {"A": 100, "B": 60}
BUDGET = 130


def empty() -> Ledger:
    return Ledger(budget_bytes=BUDGET, capacity_bytes=CAPACITY)


def test_a_reservation_counts_before_it_is_committed() -> None:
    ledger = empty().reserve("m", "A", 70)
    assert (ledger.device_left_bytes("A"), ledger.budget_left_bytes()) == (30, 60)
    assert ledger.uncommitted_on("A") == 70
    with pytest.raises(OverCapacityError, match=r"needs 31 bytes.* 30 are left"):
        ledger.reserve("n", "A", 31)


def test_the_budget_binds_over_all_devices() -> None:
    ledger = empty().reserve("m", "A", 100)
    with pytest.raises(OverCapacityError):
        ledger.reserve("n", "B", 31)
    assert ledger.reserve("n", "B", 30).available_bytes("B") == 0


@pytest.mark.parametrize(
    ("declared", "measured", "charged"),
    [
        pytest.param(50, 20, 50, id="declared binds when it is the larger"),
        pytest.param(20, 50, 50, id="measured binds when it is the larger"),
        pytest.param(0, 50, 50, id="without a declaration the measurement binds"),
    ],
)
def test_a_commit_charges_the_larger_figure(declared: int, measured: int, charged: int) -> None:
    assert empty().reserve("m", "A", 20).commit("m", measured, declared).charged_bytes == charged


def test_the_learned_size_is_the_largest_measured_and_outlives_the_charge() -> None:
    ledger = empty().reserve("m", "A", 0).commit("m", 40, 0).release("m")
    ledger = ledger.reserve("m", "A", 40).commit("m", 30, 0).release("m")
    assert ledger.expected_bytes("m", 0, 10) == 40
    assert ledger.forget("m").expected_bytes("m", 0, 10) == 10


def test_a_hint_counts_until_the_model_was_measured_and_refuses_nothing_by_itself() -> None:
    ledger = empty().with_hint("m", 40)
    assert ledger.expected_bytes("m", 0, 10) == 40
    assert ledger.expected_bytes("m", 50, 10) == 50
    measured = ledger.reserve("m", "A", 40).commit("m", 30, 0)
    assert measured.expected_bytes("m", 0, 10) == 30
    assert ledger.forget("m").expected_bytes("m", 0, 10) == 10
    # A has 100, more than B, and the budget more than either.
    assert empty().with_hint("m", 500).expected_bytes("m", 0, 10) == 100
    assert empty().with_limits(80, CAPACITY).with_hint("m", 500).expected_bytes("m", 0, 10) == 80


def test_a_measurement_beyond_the_budget_is_written_down_not_refused() -> None:
    ledger = empty().reserve("m", "A", 10).commit("m", 200, 0)
    assert ledger.budget_left_bytes() == -70
    with pytest.raises(OverCapacityError):
        ledger.reserve("n", "B", 1)


def test_a_commit_without_a_reservation_is_a_fault() -> None:
    with pytest.raises(UnknownChargeError):
        empty().commit("m", 1, 1)


class Account(RuleBasedStateMachine):
    """Models move at random; the ledger is checked against a plain sum kept beside it."""

    at_rest = Bundle("at_rest")
    moving = Bundle("moving")
    in_vram = Bundle("in_vram")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = empty()
        self.residences: dict[str, Residence] = {}
        self.held: dict[str, tuple[str, int]] = {}

    def move(self, name: str, event: Event) -> None:
        self.residences[name] = decide_residence(self.residences[name], event)

    @rule(target=at_rest, number=st.integers(0, 6))
    def load(self, number: int) -> str:
        name = f"m{number}"
        if self.residences.get(name, ABSENT) == ABSENT:
            self.residences[name] = ABSENT
            self.move(name, Event.LOAD)
            self.move(name, Event.LOADED)
        return name

    @rule(
        target=moving,
        name=at_rest,
        device=st.sampled_from(sorted(CAPACITY)),
        size=st.integers(0, 80),
    )
    def restore(self, name: str, device: str, size: int) -> tuple[str, int]:
        if self.residences[name].state is not ModelState.OFFLOADED:
            return name, -1
        before = self.ledger
        try:
            self.ledger = self.ledger.reserve(name, device, size)
        except OverCapacityError:
            assert self.ledger is before
            here = sum(n for d, n in self.held.values() if d == device)
            total = sum(n for _, n in self.held.values())
            assert here + size > CAPACITY[device] or total + size > BUDGET
            return name, -1
        self.move(name, Event.RESTORE)
        self.held[name] = (device, size)
        return name, size

    @rule(target=in_vram, what=consumes(moving), share=st.floats(0, 1), declared=st.integers(0, 1))
    def restored(self, what: tuple[str, int], share: float, declared: int) -> str:
        name, size = what
        if self.residences[name].state is ModelState.RESTORING and size >= 0:
            measured = int(size * share)
            self.move(name, Event.RESTORED)
            self.ledger = self.ledger.commit(name, measured, declared * size)
            self.held[name] = (self.held[name][0], max(measured, declared * size))
        return name

    @rule(what=consumes(moving), event=st.sampled_from([Event.ROLLED_BACK, Event.GPU_LOST]))
    def roll_back(self, what: tuple[str, int], event: Event) -> None:
        name, _ = what
        if self.residences[name].state is ModelState.RESTORING:
            self.move(name, event)
            self.ledger = self.ledger.release(name)
            del self.held[name]

    @rule(
        name=in_vram,
        events=st.sampled_from(
            [
                (Event.OFFLOAD, Event.OFFLOADED_PINNED),
                (Event.OFFLOAD, Event.OFFLOADED_HOST),
                (Event.OFFLOAD, Event.GPU_LOST),
                (Event.GPU_LOST,),
            ]
        ),
    )
    def leave(self, name: str, events: tuple[Event, ...]) -> None:
        if self.residences[name].state is ModelState.RESIDENT:
            for event in events:
                self.move(name, event)
            self.ledger = self.ledger.release(name)
            del self.held[name]

    @invariant()
    def bytes_are_conserved(self) -> None:
        assert self.ledger.charged_bytes == sum(size for _, size in self.held.values())
        for device in CAPACITY:
            here = sum(size for d, size in self.held.values() if d == device)
            assert self.ledger.charged_on(device) == here

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        assert self.ledger.charged_bytes <= BUDGET
        for device, capacity in CAPACITY.items():
            assert self.ledger.charged_on(device) <= capacity

    @invariant()
    def only_what_is_in_vram_or_on_its_way_is_charged(self) -> None:
        charged = {
            name
            for name, residence in self.residences.items()
            if residence.tier is Tier.VRAM or residence.state is ModelState.RESTORING
        }
        assert charged == set(self.ledger.charges)


TestAccount = Account.TestCase
