"""When a leak is restarted before it is proven, and what status and plan say of where it leads."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from vram_agent.protocol import ResidualSource
from vram_operator.api import (
    ResidualTrend,
    RestartOutcome,
    RestartStatus,
    Window,
    WorkloadCondition,
    WorkloadStatus,
)
from vram_operator.core.condition_list import find_condition
from vram_operator.core.plan import CreateRestart, PatchRestartStatus, PatchWorkloadStatus, Plan
from vram_operator.core.planning import plan
from vram_operator.core.schedule import OpenWindow, find_opening, is_open, parse_schedule
from vram_operator.core.snapshot import Agent, Pod, Restart, Snapshot, hear

from tests.support.factories import (
    NOW,
    ago,
    make_pod,
    make_policy,
    make_report,
    make_restart,
    make_settings,
    make_snapshot,
    make_template_spec,
    make_workload,
)
from tests.unit.operator.core.world import World

A, B = make_pod("speech-a"), make_pod("speech-b")
# Open from 10:00 to 14:00 UTC, and it is 12:00.
NOON = Window(schedule="0 10 * * *", duration_seconds=14_400)
NIGHT = [Window(schedule="0 1 * * *", duration_seconds=60)]
CLOSES, OPENS = NOW + timedelta(hours=2), NOW + timedelta(hours=22)


def growing(pod: Pod, gib: float, gib_an_hour: float, now: datetime = NOW, **fields: Any) -> Agent:
    """An agent that reported every five minutes for four hours, and grew to so much by ``now``."""
    agent = Agent(pod_uid=pod.uid)
    for number in range(48, -1, -1):
        moment = ago(300 * number, now)
        held = gib - gib_an_hour * number / 12
        agent = hear(agent, make_report(pod, held, moment, **fields), moment, 600)
    return agent


def leaking(
    gib: float = 6.0, gib_an_hour: float = 0.5, now: datetime = NOW, **policy: Any
) -> Snapshot:
    """A pod that grows towards its threshold of 8 GiB, at 6 + 0.5 an hour in four hours."""
    restart = make_policy(**{"windows": [NOON], **policy})
    return make_snapshot(
        workload=make_workload(spec=make_template_spec(restart=restart)),
        pods=(A,),
        agents=(growing(A, gib, gib_an_hour, now),),
    )


def reasons(planned: Plan) -> list[str]:
    return [
        one.manifest["spec"]["reason"] for one in planned.actions if isinstance(one, CreateRestart)
    ]


def test_a_leak_that_passes_while_no_window_is_open_is_restarted_in_this_one() -> None:
    planned = plan(leaking(), NOW)
    (reason,) = reasons(planned)
    assert reason == (
        "residual 6Gi grows by 512Mi an hour: predicted to pass 8Gi at 2026-11-23T16:00:00Z; the "
        "open window closes at 2026-11-23T14:00:00Z, the next opens at 2026-11-24T10:00:00Z "
        "(25 samples over 4 h, source Exclusive)"
    )
    (manifest,) = [one.manifest for one in planned.actions if isinstance(one, CreateRestart)]
    assert manifest["spec"]["trigger"] == "Residual"
    high = find_condition(planned.conditions, WorkloadCondition.RESIDUAL_HIGH)
    assert high is not None
    assert (high.status, high.reason) == ("False", "PredictedAboveThreshold")
    assert high.message == "speech-a: predicted to be above 8Gi before the next window opens"


@pytest.mark.parametrize(
    ("gib", "gib_an_hour", "policy", "expected"),
    [
        pytest.param(6.0, 0.5, {}, True, id="passes at 16:00, between the windows"),
        pytest.param(6.0, 0.5, {"windows": []}, False, id="without windows there is time to prove"),
        pytest.param(7.5, 0.5, {}, False, id="passes at 13:00, inside the window"),
        pytest.param(7.0, 0.5, {}, True, id="passes as it closes: no time for forSeconds"),
        pytest.param(6.0, 0.09, {}, False, id="passes after the next one has opened"),
        pytest.param(6.0, 0.1, {}, True, id="passes in the 20th hour, before it opens"),
        pytest.param(6.0, 0.0, {}, False, id="does not grow"),
        pytest.param(6.0, -0.5, {}, False, id="falls"),
        pytest.param(
            6.0, 0.5, {"schedule": "0 15 * * *"}, False, id="the schedule restarts it before"
        ),
        pytest.param(
            6.0,
            0.5,
            {"schedule": "0 15 * * *", "suspend": True},
            False,
            id="suspended: neither the schedule nor the residual does",
        ),
        pytest.param(
            6.0, 0.5, {"schedule": "0 17 * * *"}, True, id="the schedule would come too late"
        ),
        pytest.param(
            6.0,
            0.5,
            {"windows": [NOON, Window(schedule="0 14 * * *", duration_seconds=10_800)]},
            False,
            id="a second window follows without a gap and lasts until 17:00",
        ),
        pytest.param(
            6.0,
            0.5,
            {"windows": [Window(schedule="0 * * * *", duration_seconds=3600)]},
            False,
            id="a window that never closes",
        ),
        pytest.param(
            6.0,
            0.5,
            {"windows": [Window(schedule="0 13 * * *", duration_seconds=3600)]},
            False,
            id="no window is open now",
        ),
    ],
)
def test_who_is_restarted_early(
    gib: float, gib_an_hour: float, policy: dict[str, Any], expected: bool
) -> None:
    assert bool(reasons(plan(leaking(gib, gib_an_hour, **policy), NOW))) is expected


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        pytest.param({"idle": False}, "busy", id="a busy agent"),
        pytest.param({"source": ResidualSource.UNKNOWN}, "unknown", id="an unknown source"),
        pytest.param({"context_bytes": 8 * 1024**3}, "floor", id="a context as large as that"),
    ],
)
def test_a_last_report_that_proves_nothing_foretells_nothing(
    fields: dict[str, Any], why: str
) -> None:
    snapshot = leaking()
    last = make_report(A, 6.0, NOW + timedelta(seconds=5), **fields)
    agent = hear(snapshot.agents[0], last, NOW + timedelta(seconds=5), 600)
    assert agent.track.trend == snapshot.agents[0].track.trend, why
    planned = plan(replace(snapshot, agents=(agent,)), NOW + timedelta(seconds=6))
    assert reasons(planned) == []


def test_reports_that_have_grown_stale_foretell_nothing() -> None:
    assert reasons(plan(leaking(), NOW + timedelta(seconds=30))) != []
    assert reasons(plan(leaking(), NOW + timedelta(seconds=31))) == []


def ended(seconds_ago: float, outcome: RestartOutcome, **status: Any) -> Restart:
    status = {"completion_time": ago(seconds_ago), "outcome": outcome, **status}
    return make_restart(A, name="before", created=ago(9000), status=RestartStatus(**status))


@pytest.mark.parametrize(
    ("restart", "expected"),
    [
        pytest.param(
            ended(7100, RestartOutcome.RECOVERED, start_time=ago(7190)), False, id="in this window"
        ),
        pytest.param(
            ended(7300, RestartOutcome.RECOVERED, start_time=ago(7390)), True, id="before it opened"
        ),
        pytest.param(ended(7100, RestartOutcome.DRY_RUN), False, id="as a dry run in this window"),
        pytest.param(ended(7100, RestartOutcome.SKIPPED), True, id="one that was not carried out"),
    ],
)
def test_a_pod_is_restarted_early_once_in_a_window(restart: Restart, expected: bool) -> None:
    snapshot = replace(leaking(), restarts=(restart,))
    assert bool(reasons(plan(snapshot, NOW))) is expected


def test_a_container_that_started_in_this_window_is_left_alone() -> None:
    young = replace(A, agent_running_since=NOW - timedelta(hours=1, minutes=59))
    assert reasons(plan(replace(leaking(), pods=(young,)), NOW)) == []


def test_an_early_restart_that_waits_is_over_when_its_window_closes() -> None:
    restart = make_restart(A, created=ago(10))
    snapshot = replace(leaking(), restarts=(restart,))
    (first,) = [one for one in plan(snapshot, NOW).actions if isinstance(one, PatchRestartStatus)]
    assert first.status.start_time == NOW  # it may go: the prediction is its evidence
    late = CLOSES + timedelta(seconds=1)
    closed = replace(snapshot, agents=(growing(A, 6.0, 0.5, late),))
    (write,) = [one for one in plan(closed, late).actions if isinstance(one, PatchRestartStatus)]
    assert write.status.outcome is RestartOutcome.SKIPPED
    assert "is not above 8Gi" in write.status.conditions[0].message


def test_a_closed_window_is_looked_at_when_it_opens_and_an_open_one_again_and_again() -> None:
    late = OPENS - timedelta(hours=1)
    agents = (growing(A, 1.0, 0.0, late),)
    quiet = replace(leaking(), agents=agents)
    seldom = make_settings(poll_interval_seconds=3600)  # nobody turns silent meanwhile
    assert plan(replace(quiet, settings=seldom), late).requeue_at == OPENS
    again = plan(replace(leaking(1.0, 0.0), settings=seldom), NOW).requeue_at
    assert again == NOW + timedelta(minutes=10)


# --- what the status says -------------------------------------------------------------------------


def test_the_status_tells_where_the_residual_leads() -> None:
    # 8 GiB are 4 h away; the device has 80 GiB, all of them 148 h.
    assert plan(leaking(), NOW).status.vram.trend == ResidualTrend(
        pod="speech-a",
        growth_per_hour="512Mi",
        threshold_time=NOW + timedelta(hours=4),
        out_of_memory_time=NOW + timedelta(hours=148),
    )


@pytest.mark.parametrize(
    ("gib", "gib_an_hour", "policy", "expected"),
    [
        pytest.param(6.0, 0.0, {}, None, id="level"),
        pytest.param(6.0, -0.5, {}, None, id="falling"),
        pytest.param(9.0, 0.5, {}, (None, 142), id="above already: only the end is ahead"),
        pytest.param(6.0, 0.5, {"residual": None}, (None, 148), id="without a threshold"),
        pytest.param(6.0, 0.1, {}, (20, None), id="the end is more than a month away"),
        pytest.param(1.0, 0.005, {}, None, id="everything is more than a month away"),
    ],
)
def test_a_trend_is_told_as_far_as_it_is_known(
    gib: float, gib_an_hour: float, policy: dict[str, Any], expected: Any
) -> None:
    trend = plan(leaking(gib, gib_an_hour, **policy), NOW).status.vram.trend
    if expected is None:
        assert trend is None
        return
    assert trend is not None
    found = (trend.threshold_time, trend.out_of_memory_time)
    wanted = tuple(None if hours is None else NOW + timedelta(hours=hours) for hours in expected)
    for moment, at in zip(found, wanted, strict=True):
        assert (moment is None) == (at is None)
        assert moment is None or at is None or abs(moment - at) <= timedelta(minutes=1)


def with_trend(snapshot: Snapshot, planned: Plan) -> Snapshot:
    workload = replace(snapshot.workload, status=planned.status)
    return replace(snapshot, workload=workload)


@pytest.mark.parametrize(
    ("gib_an_hour", "written"),
    [
        pytest.param(0.5, False, id="the same"),
        pytest.param(0.56, False, id="an eighth faster"),
        pytest.param(0.45, False, id="a tenth slower"),
        pytest.param(0.75, True, id="half as fast again"),
        pytest.param(0.3, True, id="much slower"),
        pytest.param(0.0, True, id="no more growth"),
    ],
)
def test_a_trend_is_written_again_only_when_it_moves(gib_an_hour: float, written: bool) -> None:
    first = leaking(windows=NIGHT)
    seen = with_trend(leaking(6.0, gib_an_hour, windows=NIGHT), plan(first, NOW))
    status_writes = [one for one in plan(seen, NOW).actions if isinstance(one, PatchWorkloadStatus)]
    assert len(status_writes) == written


def test_a_status_is_not_rewritten_while_a_steady_leak_is_polled_for_hours() -> None:
    snapshot, writes = leaking(5.0, 0.3, windows=NIGHT), 0
    snapshot = with_trend(snapshot, plan(snapshot, NOW))
    agent = snapshot.agents[0]
    for number in range(1, 361):
        now = NOW + timedelta(seconds=30 * number)
        wobble = 0.01 * (number * 7 % 5 - 2)
        report = make_report(A, 5.0 + 0.3 * number / 120 + wobble, now)
        agent = hear(agent, report, now, 600)
        snapshot = replace(snapshot, agents=(agent,))
        planned = plan(snapshot, now)
        writes += any(isinstance(one, PatchWorkloadStatus) for one in planned.actions)
        snapshot = with_trend(snapshot, planned)
    # It grows by 0.9 GiB in these three hours: once past the 512Mi of the sums.
    assert writes == 1


def test_the_pod_that_comes_first_is_told_of_and_stays_until_another_is_much_sooner() -> None:
    policy = make_policy()

    def two(first: float, second: float, status: WorkloadStatus | None = None) -> Snapshot:
        return make_snapshot(
            workload=make_workload(
                spec=make_template_spec(restart=policy), status=status or WorkloadStatus()
            ),
            pods=(A, B),
            agents=(growing(A, 6.0, first), growing(B, 6.0, second)),
        )

    planned = plan(two(0.4, 0.5), NOW)
    assert planned.status.vram.trend is not None
    assert planned.status.vram.trend.pod == "speech-b"
    nearly = plan(two(0.55, 0.5, planned.status), NOW).status.vram.trend
    assert nearly == planned.status.vram.trend
    sooner = plan(two(1.0, 0.5, planned.status), NOW).status.vram.trend
    assert sooner is not None
    assert (sooner.pod, sooner.threshold_time) == ("speech-a", NOW + timedelta(hours=2))


def test_a_trend_that_is_over_is_taken_away_and_the_sums_stay() -> None:
    planned = plan(leaking(5.1), NOW)
    after = with_trend(leaking(5.1, 0.0), planned)
    assert plan(after, NOW).status.vram == structs.replace(planned.status.vram, trend=None)


# --- windows that overlap and follow each other --------------------------------------------------

SCHEDULES = ("0 1 * * *", "0 */3 * * *", "30 1 * * 1", "0,30 4-6 * * *", "0 0 * * *")


def _window(expression: str, zone: str, minutes: int) -> OpenWindow:
    return OpenWindow(parse_schedule(expression, zone, "w.schedule"), timedelta(minutes=minutes))


@settings(deadline=None)  # the walk is what takes the time
@given(
    st.lists(
        st.builds(
            _window,
            st.sampled_from(SCHEDULES),
            st.sampled_from(["Etc/UTC", "Europe/Berlin", "Asia/Kolkata"]),
            st.sampled_from([30, 60, 90, 180, 240]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 2 * 1440),
)
def test_an_opening_is_what_a_walk_finds_open_around_a_moment(
    windows: list[OpenWindow], minute: int
) -> None:
    rows, now = tuple(windows), NOW + timedelta(minutes=minute)
    opening = find_opening(rows, now)
    if not is_open(rows, now):
        assert opening is None
        return
    assert opening is not None
    step = timedelta(minutes=30)
    first = last = now.replace(minute=now.minute // 30 * 30)
    while first > now - timedelta(days=3) and is_open(rows, first - step):
        first -= step
    while last < now + timedelta(days=3) and is_open(rows, last):
        last += step
    if opening.closes_at is None or opening.closes_at - now > timedelta(days=3):
        assert is_open(rows, last - step)
        assert last >= now + timedelta(days=3)
        return
    assert (opening.opened_at, opening.closes_at) == (first, last)
    again = last
    while not is_open(rows, again):
        again += step
    assert opening.next_at == again


# --- three days of a slow leak --------------------------------------------------------------------


def test_a_slow_leak_never_passes_its_threshold_although_it_may_restart_once_a_day_only() -> None:
    window = Window(schedule="0 14 * * *", duration_seconds=3600)
    spec = make_template_spec(restart=make_policy(windows=[window]))
    world = World(1, make_workload(spec=spec))
    (fake,) = world.fakes.values()
    most = 0.0
    for _ in range(3 * 24 * 6):
        # 0.3 GiB an hour: from 0.5 GiB it takes 25 hours to 8 GiB, and the window comes after 24.
        fake.residual_gib += 0.05
        most = max(most, fake.residual_gib)
        world.run(600, step=600)
        world.check()
    assert [one.step for one in world.executions] == ["Recycle"] * 3
    assert [one.at.replace(minute=0, second=0) for one in world.executions] == [
        NOW.replace(hour=14) + timedelta(days=day) for day in range(3)
    ]
    assert 7.5 < most < 8
    assert {one.status.outcome for one in world.restarts.values()} == {RestartOutcome.RECOVERED}
    assert all("predicted to pass 8Gi" in one.spec.reason for one in world.restarts.values())
