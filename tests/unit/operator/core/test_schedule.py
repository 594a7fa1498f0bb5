"""Schedules against an implementation that knows nothing but a calendar and patience."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_operator.api import RestartPolicy, Window
from vram_operator.core.schedule import (
    InvalidScheduleError,
    OpenWindow,
    is_open,
    last_run,
    next_opening,
    next_run,
    parse_schedule,
    parse_timetable,
    spread,
    starting_deadline,
)

from tests.unit.operator.core.walker import END, START, walk

# Those of daylight saving are there in the year that is walked through, 2026.
ZONES = (
    "Etc/UTC",
    "Asia/Shanghai",  # no daylight saving
    "Europe/Berlin",
    "America/New_York",
    "America/Santiago",  # the clock jumps over midnight, and winter is in June
    "Australia/Lord_Howe",  # the clock changes by half an hour
    "Pacific/Chatham",  # a quarter of an hour off, and the clock jumps at 02:45
    "Africa/Casablanca",  # back for Ramadan, forth after it
    "Asia/Kolkata",  # half an hour off, no daylight saving
)
EXPRESSIONS = (
    "0 3 * * *",
    "30 2 * * *",  # jumped over in Berlin and New York
    "30 1 * * *",  # passed twice in New York
    "45 1 * * *",  # passed twice on Lord Howe
    "15 2 * * *",  # jumped over on Lord Howe
    "50 2 * * *",  # jumped over on Chatham
    "30 2 * * 0",
    "0 0 * * *",  # jumped over in Santiago
    "30 23 * * 6",  # passed twice in Santiago
    "0,30 0-4 * * *",
    "15 0,12 1,15 * *",
    "0 0 13 * 5",  # day of month or day of week
    "0 0 */5 * 1",  # day of month and day of week
    "*/20 * * 3,9,10 0",
    "45 * * 4,10,11 *",
    "7-59/13 * * 4,11 0",
    "0 */6 * * *",
    "15 */2 * * 0",
    "*/30 2 * * *",
    "* 1 * * 0",
    "5 4 28-31 2 *",
    "59 23 31 12 *",
    "0 9 * * 1-5",
)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_run_of_a_year_is_where_a_walk_through_its_minutes_finds_it(
    expression: str, zone: str
) -> None:
    schedule = parse_schedule(expression, zone, "restart.schedule")
    found = []
    moment: datetime | None = START - timedelta(seconds=1)
    while moment is not None and (moment := next_run(schedule, moment)) and moment < END:
        found.append(moment)
    assert tuple(found) == walk(expression, zone)


@given(
    st.sampled_from(EXPRESSIONS),
    st.sampled_from(ZONES),
    st.datetimes(datetime(2026, 1, 10), datetime(2026, 12, 30)),  # noqa: DTZ001
    st.integers(60, 8 * 86_400),
)
def test_the_last_run_of_a_span_is_the_latest_that_a_walk_finds_in_it(
    expression: str, zone: str, until: datetime, seconds: int
) -> None:
    moment = until.replace(tzinfo=UTC)
    since = moment - timedelta(seconds=seconds)
    expected = [run for run in walk(expression, zone) if since < run <= moment]
    schedule = parse_schedule(expression, zone, "restart.schedule")
    assert last_run(schedule, since, moment) == (expected[-1] if expected else None)


@pytest.mark.parametrize(
    ("expression", "zone", "after", "expected"),
    [
        pytest.param(
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-28T12:00:00+01:00",
            ["2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00"],
            id="a time that the clock jumps over runs right after the jump",
        ),
        pytest.param(
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-24T12:00:00+02:00",
            ["2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"],
            id="a time that the clock passes twice runs the first time only",
        ),
        pytest.param(
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-25T02:10:00+01:00",
            ["2026-10-26T02:30:00+01:00"],
            id="asked in the second passage it does not run again",
        ),
        pytest.param(
            "30 * * * *",
            "Europe/Berlin",
            "2026-10-25T01:45:00+02:00",
            [
                "2026-10-25T02:30:00+02:00",
                "2026-10-25T02:30:00+01:00",
                "2026-10-25T03:30:00+01:00",
            ],
            id="an hourly one runs in both passages",
        ),
        pytest.param(
            "@daily",
            "Asia/Shanghai",
            "2026-11-23T00:00:00+08:00",
            ["2026-11-24T00:00:00+08:00"],
            id="an alias is understood and the moment itself is not later",
        ),
        pytest.param(
            "0 3 ? * MON",
            "Etc/UTC",
            "2026-11-24T00:00:00Z",
            ["2026-11-30T03:00:00Z"],
            id="a question mark is a star and days have names",
        ),
    ],
)
def test_next_runs(expression: str, zone: str, after: str, expected: list[str]) -> None:
    schedule = parse_schedule(expression, zone, "restart.schedule")
    moment = at(after)
    for text in expected:
        run = next_run(schedule, moment)
        assert run == at(text)
        assert run is not None
        moment = run


@pytest.mark.parametrize(
    ("policy", "field", "problem"),
    [
        pytest.param(
            RestartPolicy(schedule="0 3 * *"),
            "restart.schedule",
            "does not have five fields",
            id="four fields",
        ),
        pytest.param(
            RestartPolicy(schedule="0 0 3 * * *"),
            "restart.schedule",
            "does not have five fields",
            id="seconds are not among the fields",
        ),
        pytest.param(
            RestartPolicy(schedule="61 3 * * *"), "restart.schedule", "bad minute", id="minute 61"
        ),
        pytest.param(
            RestartPolicy(schedule="0 3 30 2 *"),
            "restart.schedule",
            "bad day-of-month",
            id="a day that no year has",
        ),
        pytest.param(
            RestartPolicy(schedule="0 3 * * *", time_zone="Europe/Atlantis"),
            "restart.timeZone",
            "is no IANA time zone",
            id="a zone that does not exist",
        ),
        pytest.param(
            RestartPolicy(schedule="0 3 * * *", time_zone="Europe"),
            "restart.timeZone",
            "is no IANA time zone",
            id="a folder of zones",
        ),
        pytest.param(
            RestartPolicy(
                windows=[
                    Window(schedule="0 1 * * *", duration_seconds=60),
                    Window(schedule="0 25 * * *", duration_seconds=60),
                ]
            ),
            "restart.windows[1].schedule",
            "bad hour",
            id="the second window",
        ),
        pytest.param(
            RestartPolicy(
                windows=[Window(schedule="0 1 * * *", time_zone="X", duration_seconds=60)]
            ),
            "restart.windows[0].timeZone",
            "is no IANA time zone",
            id="the zone of a window",
        ),
    ],
)
def test_what_does_not_parse_names_its_field(
    policy: RestartPolicy, field: str, problem: str
) -> None:
    with pytest.raises(InvalidScheduleError, match=problem) as raised:
        parse_timetable(policy)
    assert raised.value.field == field


def test_a_policy_without_times_has_an_empty_timetable() -> None:
    timetable = parse_timetable(RestartPolicy())
    assert timetable.runs is None
    assert timetable.windows == ()


def _window(expression: str, zone: str, hours: float) -> OpenWindow:
    return OpenWindow(parse_schedule(expression, zone, "w.schedule"), timedelta(hours=hours))


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        pytest.param("2026-11-23T00:59:59+08:00", False, id="a second before it opens"),
        pytest.param("2026-11-23T01:00:00+08:00", True, id="at the moment it opens"),
        pytest.param("2026-11-23T04:59:59+08:00", True, id="a second before it closes"),
        pytest.param("2026-11-23T05:00:00+08:00", False, id="at the moment it closes"),
    ],
)
def test_a_window_is_open_from_its_run_until_its_duration_is_over(now: str, expected: bool) -> None:
    windows = (_window("0 1 * * *", "Asia/Shanghai", 4),)
    assert is_open(windows, at(now)) is expected


def test_without_windows_it_is_always_open_and_nothing_opens() -> None:
    assert is_open((), START)
    assert next_opening((), START) is None


def test_the_next_opening_is_the_earliest_of_all_windows() -> None:
    windows = (_window("0 5 * * *", "Etc/UTC", 1), _window("0 4 * * *", "Etc/UTC", 1))
    assert next_opening(windows, at("2026-11-23T01:00:00Z")) == at("2026-11-23T04:00:00Z")


def test_a_window_across_a_jump_of_the_clock_lasts_its_real_duration() -> None:
    windows = (_window("0 1 * * *", "Europe/Berlin", 2),)
    assert is_open(windows, at("2026-03-29T03:59:59+02:00"))
    assert not is_open(windows, at("2026-03-29T04:00:00+02:00"))


def test_a_deadline_counts_from_the_spread_start_and_is_never_below_ten_seconds() -> None:
    run, jitter = at("2026-11-23T03:00:00Z"), timedelta(seconds=20)
    long, short = (RestartPolicy(starting_deadline_seconds=n) for n in (3600, 0))
    assert starting_deadline(run, long, jitter) == at("2026-11-23T04:00:20Z")
    assert starting_deadline(run, short, jitter) == at("2026-11-23T03:00:30Z")


@given(st.text(), st.integers(0, 600))
def test_a_spread_is_the_same_for_the_same_key_and_within_its_bounds(key: str, most: int) -> None:
    delay = spread(key, most)
    assert delay == spread(key, most)
    assert timedelta() <= delay <= timedelta(seconds=most)


def test_spreads_of_many_keys_use_the_whole_span() -> None:
    seconds = {spread(f"workload-{n}", 30).seconds for n in range(2000)}
    assert seconds == set(range(31))
