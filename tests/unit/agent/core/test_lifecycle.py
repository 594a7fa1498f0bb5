from __future__ import annotations

import pytest
from vram_agent.core.lifecycle import (
    ABSENT,
    HOSTED,
    LOADING,
    PINNED,
    RESIDENCES,
    RESIDENT,
    TABLE,
    Event,
    IllegalTransitionError,
    Residence,
    decide_residence,
)
from vram_agent.protocol import ModelState, Tier

RESTORING = Residence(ModelState.RESTORING, Tier.HOST)
FAILED = Residence(ModelState.FAILED, Tier.DISK)


@pytest.mark.parametrize(
    ("before", "event", "after"),
    [
        pytest.param(ABSENT, Event.LOAD, LOADING, id="a load begins on disk"),
        pytest.param(LOADING, Event.LOADED, HOSTED, id="what is loaded is in host memory"),
        pytest.param(LOADING, Event.LOAD_FAILED, FAILED, id="a failed load keeps nothing"),
        pytest.param(HOSTED, Event.RESTORE, RESTORING, id="a restore begins where the weights are"),
        pytest.param(RESTORING, Event.RESTORED, RESIDENT, id="what is restored is in VRAM"),
        pytest.param(RESTORING, Event.ROLLED_BACK, HOSTED, id="a roll back leaves all as it was"),
        pytest.param(
            Residence(ModelState.RESTORING, Tier.PINNED_HOST),
            Event.ROLLED_BACK,
            PINNED,
            id="a roll back to pinned memory stays pinned",
        ),
        pytest.param(RESIDENT, Event.GPU_LOST, HOSTED, id="host memory survives the GPU process"),
        pytest.param(PINNED, Event.GPU_LOST, HOSTED, id="pinned memory is host memory without it"),
        pytest.param(RESIDENT, Event.ALL_LOST, ABSENT, id="only the disk survives the template"),
        pytest.param(
            HOSTED, Event.STARVED, FAILED, id="what the kernel ended for memory is not Absent"
        ),
        pytest.param(FAILED, Event.LOAD, LOADING, id="a failed model may be tried again"),
        pytest.param(FAILED, Event.RESET, ABSENT, id="a new config forgets the failure"),
    ],
)
def test_an_event_leads_to(before: Residence, event: Event, after: Residence) -> None:
    assert decide_residence(before, event) == after


@pytest.mark.parametrize(
    ("before", "event"),
    [
        pytest.param(ABSENT, Event.RESTORE, id="what is not loaded cannot be restored"),
        pytest.param(RESIDENT, Event.LOAD, id="a resident model is not loaded again"),
        pytest.param(RESIDENT, Event.RESTORE, id="a resident model is not restored again"),
        pytest.param(LOADING, Event.OFFLOAD, id="a loading model cannot leave"),
        pytest.param(RESTORING, Event.OFFLOAD, id="half-moved weights cannot leave"),
        pytest.param(FAILED, Event.RESTORE, id="a failed model without weights is not restored"),
        pytest.param(ABSENT, Event.UNLOADED, id="nothing ends that did not begin"),
    ],
)
def test_an_illegal_transition_raises(before: Residence, event: Event) -> None:
    with pytest.raises(IllegalTransitionError, match=str(event)):
        decide_residence(before, event)


def test_every_row_leads_from_somewhere_to_a_known_residence() -> None:
    for state, event in TABLE:
        reached = []
        for residence in RESIDENCES:
            if residence.state is state:
                try:
                    reached.append(decide_residence(residence, event))
                except IllegalTransitionError:
                    continue
        assert reached, f"{state} x {event} is dead"
        assert set(reached) <= RESIDENCES


def test_every_residence_can_be_reached_and_left() -> None:
    reached, frontier = {ABSENT}, [ABSENT]
    while frontier:
        here = frontier.pop()
        for event in Event:
            try:
                there = decide_residence(here, event)
            except IllegalTransitionError:
                continue
            if there not in reached:
                reached.add(there)
                frontier.append(there)
    assert reached == RESIDENCES
