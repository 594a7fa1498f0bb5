"""Which of several devices a model goes to, and what leaves for it there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.core.admission import (
    Admission,
    Earmarks,
    EndIdleProcess,
    Evict,
    Fits,
    TooLarge,
    Wait,
    decide_admission,
)
from vram_agent.core.ledger import UNLIMITED_BYTES
from vram_agent.core.lifecycle import HOSTED, PINNED, RESIDENT, Residence
from vram_agent.core.policy import decide
from vram_agent.core.pool import GroupFacts, ModelFacts, Pool, Step
from vram_agent.protocol import ModelState, Tier

from tests.unit.agent.core.facts import GIB, NOW, hosted, model, pinned, pool, resident

TWO = {"A": 10 * GIB, "B": 6 * GIB}
LEAVING = Residence(ModelState.OFFLOADING, Tier.VRAM)


def x(gib: float = 4, **fields: Any) -> ModelFacts:
    return hosted("x", queued=1, needed_bytes=int(gib * GIB), **fields)


def held(name: str, gib: int, **fields: Any) -> ModelFacts:
    return resident(name, needed_bytes=gib * GIB, **fields)


def admit(facts: Pool) -> Admission:
    return decide_admission(facts, facts.model("x"), Earmarks(), NOW)


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        pytest.param(
            [x()], {}, Fits(device="B"), id="of two with room the one that keeps the least"
        ),
        pytest.param([x(8)], {}, Fits(device="A"), id="a large model finds the place kept for it"),
        pytest.param(
            [x(0)], {}, Fits(device="A"), id="what is not known yet goes where most is free"
        ),
        pytest.param(
            [x(), held("a", 7)],
            {},
            Fits(device="B"),
            id="where only one has room it goes there without an eviction",
        ),
        pytest.param(
            [x(device="A")], {}, Fits(device="A"), id="where its config says, whatever fits better"
        ),
        pytest.param(
            [x(device="A"), held("a", 9)],
            {},
            Evict(device="A", victims=("a",)),
            id="where its config says, even at another model's cost",
        ),
        pytest.param(
            [x(group="g"), held("mate", 1, group="g")],
            {"at": {"mate": "A"}},
            Fits(device="A"),
            id="where its group's GPU process is",
        ),
        pytest.param(
            [x()],
            {"free_bytes": {"A": 8 * GIB, "B": 3 * GIB}},
            Fits(device="A"),
            id="memory of strangers is no room",
        ),
        pytest.param(
            [x(out_of_vram_on=frozenset({"B"}))],
            {},
            Fits(device="A"),
            id="not again where the driver refused it",
        ),
        pytest.param(
            [x(), held("busy", 9, leases=1), held("idle", 5)],
            {"at": {"busy": "A", "idle": "B"}},
            Evict(device="B", victims=("idle",)),
            id="an idle victim on one device before a wait for the other",
        ),
        pytest.param(
            [x(), held("high", 9, priority=5), held("low", 5)],
            {"at": {"high": "A", "low": "B"}},
            Evict(device="B", victims=("low",)),
            id="of two evictions the one of the lower priority",
        ),
        pytest.param(
            [x(), held("a", 8), held("b1", 2), held("b2", 2)],
            {"at": {"a": "A", "b1": "B", "b2": "B"}},
            Evict(device="A", victims=("a",)),
            id="of two evictions the one with fewer victims",
        ),
        pytest.param(
            [x(), held("a", 9), model("b", LEAVING, needed_bytes=5 * GIB)],
            {"at": {"a": "A", "b": "B"}, "groups": {"b": GroupFacts(is_busy=True)}},
            Wait(device="B"),
            id="memory on its way back before an eviction elsewhere",
        ),
        pytest.param(
            [x(11)],
            {},
            TooLarge(
                message=f"model x needs {11 * GIB} bytes of VRAM; the budget is unlimited, "
                f"device A has {10 * GIB} bytes after the headroom"
            ),
            id="what fits on none is refused with the figures of the largest",
        ),
        pytest.param(
            [pinned("x", queued=1, needed_bytes=4 * GIB), held("busy", 5, leases=1)],
            {"at": {"x": "B", "busy": "B"}},
            EndIdleProcess(device="A", group="x"),
            id="its own idle GPU process ends where another device has room at once",
        ),
        pytest.param(
            [
                pinned("x", queued=1, needed_bytes=4 * GIB),
                model("b", LEAVING, needed_bytes=5 * GIB),
            ],
            {"at": {"x": "B", "b": "B"}, "groups": {"b": GroupFacts(is_busy=True, device="B")}},
            Wait(device="B"),
            id="but not where its own device is being left already",
        ),
        pytest.param(
            [pinned("x", queued=1, needed_bytes=4 * GIB, device="B"), held("busy", 5, leases=1)],
            {"at": {"x": "B", "busy": "B"}},
            Wait(device="B", held=("busy",)),
            id="but not where its config binds it",
        ),
        pytest.param(
            [pinned("x", queued=1, needed_bytes=8 * GIB, group="g"), held("a", 9)],
            {"at": {"x": "B", "a": "A"}},
            EndIdleProcess(device="B", group="g"),
            id="a device that can never hold it is left, even for one without room yet",
        ),
        pytest.param(
            [x(8, group="g"), held("mate", 1, group="g")],
            {"at": {"mate": "B"}},
            Evict(device="B", victims=("mate",)),
            id="models of its group leave with it",
        ),
        pytest.param(
            [x(8, group="g"), held("mate", 1, group="g", queued=1, resident_since=NOW)],
            {"at": {"mate": "B"}},
            Wait(device="B", held=("mate",)),
            id="once their turn is over",
        ),
        pytest.param(
            [x(5, device="B"), pinned("idle")],
            {
                "groups": {"idle": GroupFacts(has_gpu_process=True, device_bytes=1, device="A")},
                "free_bytes": {"A": GIB, "B": GIB},
            },
            Wait(device="B", until=NOW + 0.2, is_short=True),
            id="a context on another device is not in the way",
        ),
    ],
)
def test_a_model_is_admitted(
    models: list[ModelFacts], options: dict[str, Any], expected: Admission
) -> None:
    assert admit(pool(models, devices=TWO, **options)) == expected


def test_a_pinned_model_that_moves_ends_its_process_and_costs_no_eviction() -> None:
    facts = pool(
        [pinned("x", queued=1, needed_bytes=4 * GIB), held("busy", 5, leases=1)],
        devices=TWO,
        at={"x": "B", "busy": "B"},
    )
    step = decide(facts, NOW).step
    assert step is not None
    assert (step.kind, step.model, step.reason, step.beneficiary) == ("end_gpu", "x", "Moved", "")


def test_the_budget_binds_over_all_devices() -> None:
    facts = pool([x(), held("a", 5)], devices=TWO, budget=8 * GIB)
    # Both have room, A with 5 GiB left the less; what is missing is in the budget.
    assert admit(facts) == Evict(device="A", victims=("a",))


def test_what_fits_on_a_larger_device_than_its_groups_is_not_refused_before_its_load() -> None:
    facts = pool(
        [model("x", queued=1, needed_bytes=8 * GIB, group="g"), held("mate", 1, group="g")],
        devices=TWO,
        at={"mate": "B"},
    )
    step = decide(facts, NOW).step
    assert step is not None
    assert (step.kind, step.reason) == ("end_gpu", "GroupChanged")


def test_an_index_that_no_device_has_is_refused_for_good() -> None:
    facts = pool([model("a", queued=1, missing_device="7")], devices=TWO)
    step = decide(facts, NOW).step
    assert step is not None
    assert (step.kind, step.is_permanent) == ("refuse", True)
    assert "device 7; this pod has 2" in step.message


rows = st.lists(
    st.tuples(
        st.integers(1, 6),  # GiB
        st.sampled_from("ABC"),
        st.integers(-1, 1),  # priority
        st.booleans(),  # leased
        st.booleans(),  # has a queue
    ),
    max_size=8,
)
capacities = st.fixed_dictionaries({name: st.integers(1, 12) for name in "ABC"})


def build(rows: Any, sizes: dict[str, int], need: int, budget: int) -> Pool:
    """Residents as far as they fit, and one model that waits."""
    left = dict(sizes)
    models, at = [x(need)], {}
    for n, (gib, device, priority, is_leased, has_queue) in enumerate(rows):
        if gib > left[device]:
            continue
        left[device] -= gib
        at[f"m{n}"] = device
        models.append(
            held(f"m{n}", gib, priority=priority, leases=int(is_leased), queued=int(has_queue))
        )
    return pool(
        models,
        devices={name: gib * GIB for name, gib in sizes.items()},
        at=at,
        budget=budget * GIB if budget else UNLIMITED_BYTES,
    )


@given(rows, capacities, st.integers(1, 12), st.integers(0, 20))
def test_what_is_admitted_can_be_reserved_and_what_is_evicted_makes_room_for_it(
    rows: Any, sizes: dict[str, int], need: int, budget: int
) -> None:
    facts = build(rows, sizes, need, budget)
    admission = admit(facts)
    if isinstance(admission, Evict):
        assert all(facts.model(name).leases == 0 for name in admission.victims)
        assert len(set(admission.victims)) == len(admission.victims) > 0
    if isinstance(admission, Fits):
        vram = facts.vram.reserve("x", admission.device, need * GIB)
        assert vram.charged_on(admission.device) <= sizes[admission.device] * GIB
        assert vram.charged_bytes <= vram.budget_bytes
    if isinstance(admission, TooLarge):
        assert need > max(sizes.values()) or 0 < budget < need


@given(rows, capacities, st.integers(1, 12))
def test_where_it_fits_somewhere_nothing_is_evicted_and_nobody_waits(
    rows: Any, sizes: dict[str, int], need: int
) -> None:
    facts = build(rows, sizes, need, 0)
    room = {name: facts.vram.device_left_bytes(name) for name in sizes}
    fitting = {name: left for name, left in room.items() if left >= need * GIB}
    admission = admit(facts)
    assert isinstance(admission, Fits) == bool(fitting)
    if isinstance(admission, Fits):
        assert room[admission.device] == min(fitting.values())


@given(rows, capacities, st.integers(1, 12), st.integers(0, 20))
def test_evicting_once_is_enough(rows: Any, sizes: dict[str, int], need: int, budget: int) -> None:
    facts = build(rows, sizes, need, budget)
    admission = admit(facts)
    if not isinstance(admission, Evict) or any(m.leases or m.queued for m in facts.models[1:]):
        return
    vram = facts.vram
    for name in admission.victims:
        vram = vram.release(name)
    after = tuple(
        replace(m, residence=Residence(ModelState.OFFLOADED, Tier.PINNED_HOST))
        if m.name in admission.victims
        else m
        for m in facts.models
    )
    assert isinstance(admit(replace(facts, models=after, vram=vram)), Fits)


def carry_out(facts: Pool, step: Step) -> Pool:
    """What is so once a step has been taken to its end."""
    target = facts.model(step.model)
    models = {m.name: m for m in facts.models}
    groups, vram = dict(facts.groups), facts.vram
    group = groups[target.group]
    match step.kind:
        case "run" | "refuse":
            models[target.name] = replace(target, queued=0, short_since=None)
        case "restore":
            vram = vram.reserve(target.name, step.device, target.needed_bytes)
            vram = vram.commit(target.name, target.needed_bytes, 0)
            models[target.name] = replace(target, residence=RESIDENT, resident_since=NOW)
            assert group.device in ("", step.device)
            groups[target.group] = replace(group, has_gpu_process=True, device=step.device)
        case "offload":
            vram = vram.release(target.name)
            models[target.name] = replace(target, residence=PINNED)
        case "end_gpu":
            for member in facts.models:
                if member.group == target.group:
                    vram = vram.release(member.name)
                    models[member.name] = replace(member, residence=HOSTED)
            groups[target.group] = GroupFacts()
        case _:
            pytest.fail(f"no {step.kind} was expected")
    return replace(facts, models=tuple(models.values()), groups=groups, vram=vram)


@given(rows, capacities, st.integers(1, 14), st.integers(0, 20), st.sampled_from(["", *"ABC"]))
def test_whatever_holds_the_devices_a_waiting_model_is_served_or_refused_and_then_all_rest(
    rows: Any, sizes: dict[str, int], need: int, budget: int, pinned_on: str
) -> None:
    facts = build([(*row[:3], False, False) for row in rows], sizes, need, budget)
    if pinned_on:
        process = GroupFacts(has_gpu_process=True, device=pinned_on)
        x_pinned = replace(facts.model("x"), residence=PINNED)
        facts = replace(
            facts,
            models=(x_pinned, *facts.models[1:]),
            groups={**facts.groups, "x": process},
        )
    kinds = []
    for _ in range(30):
        step = decide(facts, NOW).step
        if step is None:
            break
        kinds.append(step.kind.value)
        facts = carry_out(facts, step)
        for name, gib in sizes.items():
            assert facts.vram.charged_on(name) <= gib * GIB
    else:
        pytest.fail(f"it does not come to rest: {kinds}")
    could_fit = need <= max(sizes.values()) and (not budget or need <= budget)
    assert kinds.count("run") == int(could_fit)
    assert kinds.count("refuse") == int(not could_fit)
    assert not budget or facts.vram.charged_bytes <= budget * GIB
    assert decide(facts, NOW).step is None
