"""Cron schedules with time zones: when a restart is due, and whether a window is open.

Why it exists: CronJob semantics, with both daylight-saving cases defined and a missed run made up
for once. Called by the triggers and by admission. It is told the time and reads no clock; all times
in and out are aware UTC datetimes.

Daylight saving, as in Debian's cron:

* a fixed time that the clock jumps over runs right after the jump (02:30 at 03:00);
* a fixed time that the clock passes twice runs the first time only;
* a schedule whose minute or hour begins with ``*`` runs as real time passes: through the second
  passage of an hour too.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from vram_operator.api import RestartPolicy, Window

SHORTEST_DEADLINE_SECONDS = 10
"""A starting deadline below this counts as this: nobody looks at the very moment of a run."""

_TICK, _MINUTE, _DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)
_MOST_IN_A_ROW = 100
"""So many windows in a row without a gap are open always, as far as anybody needs to know."""

_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


class InvalidScheduleError(ValueError):
    """A schedule or time zone in the spec cannot be used: the user's to correct, no retry helps.

    ``field`` is its path in the spec, such as ``restart.windows[0].schedule``.
    """

    def __init__(self, field: str, value: str, problem: str) -> None:
        super().__init__(f"{field}: {value!r} {problem}")
        self.field = field


@dataclass(frozen=True, slots=True)
class Schedule:
    """A cron expression of five fields that parses, in a time zone that exists."""

    expression: str
    zone: ZoneInfo


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """A time that recurs: ``schedule`` opens it, for ``duration``."""

    schedule: Schedule
    duration: timedelta


@dataclass(frozen=True, slots=True)
class Timetable:
    """What ``spec.restart`` says of times, parsed: ``runs`` is None without a schedule."""

    runs: Schedule | None
    windows: tuple[OpenWindow, ...]


def parse_schedule(expression: str, time_zone: str, field: str) -> Schedule:
    """Return a schedule that is known to parse. Raises InvalidScheduleError naming ``field``.

    ``field`` is the path of the expression; its time zone is expected beside it.
    """
    text = " ".join(_ALIASES.get(expression.strip().lower(), expression).replace("?", "*").split())
    if len(text.split()) != 5:
        raise InvalidScheduleError(
            field, expression, "does not have five fields; write for example 0 3 * * *"
        )
    try:
        CronSim(text, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        problem = str(error).removeprefix("Bad ")
        raise InvalidScheduleError(
            field, expression, f"has a bad {problem}; write for example 0 3 * * *"
        ) from error
    try:
        zone = ZoneInfo(time_zone)
    except (KeyError, ValueError, OSError) as error:
        raise InvalidScheduleError(
            field.removesuffix("schedule") + "timeZone",
            time_zone,
            "is no IANA time zone; write for example Asia/Shanghai",
        ) from error
    return Schedule(text, zone)


def parse_timetable(policy: RestartPolicy) -> Timetable:
    """Return the schedule and windows of ``spec.restart``. Raises InvalidScheduleError."""
    runs = None
    if policy.schedule.strip():
        runs = parse_schedule(policy.schedule, policy.time_zone, "restart.schedule")
    windows = tuple(_parse_window(window, n) for n, window in enumerate(policy.windows))
    return Timetable(runs, windows)


def _parse_window(window: Window, index: int) -> OpenWindow:
    field = f"restart.windows[{index}].schedule"
    schedule = parse_schedule(window.schedule, window.time_zone, field)
    return OpenWindow(schedule, timedelta(seconds=window.duration_seconds))


def next_run(schedule: Schedule, after: datetime) -> datetime | None:
    """Return the first run later than ``after``; None when there is none for fifty years."""
    return next(_runs(schedule, after), None)


def last_run(schedule: Schedule, since: datetime, until: datetime) -> datetime | None:
    """Return the latest run in ``(since, until]``, however many there were; None without one."""
    look_back = timedelta(minutes=2)
    while True:
        start = max(since, until - look_back)
        latest = None
        for run in _runs(schedule, start):
            if run > until:
                break
            latest = run
        if latest is not None or start <= since:
            return latest
        look_back *= 8


@dataclass(frozen=True, slots=True)
class Opening:
    """A time in which it is open without a gap; ``closes_at`` is None when it stays so.

    ``next_at`` is when it opens after that, None when it never does.
    """

    opened_at: datetime
    closes_at: datetime | None
    next_at: datetime | None


def is_open(windows: tuple[OpenWindow, ...], now: datetime) -> bool:
    """Is a window open? Without windows it always is. A window is open from its run on."""
    return not windows or any(
        last_run(window.schedule, now - window.duration, now) is not None for window in windows
    )


def find_opening(windows: tuple[OpenWindow, ...], now: datetime) -> Opening | None:
    """Return for how long it is open at ``now``; None when it is closed or there are no windows.

    Windows that overlap or follow each other without a gap are one.
    """
    if not windows or not is_open(windows, now):
        return None
    opened_at = closes_at = now
    for _ in range(_MOST_IN_A_ROW):
        earlier = min(_openings(windows, opened_at), default=opened_at)
        if earlier >= opened_at:
            break
        opened_at = earlier
    for _ in range(_MOST_IN_A_ROW):
        later = max(_closings(windows, closes_at), default=closes_at)
        if later <= closes_at:
            return Opening(opened_at, closes_at, next_opening(windows, closes_at))
        closes_at = later
    return Opening(opened_at, closes_at=None, next_at=None)


def _openings(windows: tuple[OpenWindow, ...], moment: datetime) -> Iterator[datetime]:
    """Yield the first run of each window that is open at the moment, or closes at it."""
    for window in windows:
        first = next_run(window.schedule, moment - window.duration - _TICK)
        if first is not None and first <= moment:
            yield first


def _closings(windows: tuple[OpenWindow, ...], moment: datetime) -> Iterator[datetime]:
    """Yield when each window that is open at the moment will close."""
    for window in windows:
        last = last_run(window.schedule, moment - window.duration, moment)
        if last is not None:
            yield last + window.duration


def next_opening(windows: tuple[OpenWindow, ...], now: datetime) -> datetime | None:
    """Return when a window opens next, whatever is open now; None without one."""
    openings = (next_run(window.schedule, now) for window in windows)
    return min((opening for opening in openings if opening is not None), default=None)


def starting_deadline(run: datetime, policy: RestartPolicy, jitter: timedelta) -> datetime:
    """Return until when a run may still start."""
    allowed = max(policy.starting_deadline_seconds, SHORTEST_DEADLINE_SECONDS)
    return run + jitter + timedelta(seconds=allowed)


def spread(key: str, most_seconds: float) -> timedelta:
    """Return a delay from 0 to ``most_seconds``, in whole seconds, the same for the same key."""
    steps = int(most_seconds) + 1
    digest = hashlib.sha256(key.encode()).digest()
    return timedelta(seconds=int.from_bytes(digest[:8], "big") % steps)


def _runs(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    """Yield the runs later than ``after``, rising, each once.

    CronSim walks the wall clock alone: its own steps over a change of the clock assume whole hours
    and lose runs where a zone changes by half of one.
    """
    walls = CronSim(schedule.expression, _first_wall(schedule.zone, after))
    moments = _fixed_runs if _is_fixed(schedule.expression) else _passing_runs
    latest = after
    for moment in moments(schedule.zone, walls):
        if moment > latest:
            latest = moment
            yield moment


def _is_fixed(expression: str) -> bool:
    """Does the schedule name its times, rather than a rhythm in which real time passes?"""
    minute, hour, *_ = expression.split()
    return not minute.startswith("*") and not hour.startswith("*")


def _first_wall(zone: ZoneInfo, after: datetime) -> datetime:
    """Return what the clock shows at ``after``, or the earliest that it will show again."""
    now, tomorrow = (_wall(zone, moment) for moment in (after, after + _DAY))
    return min(now, tomorrow - _DAY)


def _fixed_runs(zone: ZoneInfo, walls: Iterable[datetime]) -> Iterator[datetime]:
    """Yield when the clock shows each of ``walls`` first; right after the jump if it never does."""
    for wall in walls:
        shown = wall
        while not (moments := _moments(zone, shown)):
            shown += _MINUTE
        yield moments[0]


def _passing_runs(zone: ZoneInfo, walls: Iterable[datetime]) -> Iterator[datetime]:
    """Yield each time that the clock shows one of ``walls``: twice for what it passes twice."""
    again: deque[datetime] = deque()
    for wall in walls:
        moments = _moments(zone, wall)
        while again and moments and again[0] < moments[0]:
            yield again.popleft()
        yield from moments[:1]
        again.extend(moments[1:])
    yield from again


def _moments(zone: ZoneInfo, wall: datetime) -> list[datetime]:
    """Return when the clock shows ``wall``: once, twice, or never where it jumps over it."""
    readings = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    return sorted({moment for moment in readings if _wall(zone, moment) == wall})


def _wall(zone: ZoneInfo, moment: datetime) -> datetime:
    """Return what a clock of the zone shows at the moment, without a zone."""
    return moment.astimezone(zone).replace(tzinfo=None, fold=0)
