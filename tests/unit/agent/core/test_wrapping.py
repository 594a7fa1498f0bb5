from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.core.lifecycle import IllegalTransitionError
from vram_agent.core.wrapping import (
    TABLE,
    Backoff,
    ChildEvent,
    ChildExit,
    ChildState,
    Wish,
    decide_after_exit,
    decide_child_state,
)
from vram_agent.protocol import AfterCrash

S, E = ChildState, ChildEvent


@pytest.mark.parametrize(
    ("before", "event", "after"),
    [
        pytest.param(S.STARTING, E.READY, S.RUNNING, id="it runs once it says that it is ready"),
        pytest.param(S.RUNNING, E.DRAIN, S.DRAINING, id="a drain begins while it runs"),
        pytest.param(S.STARTING, E.DRAIN, S.DRAINING, id="a drain does not wait for the start"),
        pytest.param(S.DRAINING, E.RESUME, S.STARTING, id="after a drain it says anew it is ready"),
        pytest.param(S.STOPPING, E.RENEW, S.STARTING, id="a recycle starts it again at once"),
        pytest.param(S.RUNNING, E.CRASHED, S.BACKING_OFF, id="a crash is followed by a pause"),
        pytest.param(S.BACKING_OFF, E.RETRY, S.STARTING, id="after the pause it starts again"),
        pytest.param(S.BACKING_OFF, E.RENEW, S.STARTING, id="a recycle cuts the pause short"),
        pytest.param(S.BACKING_OFF, E.END, S.ENDED, id="the agent may end during a pause"),
    ],
)
def test_an_event_leads_to(before: ChildState, event: ChildEvent, after: ChildState) -> None:
    assert decide_child_state(before, event) is after


@pytest.mark.parametrize(
    ("before", "event"),
    [
        pytest.param(S.RUNNING, E.RENEW, id="what runs is ended before it is renewed"),
        pytest.param(S.STOPPING, E.DRAIN, id="what is told to end drains no more"),
        pytest.param(S.STOPPING, E.CRASHED, id="an end that was asked for is no crash"),
        pytest.param(S.BACKING_OFF, E.STOP, id="without a process there is nothing to stop"),
        pytest.param(S.RUNNING, E.READY, id="it becomes ready once"),
    ],
)
def test_an_illegal_event_raises(before: ChildState, event: ChildEvent) -> None:
    with pytest.raises(IllegalTransitionError, match=f"{event} is not possible in {before}"):
        decide_child_state(before, event)


def test_what_has_ended_stays_ended() -> None:
    assert not [event for state, event in TABLE if state is S.ENDED]


def test_every_state_but_the_end_leads_on_to_the_end() -> None:
    can_end = {S.ENDED}
    for _ in S:
        can_end |= {state for (state, _), after in TABLE.items() if after in can_end}
    assert can_end == set(S)


@pytest.mark.parametrize(
    ("exit_", "wish", "policy", "event"),
    [
        pytest.param(
            ChildExit(0), Wish.KEEP, AfterCrash.RESTART, E.END, id="a command that finished"
        ),
        pytest.param(
            ChildExit(1), Wish.KEEP, AfterCrash.END, E.END, id="a crash ends the container"
        ),
        pytest.param(
            ChildExit(1), Wish.KEEP, AfterCrash.RESTART, E.CRASHED, id="a crash is started again"
        ),
        pytest.param(
            ChildExit(0, 9), Wish.KEEP, AfterCrash.RESTART, E.CRASHED, id="a signal is a crash"
        ),
        pytest.param(
            ChildExit(0, 15), Wish.RENEW, AfterCrash.END, E.RENEW, id="a recycle is no crash"
        ),
        pytest.param(
            ChildExit(1), Wish.END, AfterCrash.RESTART, E.END, id="nothing starts while it ends"
        ),
    ],
)
def test_an_exit_means(exit_: ChildExit, wish: Wish, policy: AfterCrash, event: ChildEvent) -> None:
    assert decide_after_exit(exit_, wish, policy) is event


def test_exit_codes_are_those_of_a_shell() -> None:
    assert [ChildExit(3).shell_code, ChildExit(0, 15).shell_code] == [3, 143]


def test_pauses_double_up_to_a_minute_and_begin_anew_after_a_minute_of_running() -> None:
    backoff, pauses = Backoff(), []
    for ran_seconds in (0, 0, 0, 59, 0, 0, 0, 0, 60, 0):
        backoff, pause = backoff.after_crash(ran_seconds)
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2]


@given(st.integers(0, 10_000), st.floats(0, 1e6))
def test_a_pause_is_never_below_a_second_nor_above_a_minute(crashes: int, ran: float) -> None:
    assert 1 <= Backoff(crashes).after_crash(ran)[1] <= 60
