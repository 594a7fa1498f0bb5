"""What slope is seen in which points, and what is not foretold."""

from __future__ import annotations

import random
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.protocol import ResidualSource
from vram_operator.core.snapshot import Agent, hear
from vram_operator.core.trend import (
    FEWEST_POINTS,
    KEPT,
    MOST_POINTS,
    NO_TRACK,
    SHORTEST_SPAN,
    Point,
    Track,
    extend_track,
    find_trend,
)

from tests.support.factories import GIB, NOW, ago, make_model, make_pod, make_report

MIB = 1024**2
LIFE = ("boot", 0)


def line(count: int, minutes_apart: float, mib_each: float, start_gib: float = 1.0) -> list[Point]:
    """Points up to now that grow by the same from each to the next."""
    return [
        Point(
            ago((count - 1 - n) * minutes_apart * 60),
            int(start_gib * GIB + n * mib_each * MIB),
            80 * GIB,
        )
        for n in range(count)
    ]


POINTS = st.lists(
    st.builds(Point, st.integers(0, 43_200).map(ago), st.integers(0, 80 * GIB)),
    max_size=MOST_POINTS,
)


@given(POINTS, st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(
    points: list[Point], shuffler: random.Random
) -> None:
    assert find_trend(points) == find_trend(shuffler.sample(points, len(points)))


@given(POINTS)
def test_few_points_or_a_short_time_have_no_trend(points: list[Point]) -> None:
    moments = [point.at for point in points]
    enough = len(points) >= FEWEST_POINTS and max(moments) - min(moments) >= SHORTEST_SPAN
    assert (find_trend(points) is not None) == enough


@given(
    st.integers(FEWEST_POINTS, MOST_POINTS),
    st.floats(1, 30),
    st.floats(-100, 100),
    st.data(),
)
def test_one_odd_report_does_not_move_the_slope(
    count: int, minutes: float, mib: float, data: st.DataObject
) -> None:
    points = line(count, minutes, mib, start_gib=10)
    odd = data.draw(st.integers(0, count - 1))
    wrong = Point(points[odd].at, data.draw(st.integers(0, 80 * GIB)))
    trend = find_trend([*points[:odd], wrong, *points[odd + 1 :]])
    assert trend is not None
    expected = mib * MIB / (minutes * 60)
    assert trend.bytes_per_second == pytest.approx(expected, abs=0.1)


def test_a_leak_is_foretold_to_the_second() -> None:
    # 1 GiB at first, 64 MiB more every ten minutes: after two hours 1.75 GiB.
    trend = find_trend(line(13, 10, 64))
    assert trend is not None
    assert (trend.points, trend.until - trend.since) == (13, timedelta(hours=2))
    assert trend.level_bytes == 1.75 * GIB
    assert trend.bytes_per_second * 3600 == 384 * MIB
    # 2.25 GiB more at 0.375 GiB an hour: six hours.
    assert trend.reaches(4 * GIB) == NOW + timedelta(hours=6)
    assert trend.reaches(1 * GIB) == NOW
    assert trend.limit_bytes == 80 * GIB


@pytest.mark.parametrize(
    ("mib_each", "rises"),
    [
        pytest.param(0, False, id="level"),
        pytest.param(-10, False, id="falling"),
        pytest.param(1.3, False, id="less than 16 MiB in all"),
        pytest.param(1.34, True, id="16 MiB in all"),
    ],
)
def test_only_a_rise_that_matters_is_one(mib_each: float, rises: bool) -> None:
    trend = find_trend(line(13, 10, mib_each))
    assert trend is not None
    assert trend.is_rising is rises
    assert (trend.reaches(1 * GIB + 20 * MIB) is not None) is rises


def test_what_is_further_away_than_a_month_is_not_foretold() -> None:
    trend = find_trend(line(13, 10, 2))  # 12 MiB an hour, 8640 MiB in thirty days
    assert trend is not None
    level = round(trend.level_bytes)
    assert trend.reaches(level + 8640 * MIB) is not None
    assert trend.reaches(level + 8641 * MIB) is None


def test_noise_does_not_rise_and_a_leak_in_noise_does() -> None:
    dice = random.Random(7)
    rising = {0: 0, 40: 0}
    for _ in range(200):
        for mib_each, count in list(rising.items()):
            noisy = [
                Point(point.at, point.residual_bytes + dice.randint(-64, 64) * MIB)
                for point in line(30, 5, mib_each)
            ]
            trend = find_trend(noisy)
            assert trend is not None
            rising[mib_each] = count + trend.is_rising
    assert rising[0] == 0
    assert rising[40] == 200


# --- what is kept ---------------------------------------------------------------------------------


def followed(points: list[Point], life: tuple[str, int] = LIFE, track: Track = NO_TRACK) -> Track:
    for point in points:
        track = extend_track(track, life, point)
    return track


def test_a_day_of_reports_leaves_a_bounded_number_spread_over_half_of_it() -> None:
    track = NO_TRACK
    for second in range(86_400, -1, -10):
        track = extend_track(track, LIFE, Point(ago(second), (86_400 - second) * MIB))
        assert len(track.points) <= MOST_POINTS
    moments = [point.at for point in track.points]
    assert moments == sorted(moments)
    assert KEPT - timedelta(hours=1) <= moments[-1] - moments[0] <= KEPT
    assert NOW - moments[-1] <= timedelta(hours=1)
    gaps = [(late - early).total_seconds() for early, late in pairwise(moments)]
    assert max(gaps) <= 3 * min(gaps)
    assert track.trend is not None
    assert track.trend.bytes_per_second == pytest.approx(MIB)


@pytest.mark.parametrize("seconds", [1, 5, 10, 30])
def test_a_trend_is_there_soon_however_often_an_agent_reports(seconds: int) -> None:
    count = 330 // seconds + 1
    points = [Point(ago((count - 1 - n) * seconds), GIB + n * seconds * MIB) for n in range(count)]
    trend = followed(points).trend
    assert trend is not None
    assert trend.bytes_per_second == pytest.approx(MIB)


@pytest.mark.parametrize("life", [("next", 0), ("boot", 1)])
@given(st.integers(1, 100))
def test_another_boot_or_epoch_begins_anew(life: tuple[str, int], count: int) -> None:
    before = followed(line(count, 1, 64))
    fresh = Point(ago(-60), GIB)
    assert extend_track(before, life, fresh) == Track(life=life, points=(fresh,))
    assert extend_track(before, life, None) == Track(life=life)


def test_reports_of_a_busy_moment_or_an_unknown_source_are_no_points() -> None:
    pod = make_pod()
    agent = Agent(pod_uid=pod.uid)
    busy = [make_model(in_flight=1)]
    for seconds, fields in (
        (50, {}),
        (40, {"idle": False}),
        (30, {"models": busy}),
        (20, {"source": ResidualSource.UNKNOWN}),
        (10, {"models": [make_model(state="Loading")]}),
        (0, {}),
    ):
        moment = ago(seconds)
        agent = hear(agent, make_report(pod, 2.0, moment, **fields), moment, 600)
    assert [point.at for point in agent.track.points] == [ago(50), ago(0)]
    assert agent.track.points[0] == Point(ago(50), 2 * GIB, 80 * GIB)
    assert len(agent.history) == 6


def test_a_full_device_is_reached_when_what_is_free_is_used_up() -> None:
    pod = make_pod()
    report = make_report(pod, 2.0)
    (device,) = report.devices
    assert (device.total_bytes, device.used_bytes) == (80 * GIB, 2 * GIB)
    agent = hear(Agent(pod_uid=pod.uid), make_report(pod, 2.0, devices=[]), NOW, 600)
    assert agent.track.points[0].limit_bytes == 0
