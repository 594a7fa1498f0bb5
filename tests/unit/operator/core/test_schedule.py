"""Schedules against an implementation that knows nothing but a calendar and patience."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

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

START = datetime(2026, 1, 1, tzinfo=UTC)
END = datetime(2027, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

ZONES = (
    "Etc/UTC",
    "Asia/Shanghai",  # no daylight saving
    "Europe/Berlin",
    "America/New_York",
    "America/Santiago",  # the clock jumps over midnight, and winter is in June
)
EXPRESSIONS = (
    "0 3 * * *",
    "30 2 * * *",  # jumped over in Berlin and New York
    "30 1 * * *",  # passed twice in New York
    "30 2 * * 0",
    "0 0 * * *",  # jumped over in Santiago
    "15 0,12 1,15 * *",
    "0 0 13 * 5",  # day of month or day of week
    "*/20 * * * *",
    "0 */6 * * *",
    "5 4 28-31 2 *",
    "0 9 * * 1-5",
)


def _numbers(field: str, lowest: int, highest: int) -> set[int]:
    found: set[int] = set()
    for part in field.split(","):
        body, _, step = part.partition("/")
        first, last = (lowest, highest)
        if body != "*":
            start, _, end = body.partition("-")
            first, last = int(start), int(end or start)
        found |= set(range(first, last + 1, int(step or 1)))
    return found


@cache
def naive_runs(expression: str, zone_name: str) -> tuple[datetime, ...]:
    """Walk through every minute of the year, first on the wall clock, then in real time."""
    minute, hour, day, month, weekday = expression.split()
    zone = ZoneInfo(zone_name)
    minutes, hours = _numbers(minute, 0, 59), _numbers(hour, 0, 23)
    days, months = _numbers(day, 1, 31), _numbers(month, 1, 12)
    weekdays = {number % 7 for number in _numbers(weekday, 0, 7)}
    either = not day.startswith("*") and not weekday.startswith("*")

    def matches(wall: datetime) -> bool:
        if wall.minute not in minutes or wall.hour not in hours or wall.month not in months:
            return False
        by_day, by_weekday = wall.day in days, (wall.isoweekday() % 7) in weekdays
        return by_day or by_weekday if either else by_day and by_weekday

    def real_time() -> Iterator[datetime]:
        moment = START
        while moment < END:
            # all these zones are whole hours away from UTC, so their minutes are the same
            if moment.minute in minutes and matches(moment.astimezone(zone)):
                yield moment
            moment += MINUTE

    def wall_time() -> Iterator[datetime]:
        wall = datetime(2025, 12, 31)  # noqa: DTZ001 - a wall clock has no zone
        while wall < datetime(2027, 1, 2):  # noqa: DTZ001
            if matches(wall):
                aware = wall.replace(tzinfo=zone)
                moment = aware.astimezone(UTC)
                if moment.astimezone(zone).replace(tzinfo=None) != wall:
                    # jumped over: the first minute that exists after the jump
                    moment = _first_after_jump(moment, zone)
                if START <= moment < END:
                    yield moment
            wall += MINUTE

    follows_wall = not minute.startswith("*") and not hour.startswith("*")
    return tuple(sorted(set(wall_time() if follows_wall else real_time())))


def _first_after_jump(moment: datetime, zone: ZoneInfo) -> datetime:
    offset = moment.astimezone(zone).utcoffset()
    while (moment - MINUTE).astimezone(zone).utcoffset() == offset:
        moment -= MINUTE
    return moment


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
    assert tuple(found) == naive_runs(expression, zone)


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
    expected = [run for run in naive_runs(expression, zone) if since < run <= moment]
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
