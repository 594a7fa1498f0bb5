"""How often an agent is asked, and which of its words wake the planner."""

from __future__ import annotations

import msgspec
import pytest
from vram_agent.protocol import PodIdentity
from vram_operator.poller import Urgency, gist, next_poll_seconds

from tests.support.agents import GIB, FakeAgent, Script


@pytest.mark.parametrize(
    ("residual_gib", "threshold_gib", "acting", "seconds"),
    [
        pytest.param(0, 8, True, 1, id="while a restart runs: each second"),
        pytest.param(9, 8, False, 5, id="above the threshold: a half"),
        pytest.param(6, 8, False, 5, id="near it: a half"),
        pytest.param(5, 8, False, 10, id="in between: as usual"),
        pytest.param(3, 8, False, 30, id="far from it: three times"),
        pytest.param(99, None, False, 10, id="without a threshold: as usual"),
    ],
)
def test_the_rhythm(
    residual_gib: int, threshold_gib: int | None, acting: bool, seconds: float
) -> None:
    threshold = None if threshold_gib is None else threshold_gib * GIB
    assert next_poll_seconds(10, Urgency(residual_gib * GIB, threshold, acting)) == seconds


def test_a_short_interval_stays_short_while_a_restart_runs() -> None:
    assert next_poll_seconds(0.4, Urgency(0, None, acting=True)) == 0.2


def test_while_a_restart_waits_reports_stay_fresh_however_far_the_threshold_is() -> None:
    assert next_poll_seconds(10, Urgency(0, 8 * GIB, acting=False, waiting=True)) == 5


def test_the_next_report_of_an_unchanged_agent_is_no_news() -> None:
    agent = FakeAgent(PodIdentity(uid="u"), str, Script(residual_bytes=GIB))
    first, second = agent.report(), agent.report()
    assert first != second
    assert gist(first) == gist(second)
    nearly = msgspec.structs.replace(
        second, memory=msgspec.structs.replace(second.memory, residual_bytes=GIB + 1)
    )
    assert gist(first) == gist(nearly)


def test_a_new_epoch_or_much_more_memory_is_news() -> None:
    agent = FakeAgent(PodIdentity(uid="u"), str, Script(residual_bytes=GIB))
    before = gist(agent.report())
    agent.epoch += 1
    assert gist(agent.report()) != before
    agent.epoch -= 1
    agent.script.residual_bytes = 2 * GIB
    assert gist(agent.report()) != before
