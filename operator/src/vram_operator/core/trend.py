"""How a pod's residual grows: a slope that a few odd reports do not move, and where it leads.

Why it exists: a leak is better ended in the window before it hurts than when it does. Called by
``snapshot`` for each report, by ``forecast`` and by the metrics. Pure: it knows no clock, and all
times are those at which agents observed.

The slope is Theil and Sen's: the median of the slopes between all pairs of points, so that up to a
quarter of the points may be anything. A bounded number of points is kept, evenly over what they
span; a restart begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import combinations
from statistics import median, median_low

from vram_operator.core.figures import MIB

MOST_POINTS = 48
"""Points kept of one pod: the pairs of them are a thousand."""
FEWEST_POINTS = 8
SHORTEST_SPAN = timedelta(minutes=5)
"""Fewer points, or over less time, have no trend."""
KEPT = timedelta(hours=12)
LEAST_RISE_BYTES = 16 * MIB
"""A rise over all points that is smaller than this is none."""
SCATTERS = 4
"""Neither is one below so many times the usual distance of a point from the line."""
FURTHEST = timedelta(days=30)
"""What is further away than this is not foretold."""


@dataclass(frozen=True, slots=True)
class Point:
    """A residual that was seen. ``limit_bytes`` is the one that would fill the device; 0: unknown.

    Only quiet reports of a known source become points: what a task holds meanwhile is no residual.
    """

    at: datetime
    residual_bytes: int
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """The line through the points: ``level_bytes`` is where it is at ``until``."""

    bytes_per_second: float
    level_bytes: float
    since: datetime
    until: datetime
    points: int
    scatter_bytes: float
    limit_bytes: int

    @property
    def is_rising(self) -> bool:
        """Does it rise by more than what could be chance?"""
        rise = self.bytes_per_second * (self.until - self.since).total_seconds()
        return rise >= max(LEAST_RISE_BYTES, SCATTERS * self.scatter_bytes)

    def reaches(self, level_bytes: int) -> datetime | None:
        """Return when the line reaches a level, ``until`` if it has; None if it will not soon."""
        if not self.is_rising:
            return None
        seconds = max(0.0, (level_bytes - self.level_bytes) / self.bytes_per_second)
        if seconds > FURTHEST.total_seconds():
            return None
        return self.until + timedelta(seconds=seconds)


@dataclass(frozen=True, slots=True)
class Track:
    """The points of one life of an agent's processes, oldest first, and the trend in them."""

    life: tuple[str, int] = ("", 0)
    """Boot and epoch: another one has given the memory back."""
    points: tuple[Point, ...] = ()
    spacing: timedelta = timedelta()
    """A point nearer to the last one than this is not kept."""
    trend: Trend | None = None


NO_TRACK = Track()


def extend_track(track: Track, life: tuple[str, int], point: Point | None) -> Track:
    """Return the track after a report; ``point`` is None if the report gives none.

    1. Another life: begin anew.
    2. Nothing to keep: no point, or too soon after the last one.
    3. Keep it, drop what is too old, and every other one when there are too many.
    """
    if track.life != life:  # 1
        return Track(life=life, points=() if point is None else (point,))
    if point is None or (track.points and point.at - track.points[-1].at <= track.spacing):  # 2
        return track
    points = (*(old for old in track.points if point.at - old.at <= KEPT), point)  # 3
    spacing = track.spacing
    if len(points) > MOST_POINTS:
        points = points[::-2][::-1]
        # A little less than their distance, for reports that come a little early.
        spacing = 0.9 * (points[-1].at - points[0].at) / (len(points) - 1)
    return Track(life=life, points=points, spacing=spacing, trend=find_trend(points))


def find_trend(points: Iterable[Point]) -> Trend | None:
    """Return the line through points in any order; None for too few or too short a time."""
    row = sorted(points, key=lambda point: (point.at, point.residual_bytes))
    if len(row) < FEWEST_POINTS or row[-1].at - row[0].at < SHORTEST_SPAN:
        return None
    since, until = row[0].at, row[-1].at
    at = [(point.at - until).total_seconds() for point in row]
    held = [point.residual_bytes for point in row]
    slope = median(
        (held[late] - held[early]) / (at[late] - at[early])
        for early, late in combinations(range(len(row)), 2)
        if at[late] > at[early]
    )
    level = median(value - slope * seconds for seconds, value in zip(at, held, strict=True))
    scatter = median(
        abs(value - slope * seconds - level) for seconds, value in zip(at, held, strict=True)
    )
    return Trend(
        bytes_per_second=slope,
        level_bytes=level,
        since=since,
        until=until,
        points=len(row),
        scatter_bytes=scatter,
        limit_bytes=median_low(point.limit_bytes for point in row),
    )
