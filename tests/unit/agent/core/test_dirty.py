"""Devices that others use before us: open, waited for, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.core.admission import Admission, Earmarks, Fits, NoRoom, Wait, decide_admission
from vram_agent.core.dirty import ClosedDevice, find_closed, is_dirty
from vram_agent.core.policy import decide
from vram_agent.core.pool import Command, CommandKind
from vram_agent.protocol import DirtyAction

from tests.unit.agent.core.facts import GIB, NOW, hosted, model, pool

BASELINES = {"A": 3 * GIB, "B": 0}


def closed(device: str, *, is_refused: bool = False) -> ClosedDevice:
    return ClosedDevice(
        device=device, baseline_bytes=3 * GIB, above_bytes=GIB, is_refused=is_refused
    )


@pytest.mark.parametrize(
    ("baseline", "above", "dirty"),
    [
        pytest.param(0, 0, False, id="nothing in use is clean whatever is admitted"),
        pytest.param(GIB, GIB, False, id="as much as is admitted is clean"),
        pytest.param(GIB + 1, GIB, True, id="a byte more is dirty"),
    ],
)
def test_a_device_is_dirty(baseline: int, above: int, dirty: bool) -> None:
    assert is_dirty(baseline, above) is dirty


@pytest.mark.parametrize(
    ("action", "own", "found"),
    [
        pytest.param(DirtyAction.REPORT, set(), {}, id="Report closes nothing"),
        pytest.param(
            DirtyAction.WAIT, set(), {"A": closed("A")}, id="Wait closes a dirty device for a time"
        ),
        pytest.param(
            DirtyAction.REFUSE,
            set(),
            {"A": closed("A", is_refused=True)},
            id="Refuse closes a dirty device",
        ),
        pytest.param(
            DirtyAction.REFUSE, {"A"}, {}, id="where a GPU process of ours is nothing is closed"
        ),
    ],
)
def test_closed_devices(action: DirtyAction, own: set[str], found: dict[str, ClosedDevice]) -> None:
    assert find_closed(BASELINES, frozenset(own), GIB, action) == found


def admit(**options: Any) -> Admission:
    facts = pool([hosted("x", queued=1, needed_bytes=GIB)], **options)
    return decide_admission(facts, facts.model("x"), Earmarks(), NOW)


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_clean_device_is_taken_whatever_fits_better(is_refused: bool) -> None:
    found = admit(
        devices={"A": 2 * GIB, "B": 9 * GIB}, closed={"A": closed("A", is_refused=is_refused)}
    )
    assert found == Fits(device="B")


def test_a_dirty_device_is_looked_at_again_in_two_seconds() -> None:
    found = admit(devices={"A": 9 * GIB}, closed={"A": closed("A")})
    assert isinstance(found, Wait)
    assert (found.device, found.until, found.is_short) == ("A", NOW + 2, False)
    assert f"{3 * GIB} bytes of device A were in use before" in found.note
    assert f"vram.dirty.above ({GIB})" in found.note


def test_a_refused_device_is_refused_with_figures_and_suspects() -> None:
    found = admit(devices={"A": 9 * GIB}, closed={"A": closed("A", is_refused=True)})
    assert isinstance(found, NoRoom)
    assert str(3 * GIB) in found.message
    assert "another pod" in found.message


def test_a_model_is_not_even_loaded_where_every_device_is_refused() -> None:
    facts = pool(
        [model("x", queued=1)],
        devices={"A": 9 * GIB},
        closed={"A": closed("A", is_refused=True)},
    )
    step = decide(facts, NOW).step
    assert step is not None
    assert (step.kind, step.reason, step.is_permanent) == ("refuse", "NoVram", False)


def test_a_model_that_waits_for_a_dirty_device_is_loaded_meanwhile_and_sets_nothing_aside() -> None:
    facts = pool(
        [
            hosted("waits", queued=1, arrival=1, device="A", needed_bytes=2 * GIB),
            hosted("x", queued=1, arrival=2, needed_bytes=GIB),
        ],
        devices={"A": 9 * GIB, "B": 9 * GIB},
        budget=2 * GIB,
        closed={"A": closed("A")},
    )
    decision = decide(facts, NOW)
    assert decision.step is not None
    assert (decision.step.kind, decision.step.model, decision.step.device) == ("restore", "x", "B")
    assert list(decision.waits) == ["waits"]
    on_disk = pool([model("x", queued=1)], devices={"A": 9 * GIB}, closed={"A": closed("A")})
    step = decide(on_disk, NOW).step
    assert step is not None
    assert step.kind == "load"


def test_an_eager_model_waits_for_a_dirty_device_too() -> None:
    eager = Command(kind=CommandKind.EAGER)
    facts = pool([hosted("x", command=eager)], devices={"A": 9 * GIB}, closed={"A": closed("A")})
    decision = decide(facts, NOW)
    assert (decision.step, decision.requeue_at) == (None, NOW + 2)


@given(
    st.dictionaries(st.sampled_from("ABC"), st.integers(0, 10), min_size=1),
    st.sets(st.sampled_from("ABC")),
    st.integers(0, 10),
    st.sampled_from(DirtyAction),
)
def test_what_is_closed_is_dirty_without_us_and_only_by_a_policy(
    baselines: dict[str, int], own: set[str], above: int, action: DirtyAction
) -> None:
    found = find_closed(baselines, frozenset(own), above, action)
    assert all(baselines[uuid] > above and uuid not in own for uuid in found)
    assert not (found and action is DirtyAction.REPORT)
