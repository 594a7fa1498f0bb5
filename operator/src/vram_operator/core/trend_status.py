"""The residual's trend as the workload's status tells it, written when it moves and not before.

Called by ``status``. A forecast is a little different with each report; a status that followed it
would wake every watch for nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from vram_agent.protocol import parse_quantity

from vram_operator.api import ResidualTrend
from vram_operator.core.conditions import is_reporting
from vram_operator.core.figures import whole_mebibytes
from vram_operator.core.forecast import Forecast, foresee
from vram_operator.core.visit import Visit

NOTICED_SHARE = 0.25
"""A growth or a remaining time that moves by less than this share is the same."""
NOTICED_AT_LEAST = timedelta(minutes=10)


def find_residual_trend(visit: Visit) -> ResidualTrend | None:
    """Return the trend of the pod that comes to a limit first; the old one while it still holds.

    1. No pod that reports is on its way to a limit.
    2. What was said of a pod still holds, and no other comes much sooner.
    3. Else the first one, by its time and then by its name.
    """
    old = visit.snapshot.workload.status.vram.trend
    found = {
        pod.name: forecast
        for pod in visit.pods
        if is_reporting(visit, agent := visit.agent_of(pod.uid))
        and (forecast := foresee(agent, visit.threshold_bytes)) is not None
    }
    if not found:  # 1
        return None
    first = min(found, key=lambda name: (found[name].first, name))
    if old is not None and old.pod in found:
        known = found[old.pod]
        if _is_same_time(known.first, found[first].first, visit.now):  # 2
            trend = _tell(old.pod, known)
            return old if _is_same(old, trend, visit.now) else trend
    return _tell(first, found[first])  # 3


def _tell(pod: str, forecast: Forecast) -> ResidualTrend:
    return ResidualTrend(
        pod=pod,
        growth_per_hour=whole_mebibytes(round(forecast.bytes_per_second * 3600)),
        threshold_time=_whole_minutes(forecast.threshold_at),
        out_of_memory_time=_whole_minutes(forecast.out_of_memory_at),
    )


def _whole_minutes(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(second=0, microsecond=0)


def _is_same(old: ResidualTrend, new: ResidualTrend, now: datetime) -> bool:
    before, after = parse_quantity(old.growth_per_hour), parse_quantity(new.growth_per_hour)
    return (
        abs(after - before) <= NOTICED_SHARE * max(before, after)
        and _is_same_time(old.threshold_time, new.threshold_time, now)
        and _is_same_time(old.out_of_memory_time, new.out_of_memory_time, now)
    )


def _is_same_time(old: datetime | None, new: datetime | None, now: datetime) -> bool:
    if old is None or new is None:
        return old is new
    return abs(new - old) <= max(NOTICED_AT_LEAST, NOTICED_SHARE * (new - now))
