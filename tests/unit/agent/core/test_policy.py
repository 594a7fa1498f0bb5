from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.core.admission import Earmarks, Evict, choose_victims, decide_admission
from vram_agent.core.admission import Shortage as Missing
from vram_agent.core.lifecycle import Residence
from vram_agent.core.policy import decide
from vram_agent.core.pool import Command, CommandKind, GroupFacts, ModelFacts, Pool
from vram_agent.protocol import ModelState, OffloadTier, Residency, Tier

from tests.unit.agent.core.facts import (
    DEVICE,
    GIB,
    NOW,
    hosted,
    model,
    pinned,
    pool,
    resident,
)

OFFLOAD = Residency()
LEAVING = Residence(ModelState.OFFLOADING, Tier.VRAM)


def step(of: Pool) -> tuple[str, str, str] | None:
    found = decide(of, NOW).step
    return None if found is None else (found.kind.value, found.model, found.reason.value)


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        pytest.param([model("a")], {}, None, id="nothing is loaded that nobody asked for"),
        pytest.param(
            [model("a", queued=1)], {}, ("load", "a", "Request"), id="a request loads its model"
        ),
        pytest.param(
            [hosted("a", queued=1)],
            {},
            ("restore", "a", "Request"),
            id="a request restores its model",
        ),
        pytest.param(
            [resident("a", queued=1)], {}, ("run", "a", "Request"), id="a resident model runs"
        ),
        pytest.param(
            [resident("a", queued=1, leases=1)], {}, None, id="a group does one thing at a time"
        ),
        pytest.param(
            [model("a", command=Command(kind=CommandKind.EAGER))],
            {},
            ("load", "a", "Eager"),
            id="an eager model is loaded without a request",
        ),
        pytest.param(
            [hosted("a", queued=1), resident("b")],
            {"budget": GIB},
            ("offload", "b", "Evicted"),
            id="an idle model leaves for a request",
        ),
        pytest.param(
            [hosted("a", queued=1), resident("b", leases=1)],
            {"budget": GIB},
            None,
            id="a leased model never leaves",
        ),
        pytest.param(
            [hosted("a", queued=1), resident("b", queued=1, resident_since=NOW - 0.5)],
            {"budget": GIB},
            ("run", "b", "Request"),
            id="a model in its turn goes on",
        ),
        pytest.param(
            [hosted("a", queued=1), resident("b", queued=1, resident_since=NOW - 1.5)],
            {"budget": GIB},
            ("offload", "b", "Evicted"),
            id="a model whose turn is over leaves for another",
        ),
        pytest.param(
            [
                hosted("a", queued=1, needed_bytes=2 * GIB),
                resident("b", queued=1, resident_since=0.0),
                resident("c", leases=1, queued=1, resident_since=0.0),
            ],
            {"budget": 2 * GIB},
            ("offload", "b", "Evicted"),
            id="of two whose turn is over the free one leaves first",
        ),
        pytest.param(
            [
                hosted("a", queued=1),
                resident("new", last_used_at=NOW - 1),
                resident("old", last_used_at=NOW - 9),
            ],
            {"budget": 2 * GIB},
            ("offload", "old", "Evicted"),
            id="the least recently used leaves first",
        ),
        pytest.param(
            [
                hosted("a", queued=1),
                resident("low", priority=-1, last_used_at=NOW),
                resident("old", last_used_at=NOW - 9),
            ],
            {"budget": 2 * GIB},
            ("offload", "low", "Evicted"),
            id="the lowest priority leaves before the least recently used",
        ),
        pytest.param(
            [
                hosted("a", queued=1, needed_bytes=4 * GIB),
                resident("small", last_used_at=NOW - 9),
                resident("large", needed_bytes=4 * GIB),
            ],
            {"budget": 5 * GIB},
            ("offload", "large", "Evicted"),
            id="what does not help stays even when it is older",
        ),
        pytest.param(
            [hosted("a", queued=1), model("b", LEAVING)],
            {"budget": GIB},
            None,
            id="memory that is leaving is waited for",
        ),
        pytest.param(
            [hosted("a", queued=1, needed_bytes=3 * GIB)],
            {"budget": 2 * GIB},
            ("refuse", "a", "Oversize"),
            id="what never fits is refused",
        ),
        pytest.param(
            [resident("a", residency=OFFLOAD)],
            {},
            ("offload", "a", "AfterTask"),
            id="after its task a model leaves",
        ),
        pytest.param(
            [resident("a", residency=OFFLOAD, keep_alive_seconds=-1.0)],
            {},
            None,
            id="keep-alive -1 keeps",
        ),
        pytest.param(
            [resident("a", keep_alive_seconds=0.0)],
            {},
            ("offload", "a", "KeepAlive"),
            id="keep-alive 0 lets go at once",
        ),
        pytest.param(
            [pinned("a", residency=OFFLOAD, last_used_at=NOW - 600)],
            {},
            ("end_gpu", "a", "Idle"),
            id="an idle model sinks to its idle tier",
        ),
        pytest.param(
            [
                pinned("a", group="g", residency=OFFLOAD, last_used_at=NOW - 600),
                resident("b", group="g", queued=1),
            ],
            {},
            ("run", "b", "Request"),
            id="the GPU process of a mate in use lives on",
        ),
        pytest.param(
            [
                pinned("a", group="g", called_tier=OffloadTier.HOST),
                pinned("b", group="g"),
            ],
            {},
            None,
            id="a caller's wish for one model leaves the GPU process to a mate that rests in it",
        ),
        pytest.param(
            [
                pinned("a", group="g", called_tier=OffloadTier.HOST),
                pinned("b", group="g", called_tier=OffloadTier.HOST),
            ],
            {},
            ("end_gpu", "a", "Called"),
            id="the GPU process ends when callers want every model of it in host memory",
        ),
        pytest.param(
            [model("a", group="g", queued=1), resident("b", group="g")],
            {},
            ("end_gpu", "a", "GroupChanged"),
            id="a load ends the GPU process of its group",
        ),
        pytest.param(
            [model("a", group="g", queued=1), hosted("b", group="g", queued=1)],
            {},
            ("load", "a", "Request"),
            id="a load comes before the restore of a mate",
        ),
        pytest.param(
            [resident("a"), resident("b", last_used_at=NOW - 1)],
            {"budget": GIB},
            ("offload", "b", "OverBudget"),
            id="a budget that shrank is kept by what is unused",
        ),
        pytest.param(
            [hosted("a", queued=1, is_retiring=True)],
            {},
            ("unload", "a", "ConfigChanged"),
            id="a retiring model leaves before anything else",
        ),
        pytest.param(
            [resident("a", command=Command(kind=CommandKind.OFFLOAD, tier=OffloadTier.HOST))],
            {},
            ("end_gpu", "a", "Called"),
            id="a call takes a model out",
        ),
        pytest.param(
            [hosted("a", command=Command(kind=CommandKind.OFFLOAD, tier=OffloadTier.HOST))],
            {},
            ("finish", "a", "Called"),
            id="a call that is fulfilled ends",
        ),
        pytest.param(
            [resident("a", loads_on_device=True, command=Command(kind=CommandKind.UNLOAD))],
            {},
            ("unload", "a", "Called"),
            id="what has no template is unloaded",
        ),
        pytest.param(
            [model("a", queued=1), hosted("b", needed_bytes=GIB)],
            {"host_budget": GIB, "learned": GIB},
            ("unload", "b", "HostBudget"),
            id="host memory is made by unloading what is unused",
        ),
        pytest.param(
            [hosted("new", last_used_at=NOW - 1), hosted("old", last_used_at=NOW - 9)],
            {"host_room_bytes": -1},
            ("unload", "old", "HostPressure"),
            id="near the container's limit the least recently used leaves host memory",
        ),
        pytest.param(
            [hosted("high", priority=1, last_used_at=NOW - 9), hosted("low", last_used_at=NOW)],
            {"host_room_bytes": -1},
            ("unload", "low", "HostPressure"),
            id="near the limit the lowest priority leaves before the least recently used",
        ),
        pytest.param(
            [resident("busy", leases=1), hosted("a", queued=1, leases=1)],
            {"host_room_bytes": -1},
            None,
            id="near the limit what is in use or waited for stays",
        ),
        pytest.param(
            [hosted("a"), model("b", Residence(ModelState.OFFLOADING, Tier.HOST))],
            {"host_room_bytes": -1, "groups": {"b": GroupFacts(is_busy=True)}},
            None,
            id="near the limit one leaves at a time",
        ),
        pytest.param(
            [model("a", queued=1), hosted("b")],
            {"host_room_bytes": GIB // 2, "learned": GIB},
            ("unload", "b", "HostPressure"),
            id="before a load that would reach the limit what is unused leaves",
        ),
        pytest.param(
            [model("a", queued=1)],
            {"host_room_bytes": GIB // 2, "learned": GIB},
            ("load", "a", "Request"),
            id="where nothing could leave it is loaded all the same",
        ),
        pytest.param(
            [model("a", Residence(ModelState.FAILED, Tier.DISK), queued=1, not_before=NOW + 1)],
            {},
            None,
            id="what the kernel ended is left alone for a while",
        ),
        pytest.param(
            [model("a", Residence(ModelState.FAILED, Tier.DISK), queued=1, not_before=NOW)],
            {},
            ("load", "a", "Request"),
            id="and then loaded again",
        ),
        pytest.param(
            [hosted("a")],
            {"groups": {"a": GroupFacts(has_gpu_process=True)}},
            ("end_gpu", "a", "UnusedProcess"),
            id="a GPU process that holds no model ends",
        ),
        pytest.param(
            [model("a", Residence(ModelState.FAILED, Tier.HOST))],
            {},
            ("unload", "a", "Failed"),
            id="a failed model keeps no memory",
        ),
    ],
)
def test_the_next_step(
    models: list[ModelFacts], options: dict[str, Any], expected: tuple[str, str, str] | None
) -> None:
    options = dict(options)
    learned = options.pop("learned", 0)
    facts = pool(models, **options)
    if any(m.residence.state is ModelState.OFFLOADING for m in models):
        facts = replace(facts, groups={**facts.groups, "b": GroupFacts(is_busy=True)})
    if learned:
        host = facts.host.reserve("a", "host", 0).commit("a", learned, 0).release("a")
        facts = replace(facts, host=host)
    assert step(facts) == expected


def test_a_decision_says_when_time_alone_brings_the_next_step() -> None:
    facts = pool([pinned("a", residency=Residency(), last_used_at=NOW - 590)])
    assert decide(facts, NOW).requeue_at == NOW + 10


def test_a_container_with_a_limit_is_looked_at_again_while_it_holds_weights() -> None:
    assert decide(pool([hosted("a")], host_room_bytes=GIB), NOW).requeue_at == NOW + 5
    assert decide(pool([model("a")], host_room_bytes=GIB), NOW).requeue_at is None
    assert decide(pool([hosted("a")]), NOW).requeue_at is None


@given(
    st.lists(
        st.tuples(st.integers(-1, 1), st.integers(0, 9), st.sampled_from(["host", "vram", "busy"])),
        max_size=6,
    )
)
def test_under_pressure_models_leave_one_by_one_in_order_until_only_what_is_used_is_left(
    rows: Any,
) -> None:
    models = [
        hosted(f"m{n}", priority=priority, last_used_at=NOW - age)
        if where == "host"
        else resident(f"m{n}", priority=priority, last_used_at=NOW - age, leases=where == "busy")
        for n, (priority, age, where) in enumerate(rows)
    ]
    left: list[ModelFacts] = []
    while (found := decide(pool(models, host_room_bytes=-1), NOW).step) is not None:
        assert (found.kind, found.reason) == ("unload", "HostPressure")
        left.append(next(m for m in models if m.name == found.model))
        models = [m for m in models if m.name != found.model]
    assert all(m.leases for m in models)
    keys = [(m.is_resident, m.priority, m.last_used_at) for m in left]
    assert keys == sorted(keys)


def test_what_an_earlier_model_waits_for_is_not_given_to_a_later_one() -> None:
    facts = pool(
        [
            hosted("first", queued=1, needed_bytes=3 * GIB, arrival=1),
            hosted("later", queued=1, needed_bytes=GIB, arrival=2),
            resident("busy", leases=1, needed_bytes=2 * GIB),
        ],
        budget=4 * GIB,
    )
    assert step(facts) is None


sizes = st.integers(1, 8).map(lambda n: n * GIB)
residents = st.lists(
    st.tuples(sizes, st.integers(-2, 2), st.integers(0, 9), st.booleans(), st.booleans()),
    max_size=7,
)


def build(rows: list[tuple[int, int, int, bool, bool]], need: int, budget: int) -> Pool:
    models = [
        resident(
            f"m{n}",
            needed_bytes=size,
            priority=priority,
            last_used_at=NOW - age,
            leases=int(is_leased),
            queued=int(has_queue),
            resident_since=0.0,
        )
        for n, (size, priority, age, is_leased, has_queue) in enumerate(rows)
    ]
    return pool([*models, hosted("x", queued=1, needed_bytes=need)], budget=budget)


@given(residents, sizes, sizes.map(lambda n: 2 * n))
def test_leased_models_are_never_evicted(rows: Any, need: int, budget: int) -> None:
    facts = build(rows, need, budget)
    admission = decide_admission(facts, facts.model("x"), Earmarks(), NOW)
    if isinstance(admission, Evict):
        assert admission.victims
        assert all(facts.model(name).leases == 0 for name in admission.victims)


@given(residents, sizes)
def test_victim_sets_are_sufficient_and_no_victim_could_stay(rows: Any, missing: int) -> None:
    facts = build(rows, GIB, 100 * GIB)
    ranked = [m for m in facts.models if m.is_resident]
    shortage = Missing(
        budget_bytes=missing, device_bytes=missing, measured_bytes=0, needs_leavers=True
    )
    victims = choose_victims(facts, ranked, shortage, DEVICE)
    held = {m.name: m.needed_bytes for m in ranked}
    if sum(held.values()) < missing:
        assert victims == ()
        return
    total = sum(held[name] for name in victims)
    assert total >= missing
    assert all(total - held[name] < missing for name in victims)


@given(residents, sizes, sizes, st.randoms())
def test_the_order_of_the_models_is_irrelevant(
    rows: Any, need: int, budget: int, random: Any
) -> None:
    facts = build(rows, need, budget)
    shuffled = list(facts.models)
    random.shuffle(shuffled)
    assert decide(facts, NOW) == decide(replace(facts, models=tuple(shuffled)), NOW)


@given(residents, sizes, sizes.map(lambda n: 2 * n))
def test_a_pool_whose_steps_are_taken_comes_to_rest(rows: Any, need: int, budget: int) -> None:
    facts = build(rows, need, budget)
    for _ in range(50):
        found = decide(facts, NOW).step
        if found is None:
            return
        facts = take(facts, found.model, found.kind.value)
    pytest.fail("the policy does not come to rest")


def take(facts: Pool, name: str, kind: str) -> Pool:
    """What the supervisor does at once when it begins a step."""
    target = facts.model(name)
    after = {
        "offload": replace(target, residence=LEAVING),
        "run": replace(target, leases=1, queued=target.queued - 1),
        "restore": replace(target, residence=Residence(ModelState.RESTORING, Tier.HOST)),
        "refuse": replace(target, queued=0),
    }[kind]
    vram = (
        facts.vram.reserve(name, DEVICE, target.needed_bytes) if kind == "restore" else facts.vram
    )
    busy = {} if kind == "refuse" else {target.group: GroupFacts(is_busy=True)}
    return replace(
        facts,
        models=tuple(after if m.name == name else m for m in facts.models),
        groups={**facts.groups, **busy},
        vram=vram,
    )
