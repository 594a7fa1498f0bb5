"""When a growing residual passes the threshold, and whether that is a reason to restart now.

Why it exists: where ``restart.windows`` bound residual restarts, a leak that passes the threshold
while all are closed would have to wait above it. Called by ``visit``, by ``status`` and by the
metrics. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from vram_operator.core.evidence import Evidence, EvidenceReason
from vram_operator.core.figures import show_bytes, show_span, show_time
from vram_operator.core.schedule import Opening, OpenWindow, find_opening
from vram_operator.core.snapshot import Agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Where a rising residual leads; a time is None when it is unknown or further than a month."""

    bytes_per_second: float
    threshold_at: datetime | None
    out_of_memory_at: datetime | None

    @property
    def first(self) -> datetime:
        """What comes first. Raises ValueError when nothing is foretold."""
        return min(at for at in (self.threshold_at, self.out_of_memory_at) if at is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a forecast is weighed against.

    ``fresh_since`` is when the pod was last made anew, ``next_run`` when the schedule will do so.
    """

    windows: tuple[OpenWindow, ...]
    next_run: datetime | None
    threshold_bytes: int
    for_seconds: int
    fresh_since: datetime
    now: datetime


def foresee(agent: Agent, threshold_bytes: int | None) -> Forecast | None:
    """Return where the agent's residual leads; None unless it rises to something within a month.

    A residual that is above the threshold already is the evidence's to judge: then only the end of
    the memory is foretold.
    """
    trend = agent.track.trend
    if trend is None or not trend.is_rising:
        return None
    threshold_at = out_of_memory_at = None
    if threshold_bytes is not None and agent.track.points[-1].residual_bytes <= threshold_bytes:
        threshold_at = trend.reaches(threshold_bytes)
    if trend.limit_bytes:
        out_of_memory_at = trend.reaches(trend.limit_bytes)
    if threshold_at is None and out_of_memory_at is None:
        return None
    return Forecast(
        bytes_per_second=trend.bytes_per_second,
        threshold_at=threshold_at,
        out_of_memory_at=out_of_memory_at,
    )


def weigh_forecast(evidence: Evidence, agent: Agent, outlook: Outlook) -> Evidence:
    """Return the evidence, or Predicted where the residual will pass while no window is open.

    The rules, in order; where one does not hold, the evidence stays:

    1. the newest sample is below the threshold and quiet, and a restart could help;
    2. the residual rises, and is predicted to pass the threshold;
    3. there are windows, and one is open;
    4. it passes too late to be proven before this one closes;
    5. and before the next one opens, or the schedule restarts the pod anyway;
    6. and the pod was not restarted since this one opened: once is enough.
    """
    sample, trend = evidence.sample, agent.track.trend
    if sample is None or trend is None or not _could_help(evidence, outlook):  # 1
        return evidence
    forecast = foresee(agent, outlook.threshold_bytes)
    if forecast is None or forecast.threshold_at is None:  # 2
        return evidence
    passes_at = forecast.threshold_at
    opening = find_opening(outlook.windows, outlook.now)
    if opening is None or not _is_last_chance(opening, passes_at, outlook):  # 3, 4, 5, 6
        return evidence
    window = (
        f"the open window closes {_say(opening.closes_at)}, the next opens {_say(opening.next_at)}"
    )
    message = (
        f"residual {show_bytes(sample.residual_bytes)} grows by "
        f"{show_bytes(round(forecast.bytes_per_second * 3600))} an hour: predicted to pass "
        f"{show_bytes(outlook.threshold_bytes)} at {show_time(passes_at)}; {window} "
        f"({trend.points} samples over {show_span(trend.until - trend.since)}, "
        f"source {sample.source})"
    )
    return replace(evidence, reason=EvidenceReason.PREDICTED, message=message)


def _say(moment: datetime | None) -> str:
    return "never" if moment is None else f"at {show_time(moment)}"


def _could_help(evidence: Evidence, outlook: Outlook) -> bool:
    """Apply rule 1."""
    sample = evidence.sample
    return (
        evidence.reason is EvidenceReason.BELOW_THRESHOLD
        and sample is not None
        and sample.quiet
        and sample.context_bytes < outlook.threshold_bytes
    )


def _is_last_chance(opening: Opening, passes_at: datetime, outlook: Outlook) -> bool:
    """Apply rules 3 to 6."""
    proof = timedelta(seconds=outlook.for_seconds)
    if opening.closes_at is None or passes_at + proof < opening.closes_at:  # 3, 4
        return False
    ends = (opening.next_at, outlook.next_run)
    if any(at is not None and at <= passes_at for at in ends):  # 5
        return False
    return outlook.fresh_since < opening.opened_at  # 6
