"""A workload under a schedule: a year of fake time, absences, suspensions, and many at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from msgspec import structs
from vram_operator.api import (
    Reason,
    RestartMethod,
    RestartOutcome,
    RestartPolicy,
    Window,
    WorkloadCondition,
    WorkloadStatus,
)
from vram_operator.core.condition_list import find_condition
from vram_operator.core.plan import CreateRestart
from vram_operator.core.planning import plan
from vram_operator.core.schedule import is_open, parse_timetable, spread, starting_deadline
from vram_operator.core.snapshot import Snapshot
from vram_operator.core.triggers import Decisions, decide_restarts
from vram_operator.core.visit import begin_visit

from tests.support.factories import (
    NOW,
    make_agent,
    make_pod,
    make_policy,
    make_settings,
    make_snapshot,
    make_template_spec,
    make_workload,
)
from tests.unit.operator.core.walker import END, START, walk
from tests.unit.operator.core.world import World

SECOND = timedelta(seconds=1)
ZONES = (
    "Asia/Shanghai",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
)


class Year:
    """One pod under a schedule, looked at when the last look asked for it, and never between."""

    def __init__(self, jitter_seconds: int = 0, **policy: Any) -> None:
        self.now = START - timedelta(hours=1)
        self.restart = make_policy(residual=None, **policy)
        self.settings = make_settings(schedule_jitter_seconds=jitter_seconds)
        self.announced: datetime | None = None
        before = START - timedelta(days=9)
        self.pod = make_pod(created=before, agent_running_since=before)
        self.started: list[tuple[datetime, datetime]] = []
        """Of each run: the time of the schedule, and when it was decided."""
        self.missed: list[datetime] = []

    def look(self) -> Decisions:
        workload = make_workload(
            spec=make_template_spec(restart=self.restart),
            status=WorkloadStatus(next_restart_time=self.announced),
        )
        snapshot = make_snapshot(
            workload=workload, pods=(self.pod,), agents=(), settings=self.settings
        )
        found = decide_restarts(begin_visit(snapshot, self.now))
        for action in found.actions:
            assert isinstance(action, CreateRestart)
            at = datetime.fromisoformat(action.manifest["spec"]["scheduledTime"])
            self.started.append((at, self.now))
            self.pod = replace(self.pod, agent_running_since=self.now + SECOND)
        self.announced = found.next_restart_time
        self.missed += [found.missed_run] if found.missed_run is not None else []
        return found

    def pass_until(self, end: datetime) -> None:
        """Look whenever it is due, until ``end``."""
        while (due := self.look().requeue_at) is not None and due < end:
            assert due > self.now
            self.now = due

    def be_away_until(self, moment: datetime) -> None:
        self.now = moment


@pytest.mark.parametrize("expression", ["30 2 * * *", "0 */6 * * 0", "45 1 1,15 * *"])
@pytest.mark.parametrize("zone", ZONES)
def test_in_a_year_every_run_restarts_once_and_at_its_time(expression: str, zone: str) -> None:
    year = Year(schedule=expression, time_zone=zone)
    year.pass_until(END)
    assert tuple(at for at, _ in year.started) == walk(expression, zone)
    assert all(decided == at for at, decided in year.started)
    assert year.missed == []


@pytest.mark.parametrize("zone", ZONES)
def test_a_spread_start_is_late_by_the_same_each_time(zone: str) -> None:
    year = Year(jitter_seconds=1800, schedule="30 2 * * *", time_zone=zone)
    year.pass_until(END)
    assert tuple(at for at, _ in year.started) == walk("30 2 * * *", zone)
    (late,) = {decided - at for at, decided in year.started}
    assert timedelta() < late <= timedelta(minutes=30)


@pytest.mark.parametrize(
    ("back", "made_up_for"),
    [
        pytest.param("2026-03-29T03:30:00+02:00", True, id="half an hour late"),
        pytest.param("2026-03-29T04:00:00+02:00", True, id="at the deadline"),
        pytest.param("2026-03-29T04:00:01+02:00", False, id="a second after the deadline"),
    ],
)
def test_an_operator_that_was_away_over_the_jump_makes_up_for_the_last_run_only(
    back: str, made_up_for: bool
) -> None:
    year = Year(schedule="30 2 * * *", time_zone="Europe/Berlin", starting_deadline_seconds=3600)
    year.pass_until(datetime.fromisoformat("2026-03-25T12:00:00+01:00"))
    before = len(year.started)
    year.be_away_until(datetime.fromisoformat(back))
    year.pass_until(datetime.fromisoformat("2026-03-30T12:00:00+02:00"))
    # 02:30 of the 29th is jumped over, so that run is the one of 03:00; 26th to 28th are past.
    jump, after = (
        datetime.fromisoformat(text)
        for text in ("2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00")
    )
    assert [at for at, _ in year.started[before:]] == ([jump, after] if made_up_for else [after])
    assert year.missed == ([] if made_up_for else [jump])


def test_what_fell_into_a_suspension_is_not_made_up_for() -> None:
    year = Year(schedule="0 3 * * *", starting_deadline_seconds=86_400)
    year.pass_until(datetime.fromisoformat("2026-05-01T12:00:00Z"))
    active, before = year.restart, len(year.started)
    year.restart = make_policy(residual=None, schedule="0 3 * * *", suspend=True)
    assert year.look().requeue_at is None
    assert year.announced is None
    year.restart = active
    year.be_away_until(datetime.fromisoformat("2026-05-03T03:00:01Z"))
    year.pass_until(datetime.fromisoformat("2026-05-05T12:00:00Z"))
    assert [str(at) for at, _ in year.started[before:]] == [
        "2026-05-04 03:00:00+00:00",
        "2026-05-05 03:00:00+00:00",
    ]
    assert year.missed == []


def test_many_workloads_with_one_schedule_are_spread_over_the_whole_jitter() -> None:
    starts = Counter(
        spread(f"uid-{number}", 1800) // timedelta(minutes=5) for number in range(1200)
    )
    assert set(starts) - {6} == set(range(6))  # 6: the last second alone
    # 200 in five minutes are expected; six standard deviations are 78.
    assert all(122 <= starts[part] <= 278 for part in range(6))


def test_a_deadline_is_never_before_a_spread_start() -> None:
    policy = make_policy(starting_deadline_seconds=0)
    for number in range(200):
        jitter = spread(f"uid-{number}", 1800)
        assert starting_deadline(NOW, policy, jitter) > NOW + jitter


@pytest.mark.parametrize(("max_unavailable", "at_most"), [(1, 1), (2, 2), ("50%", 2), ("30%", 1)])
def test_a_run_restarts_all_pods_and_never_more_at_a_time_than_allowed(
    max_unavailable: int | str, at_most: int
) -> None:
    policy = make_policy(schedule="0 13 * * *", residual=None, max_unavailable=max_unavailable)
    world = World(4, make_workload(spec=make_template_spec(restart=policy)))
    most = 0
    world.run(3500, step=60)
    for _ in range(120):
        world.run(5, step=5)
        away = {pod.name for pod in world.pods.values() if not pod.ready}
        most = max(most, len(away), len(world.active()))
        world.check()
    assert most == at_most
    assert sorted(one.pod for one in world.executions) == [f"speech-{n}" for n in range(4)]
    assert {one.status.outcome for one in world.restarts.values()} == {RestartOutcome.RECOVERED}
    assert {one.spec.scheduled_time for one in world.restarts.values()} == {
        NOW.replace(hour=13, minute=0)
    }


THIRTEEN = "0 13 * * *"


def begin_run() -> World:
    """Three pods, just after one o'clock: one is being restarted, two wait."""
    world = World(3, make_workload(spec=make_template_spec(restart=run_policy())))
    world.run(3600, step=900)
    while not world.executions:
        world.run(1, step=1)
    assert (len(world.executions), len(world.active()), len(world.restarts)) == (1, 1, 3)
    return world


def run_policy(**fields: Any) -> RestartPolicy:
    policy = {"schedule": THIRTEEN, "residual": None, "starting_deadline_seconds": 1800}
    return make_policy(**{**policy, **fields})


def set_policy(world: World, **fields: Any) -> None:
    spec = structs.replace(world.workload.spec, restart=run_policy(**fields))
    world.workload = replace(world.workload, spec=spec)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param({"suspend": True}, Reason.SUSPENDED, id="it is suspended"),
        pytest.param({"schedule": "0 25 * * *"}, Reason.INVALID_SCHEDULE, id="it does not parse"),
    ],
)
@pytest.mark.parametrize(
    ("seconds", "outcomes"),
    [
        pytest.param(600, {RestartOutcome.RECOVERED: 3}, id="mended within the deadline"),
        pytest.param(
            2400,
            {RestartOutcome.RECOVERED: 1, RestartOutcome.SKIPPED: 2},
            id="mended after the deadline",
        ),
    ],
)
def test_what_stops_a_schedule_in_the_middle_of_a_run_holds_what_has_not_begun(
    fields: dict[str, Any], reason: Reason, seconds: float, outcomes: dict[RestartOutcome, int]
) -> None:
    world = begin_run()
    set_policy(world, **fields)
    world.run(60, step=5)
    assert {str(one.reason) for one in world.plan().blocked} == {reason}
    world.run(seconds, step=300)
    assert len(world.executions) == 1
    set_policy(world)
    world.run(900, step=150)
    assert Counter(one.status.outcome for one in world.restarts.values()) == outcomes
    assert {one.spec.scheduled_time for one in world.restarts.values()} == {NOW.replace(hour=13)}
    world.check()


def test_a_run_waits_for_the_cooldown_of_a_restart_before_it_and_then_goes() -> None:
    world = World(1, make_workload(spec=make_template_spec(restart=run_policy())))
    world.run(3300, step=300)
    world.add_restart("by-hand", "speech-0", method=RestartMethod.RECYCLE)
    world.run(60, step=5)
    world.run(540, step=180)
    (by_hand, waiting) = sorted(world.restarts.values(), key=lambda one: one.created)
    assert by_hand.status.outcome is RestartOutcome.RECOVERED
    assert waiting.status.outcome is None
    assert {str(one.reason) for one in world.plan().blocked} == {"Cooldown"}
    world.run(600, step=150)
    assert world.restarts[waiting.name].status.outcome is RestartOutcome.RECOVERED
    assert [one.step for one in world.executions] == ["Recycle", "InPlace"]
    world.check()


def leaking(windows: list[Window], **policy: Any) -> Snapshot:
    pod = make_pod()
    restart = make_policy(windows=windows, **policy)
    return make_snapshot(
        workload=make_workload(spec=make_template_spec(restart=restart)),
        pods=(pod,),
        agents=(make_agent(pod, 9.0),),
    )


NIGHT = Window(schedule="0 1 * * *", time_zone="Asia/Shanghai", duration_seconds=14_400)
LUNCH = Window(schedule="30 12 * * 1-5", time_zone="Europe/Berlin", duration_seconds=3600)
NOON = Window(schedule="0 12 * * *", duration_seconds=60)


@pytest.mark.parametrize(
    ("windows", "opens"),
    [
        pytest.param([NIGHT], "2026-11-23T17:00:00Z", id="the night of Shanghai is in the evening"),
        pytest.param([NIGHT, LUNCH], None, id="one of two is open: it is lunch in Berlin"),
        pytest.param([LUNCH, NIGHT], None, id="their order does not matter"),
        pytest.param([NIGHT, NOON], None, id="one that opens at this moment is open"),
    ],
)
def test_a_leak_is_restarted_inside_of_any_of_several_windows(
    windows: list[Window], opens: str | None
) -> None:
    planned = plan(leaking(windows), NOW)
    creates = [one for one in planned.actions if isinstance(one, CreateRestart)]
    assert len(creates) == (opens is None)
    if opens is not None:
        (blocked,) = planned.blocked
        assert blocked.reason is Reason.OUTSIDE_WINDOW
        assert blocked.message == f"the next window of restart.windows opens at {opens}"
        assert planned.requeue_at is not None
        assert planned.requeue_at <= datetime.fromisoformat(opens)


def test_one_window_that_does_not_parse_refuses_the_whole_spec() -> None:
    wrong = Window(schedule="0 12 31 2 *", duration_seconds=60)
    snapshot = leaking([NOON, wrong], schedule="0 12 * * *")
    status = WorkloadStatus(next_restart_time=NOW)
    snapshot = replace(snapshot, workload=replace(snapshot.workload, status=status))
    planned = plan(snapshot, NOW)
    assert not [one for one in planned.actions if isinstance(one, CreateRestart)]
    accepted = find_condition(planned.conditions, WorkloadCondition.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("False", "InvalidSchedule")
    assert "restart.windows[1].schedule: '0 12 31 2 *' has a bad day-of-month" in accepted.message
    assert [str(one.reason) for one in planned.events].count("InvalidSchedule") == 1
    assert planned.status.next_restart_time is None


@pytest.mark.parametrize("zone", ZONES)
def test_a_night_window_opens_once_in_every_night_of_the_year(zone: str) -> None:
    night = Window(schedule="30 2 * * *", time_zone=zone, duration_seconds=3600)
    windows = parse_timetable(make_policy(windows=[night])).windows
    runs = walk("30 2 * * *", zone)
    assert len(runs) == 365
    for run in runs:
        assert is_open(windows, run)
        assert is_open(windows, run + timedelta(seconds=3599))
        assert not is_open(windows, run - SECOND)
        assert not is_open(windows, run + timedelta(hours=1))
