"""Residual evidence: may this pod's memory be called leaked, and if not, why not.

Why it exists: a restart costs people their requests, so it rests on a row of fresh, quiet reports
of one boot, and every refusal names the rule and the sample. Called by the triggers, by admission
and by the conditions. It knows no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from vram_agent.protocol import ResidualSource, parse_quantity

from vram_operator.api import ResidualPolicy
from vram_operator.core.figures import show_bytes, show_time
from vram_operator.core.snapshot import Agent, ResidualSample

FRESH_POLLS = 3
"""Evidence is fresh for so many poll intervals; near a threshold agents are polled twice as often.
"""
FRESH_SECONDS_AT_LEAST = 10.0
SILENT_POLLS = 9
"""An agent is silent after so many: far from a threshold it is polled every third interval."""
SILENT_SECONDS_AT_LEAST = 15.0


class EvidenceReason(StrEnum):
    """What the reports of one pod prove, in the order in which the rules are asked."""

    NO_REPORT = "NoReport"  # the agent has not reported, or nothing of this boot
    STALE = "Stale"  # its newest report is too old
    UNKNOWN_SOURCE = "UnknownSource"  # it cannot tell whose memory it is
    BELOW_THRESHOLD = "BelowThreshold"
    THRESHOLD_TOO_LOW = "ThresholdTooLow"  # the context alone is above the threshold
    NOT_QUIET = "NotQuiet"  # a request runs or waits, or a model moves
    TOO_FEW_SAMPLES = "TooFewSamples"  # fewer than minSamples in a row
    TOO_SHORT = "TooShort"  # the row does not reach over forSeconds
    SUFFICIENT = "Sufficient"
    PREDICTED = "Predicted"  # below, and will be above before the next window; see ``forecast``


COLLECTING = frozenset(
    {EvidenceReason.NOT_QUIET, EvidenceReason.TOO_FEW_SAMPLES, EvidenceReason.TOO_SHORT}
)
"""Above the threshold, and not yet proof."""
BLIND = frozenset({EvidenceReason.NO_REPORT, EvidenceReason.STALE, EvidenceReason.UNKNOWN_SOURCE})
"""Nothing can be said either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was found. ``requeue_at`` is when time alone may change it, None for never."""

    reason: EvidenceReason
    message: str
    sample: ResidualSample | None = None
    requeue_at: datetime | None = None

    @property
    def is_sufficient(self) -> bool:
        """May a restart rest on it?"""
        return self.reason in (EvidenceReason.SUFFICIENT, EvidenceReason.PREDICTED)


def fresh_seconds(poll_interval_seconds: float) -> float:
    """Return for how long a report may be acted on."""
    return max(FRESH_POLLS * poll_interval_seconds, FRESH_SECONDS_AT_LEAST)


def silent_seconds(poll_interval_seconds: float) -> float:
    """Return after how long without a report an agent counts as silent."""
    return max(SILENT_POLLS * poll_interval_seconds, SILENT_SECONDS_AT_LEAST)


def history_seconds(policy: ResidualPolicy | None, poll_interval_seconds: float) -> float:
    """Return for how long samples have to be kept, for ``extend_history``."""
    span = 0 if policy is None else policy.for_seconds
    return 2 * span + silent_seconds(poll_interval_seconds)


def weigh_evidence(agent: Agent, policy: ResidualPolicy, fresh: float, now: datetime) -> Evidence:
    """Say whether the agent's samples prove a residual above the threshold at ``now``.

    ``fresh`` is for how many seconds a report may be acted on. The rules, in order:

    1. there is a report at all;
    2. the newest sample is fresh;
    3. its source is known;
    4. its residual is above the threshold;
    5. the threshold is above the context floor, so that a restart can help;
    6. it is quiet;
    7. minSamples samples in a row, of one boot and epoch, pass 3, 4 and 6;
    8. and they reach over forSeconds, by the agent's clock and by ours.
    """
    if not agent.history:  # 1
        why = f": {agent.error}" if agent.error else ""
        return Evidence(reason=EvidenceReason.NO_REPORT, message=f"no report{why}")
    newest = agent.history[-1]
    stale_at = newest.received_at + timedelta(seconds=fresh)
    if now > stale_at:  # 2
        age = (now - newest.received_at).total_seconds()
        message = f"{_figures(newest)} is {age:.0f} s old; up to {fresh:.0f} s counts"
        return Evidence(reason=EvidenceReason.STALE, message=message, sample=newest)
    threshold = parse_quantity(policy.threshold)
    reason, message = _weigh_newest(newest, threshold) or _weigh_row(agent.history, policy)
    waits = reason in COLLECTING or reason is EvidenceReason.SUFFICIENT
    return Evidence(
        reason=reason, message=message, sample=newest, requeue_at=stale_at if waits else None
    )


def _weigh_newest(newest: ResidualSample, threshold: int) -> tuple[EvidenceReason, str] | None:
    """Apply rules 3 to 6; None when the newest sample passes."""
    figures, limit = _figures(newest), show_bytes(threshold)
    if newest.source is ResidualSource.UNKNOWN:  # 3
        return EvidenceReason.UNKNOWN_SOURCE, f"{figures} has the source Unknown"
    if newest.residual_bytes <= threshold:  # 4
        return EvidenceReason.BELOW_THRESHOLD, f"{figures} is not above {limit}"
    if threshold <= newest.context_bytes:  # 5
        return EvidenceReason.THRESHOLD_TOO_LOW, (
            f"the threshold {limit} is not above what context and libraries alone hold, "
            f"{show_bytes(newest.context_bytes)}"
        )
    if not newest.quiet:  # 6
        return EvidenceReason.NOT_QUIET, f"{figures} was seen with {_unrest(newest)}"
    return None


def _weigh_row(
    history: tuple[ResidualSample, ...], policy: ResidualPolicy
) -> tuple[EvidenceReason, str]:
    """Apply rules 7 and 8."""
    newest, threshold = history[-1], parse_quantity(policy.threshold)
    row, broken_by = _row(history, threshold)
    seconds = min(
        (newest.received_at - row[0].received_at).total_seconds(),
        (newest.observed_at - row[0].observed_at).total_seconds(),
    )
    above = f"{_figures(newest)} is above {show_bytes(threshold)}"
    if len(row) < policy.min_samples:  # 7
        return EvidenceReason.TOO_FEW_SAMPLES, (
            f"{above} in {len(row)} of {policy.min_samples} samples{broken_by}"
        )
    if seconds < policy.for_seconds:  # 8
        return EvidenceReason.TOO_SHORT, (
            f"{above} for {seconds:.0f} of {policy.for_seconds} s{broken_by}"
        )
    return EvidenceReason.SUFFICIENT, (
        f"residual {show_bytes(newest.residual_bytes)} above {show_bytes(threshold)} "
        f"for {seconds:.0f} s ({len(row)} samples, source {newest.source})"
    )


def _figures(sample: ResidualSample) -> str:
    return f"residual {show_bytes(sample.residual_bytes)} at {show_time(sample.observed_at)}"


def _row(
    history: tuple[ResidualSample, ...], threshold: int
) -> tuple[tuple[ResidualSample, ...], str]:
    """Return the newest samples in a row that prove it, oldest first, and what ended the row."""
    newest = history[-1]
    for index in range(len(history) - 1, -1, -1):
        sample = history[index]
        at = show_time(sample.observed_at)
        if (sample.boot_id, sample.epoch) != (newest.boot_id, newest.epoch):
            return history[index + 1 :], f", since the one at {at} is of another boot or epoch"
        if sample.source is ResidualSource.UNKNOWN:
            return history[index + 1 :], f", since the one at {at} has the source Unknown"
        if sample.residual_bytes <= threshold:
            return history[index + 1 :], f", since the one at {at} was below"
        if not sample.quiet:
            return history[index + 1 :], f", since the one at {at} came with {_unrest(sample)}"
    return history, ""


def _unrest(sample: ResidualSample) -> str:
    if sample.in_flight:
        return f"{sample.in_flight} requests running or waiting"
    return "a model on its way" if sample.moving else "the agent not idle"
