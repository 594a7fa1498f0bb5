"""Scenarios in which one rule of the operator decides, and proof that breaking it would be seen.

Each is played twice: as the operator is, where the judge has nothing to say, and with the rule
taken out, where it has. So neither the scenarios nor the judge can go blind unnoticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from vram_operator import apply, reconcile
from vram_operator.core import acting_phase, admission, triggers, visit
from vram_operator.kube import Object

from tests.unit.operator.once.apiserver import Fault
from tests.unit.operator.once.trouble import Trouble

_numbers = itertools.count()


@dataclass(frozen=True)
class Case:
    """``rule`` is a function of the operator's, ``broken`` one in its place without the rule."""

    play: Callable[[Trouble], None]
    rule: tuple[Any, str]
    broken: Callable[..., Any]
    complaint: str


def more_leaks_than_places(world: Trouble) -> None:
    world.begin(pods=3, cap=2, max_unavailable=3, lease_is_ignored=False)
    world.all_pods_leak_at_once(sticky=False, yields=0)
    for _ in range(4):
        world.settle()
    assert world.fleet.judge.most_active >= 2
    assert len(world.fleet.judge.executions) >= 6


def more_leaks_than_pods_that_may_be_missing(world: Trouble) -> None:
    world.begin(pods=3, cap=6, max_unavailable=1, lease_is_ignored=False)
    world.all_pods_leak_at_once(sticky=False, yields=0)
    for _ in range(4):
        world.settle()
    assert world.fleet.judge.most_active >= 2
    assert len(world.fleet.judge.executions) >= 6


def two_workloads_ask_for_the_last_place_at_once(world: Trouble) -> None:
    world.begin(pods=1, cap=1, max_unavailable=1, lease_is_ignored=False)
    for index in (0, 1):
        world.a_pod_leaks(index, sticky=False)
    world.all_hear()
    for _ in range(3):
        world.one_leader_visits_both_at_once(0, yields=2)
    assert world.fleet.judge.most_active >= 1


def a_leak_is_gone_when_its_report_is_old(world: Trouble) -> None:
    world.begin(pods=1, cap=1, max_unavailable=1, lease_is_ignored=False)
    world.a_leak_is_heard_of_and_gone_before_anybody_acts(0, seconds=35)


def a_restart_gets_its_place_when_its_report_is_old(world: Trouble) -> None:
    world.begin(pods=1, cap=1, max_unavailable=1, lease_is_ignored=False)
    for index in (0, 1):
        world.a_pod_leaks(index, sticky=False)
    world.all_hear()
    for name in ("vision", "speech", "speech", "speech"):
        world.a_visit(0, name)
    assert len(world.fleet.open()) == 2
    world.an_agent_falls_silent_or_speaks(1, silent=True)
    world.a_leak_goes_by_itself(1)
    world.time_passes(40)
    for _ in range(4):
        world.settle()
    assert len(world.fleet.judge.executions) >= 1


def a_rival_writes_what_is_past(world: Trouble) -> None:
    world.begin(pods=1, cap=1, max_unavailable=1, lease_is_ignored=True)
    world.one_leader_acts_on_what_was_before_the_other_acted("speech", count=3)
    assert len(world.fleet.judge.executions) >= 1


def rivals_decide_on_one_leak(world: Trouble) -> None:
    world.begin(pods=1, cap=1, max_unavailable=1, lease_is_ignored=True)
    world.all_find_a_leak_before_their_watches_show_what_the_others_did(0, sticky=False, faults=[])
    assert world.fleet.restarts()


def the_answer_of_an_agent_is_lost(world: Trouble) -> None:
    world.begin(pods=1, cap=1, max_unavailable=1, lease_is_ignored=False)
    world.a_pod_leaks(0, sticky=False)
    world.all_hear()
    for _ in range(2):
        world.a_visit(0, "speech")
    world.a_crash_at_a_call_to_an_agent(0, "speech", "after")
    for _ in range(4):
        world.settle()
    assert len(world.fleet.judge.executions) >= 1


def the_answer_that_gave_a_place_is_lost(world: Trouble) -> None:
    world.begin(pods=1, cap=1, max_unavailable=1, lease_is_ignored=False)
    for index in (0, 1):
        world.a_pod_leaks(index, sticky=False)
    world.all_hear()
    for name in ("vision", "speech"):
        world.a_visit(0, name)
    world.a_visit_whose_requests_fail(0, "vision", [Fault.UNANSWERED])
    world.a_visit(0, "speech")
    for _ in range(4):
        world.settle()
    assert len(world.fleet.judge.executions) >= 2


def no_limit(*_: object) -> int:
    return 1000


def ever_fresh(_: float) -> float:
    return 1e9


def places_given_out_at_random(*_: object) -> bool:
    return False


async def nobody_looks(_: object) -> None:
    """Take a write without an answer for one that was not made."""


def another_name(*_: object) -> str:
    return f"speech-{next(_numbers)}"


def without_version(
    known: Object, kind: str, version: str, status: Object, real: Any = apply._status_body
) -> Object:
    """Write over whatever is there. The wire of these tests takes it, as that of pods does."""
    body: Object = real(known, kind, version, status)
    metadata = {k: v for k, v in body["metadata"].items() if k != "resourceVersion"}
    return {**body, "metadata": metadata}


CASES = {
    "the cap": Case(
        more_leaks_than_places, (admission, "concurrency_cap"), no_limit, "above the cap"
    ),
    "maxUnavailable": Case(
        more_leaks_than_pods_that_may_be_missing,
        (admission, "unavailable_limit"),
        no_limit,
        "above maxUnavailable",
    ),
    "one place at a time": Case(
        two_workloads_ask_for_the_last_place_at_once,
        (reconcile, "takes_a_place"),
        places_given_out_at_random,
        "above the cap",
    ),
    "the fate of a write without an answer": Case(
        the_answer_that_gave_a_place_is_lost,
        (apply.Applier, "settle"),
        nobody_looks,
        "above the cap",
    ),
    "freshness when it is decided": Case(
        a_leak_is_gone_when_its_report_is_old,
        (visit, "fresh_seconds"),
        ever_fresh,
        "decided on stale evidence",
    ),
    "freshness when it begins": Case(
        a_restart_gets_its_place_when_its_report_is_old,
        (visit, "fresh_seconds"),
        ever_fresh,
        "begun on stale evidence",
    ),
    "the version of a status": Case(
        a_rival_writes_what_is_past, (apply, "_status_body"), without_version, "written over"
    ),
    "the name as lock": Case(
        rivals_decide_on_one_leak,
        (triggers, "restart_name"),
        another_name,
        "two open restarts for one reason",
    ),
    "the restart ID": Case(
        the_answer_of_an_agent_is_lost,
        (acting_phase, "restart_id"),
        another_name,
        "more was done than was written",
    ),
}


@pytest.fixture
def world() -> Iterator[Trouble]:
    world = Trouble()
    yield world
    world.loop.close()


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_the_rule_holds_where_it_decides(world: Trouble, case: Case) -> None:
    case.play(world)
    world.come_to_rest()


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_the_judge_sees_that_the_rule_is_broken(
    world: Trouble, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setattr(*case.rule, case.broken)
    case.play(world)
    assert any(case.complaint in one for one in world.fleet.judge.violations)
