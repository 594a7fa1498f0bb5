"""Cron by patience: a walk through every minute of a year that knows a calendar and a clock.

It shares nothing with what it checks: no cronsim, no ``fold``, no arithmetic on wall clocks. A
clock is known by what it shows at each minute of real time, and the rule is stated on that:

* a schedule whose minute or hour begins with ``*`` runs at each minute at which the clock shows one
  of its times: not at all for what the clock jumps over, twice for what it passes twice;
* any other runs once for each of its times: at the first minute at which the clock shows it, or, if
  the clock jumps over it, at the first minute after the jump.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

START = datetime(2026, 1, 1, tzinfo=UTC)
END = datetime(2027, 1, 1, tzinfo=UTC)
_MARGIN = timedelta(days=2)
_FIRST, _LAST = START - _MARGIN, END + _MARGIN
_MINUTES = int((_LAST - _FIRST).total_seconds()) // 60
_QUARTER = 15
_NEVER = -1
_FIRST_DAY = _FIRST.date()


class Clock:
    """A year of a zone's clock: at which minutes of real time it shows each wall minute."""

    def __init__(self, zone_name: str) -> None:
        zone, epoch = ZoneInfo(zone_name), _FIRST.replace(tzinfo=None)
        self._first = array("i", [_NEVER]) * (_MINUTES + 2 * 1440)
        self._again: dict[int, int] = {}
        # No zone has changed its clock within a quarter of an hour for fifty years.
        for quarter in range(0, _MINUTES, _QUARTER):
            shown = (_FIRST + timedelta(minutes=quarter)).astimezone(zone).replace(tzinfo=None)
            wall = int((shown - epoch).total_seconds()) // 60
            for minute in range(_QUARTER):
                self._see(wall + minute, quarter + minute)

    def _see(self, wall: int, minute: int) -> None:
        if wall < 0:
            return
        if self._first[wall] == _NEVER:
            self._first[wall] = minute
        else:
            self._again[wall] = minute

    def moments(self, wall: int) -> list[int]:
        """The minutes of real time at which the clock shows a wall minute."""
        found = [self._first[wall]] if self._first[wall] != _NEVER else []
        return [*found, self._again[wall]] if wall in self._again else found

    def first_after(self, wall: int) -> int:
        """The first minute at which it shows this wall minute or a later one."""
        while not self.moments(wall):
            wall += 1
        return self.moments(wall)[0]


@cache
def clock(zone_name: str) -> Clock:
    return Clock(zone_name)


def _numbers(field: str, lowest: int, highest: int) -> list[int]:
    found: set[int] = set()
    for part in field.split(","):
        body, _, step = part.partition("/")
        first, last = lowest, highest
        if body != "*":
            start, _, end = body.partition("-")
            first, last = int(start), int(end or start)
        found |= set(range(first, last + 1, int(step or 1)))
    return sorted(found)


def _matching_walls(expression: str) -> Iterator[int]:
    """Wall minutes since the first day, rising: the calendar alone."""
    minute, hour, day, month, weekday = expression.split()
    minutes, hours = _numbers(minute, 0, 59), _numbers(hour, 0, 23)
    days, months = set(_numbers(day, 1, 31)), set(_numbers(month, 1, 12))
    weekdays = {number % 7 for number in _numbers(weekday, 0, 7)}
    either = not day.startswith("*") and not weekday.startswith("*")
    for number in range((_LAST - _FIRST).days - 1):
        today: date = _FIRST_DAY + timedelta(days=number)
        by_day, by_weekday = today.day in days, today.isoweekday() % 7 in weekdays
        if today.month in months and (by_day or by_weekday if either else by_day and by_weekday):
            yield from (number * 1440 + 60 * h + m for h in hours for m in minutes)


@cache
def walk(expression: str, zone_name: str) -> tuple[datetime, ...]:
    """Every run of the schedule from START to before END, in UTC, rising, each once."""
    minute, hour, *_ = expression.split()
    follows_time = minute.startswith("*") or hour.startswith("*")
    shown, found = clock(zone_name), set[int]()
    for wall in _matching_walls(expression):
        found.update(shown.moments(wall) if follows_time else [shown.first_after(wall)])
    moments = (_FIRST + timedelta(minutes=number) for number in sorted(found))
    return tuple(moment for moment in moments if START <= moment < END)
