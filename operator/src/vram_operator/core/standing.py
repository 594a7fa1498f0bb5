"""Why the workload's pods are not being restarted, in one sentence for ``kubectl describe``.

Why it exists: the answer lies in several conditions, and who asks wants one. Called by
``conditions`` for the message of Restarting while nothing runs. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from vram_operator.api import Reason
from vram_operator.core.evidence import BLIND, COLLECTING, Evidence, EvidenceReason
from vram_operator.core.figures import name_some, say_jitter, show_span, show_time
from vram_operator.core.plan import Blocked
from vram_operator.core.queue_phase import LOOKS_AGAIN
from vram_operator.core.visit import Visit

AS_OF_STEP = timedelta(minutes=5)
"""While evidence is collected, what is said of it is said anew so often at most."""
_NEAREST_FIRST = (
    EvidenceReason.SUFFICIENT,
    EvidenceReason.PREDICTED,
    EvidenceReason.TOO_SHORT,
    EvidenceReason.TOO_FEW_SAMPLES,
    EvidenceReason.NOT_QUIET,
    EvidenceReason.THRESHOLD_TOO_LOW,
    EvidenceReason.BELOW_THRESHOLD,
    EvidenceReason.UNKNOWN_SOURCE,
    EvidenceReason.STALE,
    EvidenceReason.NO_REPORT,
)


@dataclass(frozen=True, slots=True)
class Standing:
    """What holds as long as no rule changes, and the figures that go with it."""

    message: str
    figures: str = ""


def find_standing(
    visit: Visit, blocked: Sequence[Blocked], next_restart_time: datetime | None
) -> Standing:
    """Say why nothing is restarted now, and when it is looked at again.

    The first that applies:

    1. the spec is not accepted;
    2. a restart waits: what for;
    3. there are no pods;
    4. the residual: the rule that keeps the pod that is nearest to a restart, and its sample;
    5. nothing asks for a restart but the schedule, or a person.
    """
    if visit.refusal is not None:  # 1
        return Standing("the spec is not accepted: see the condition Accepted")
    waiting = min(
        (one for one in blocked if one.reason is not Reason.PENDING),
        key=lambda one: (one.restart, one.pod),
        default=None,
    )
    scheduled = _say_schedule(visit, next_restart_time)
    if waiting is not None:  # 2
        # What is not decided yet has its time in the message, or waits for the spec to change.
        again = f", looked at again within {show_span(LOOKS_AGAIN)}" if waiting.restart else ""
        return Standing(
            f"{waiting.restart or waiting.pod} waits ({waiting.reason}){again}; {scheduled}",
            ": ".join(filter(None, (waiting.message, waiting.figures))),
        )
    if not visit.pods:  # 3
        return Standing(f"the workload has no pods; {scheduled}")
    found = {
        pod.name: evidence for pod in visit.pods if (evidence := visit.evidence_of(pod)) is not None
    }
    if found:  # 4
        return _say_evidence(visit, found, scheduled)
    return Standing(f"restart.residual is not set; {scheduled}")  # 5


def _say_evidence(visit: Visit, found: Mapping[str, Evidence], scheduled: str) -> Standing:
    reason = min((one.reason for one in found.values()), key=_NEAREST_FIRST.index)
    if reason in COLLECTING:
        # Each report may be of another of these rules; what is said is as of every few minutes.
        names = [name for name, one in found.items() if one.reason in COLLECTING]
        step = AS_OF_STEP.total_seconds()
        as_of = datetime.fromtimestamp(visit.now.timestamp() // step * step, visit.now.tzinfo)
        rule = f"{Reason.COLLECTING_EVIDENCE} as of {show_time(as_of)}"
    else:
        names = [name for name, one in found.items() if one.reason is reason]
        rule = str(reason)
    first = min(names, key=lambda name: (found[name].reason is not reason, name))
    again = "when it reports again" if reason in BLIND else "with its next report"
    about = f"{first}: " if len(found) > 1 else ""
    return Standing(
        f"{name_some(names)}: {rule}, looked at again {again}; {scheduled}",
        f"{about}{found[first].message}",
    )


def _say_schedule(visit: Visit, next_restart_time: datetime | None) -> str:
    if visit.policy.suspend:
        said = "restart.suspend is true, so only a person restarts"
    elif next_restart_time is not None:
        said = f"the schedule restarts at {show_time(next_restart_time)}{say_jitter(visit.jitter)}"
    else:
        said = "there is no schedule"
    return f"{said}; {say_dry_run(visit)}" if visit.dry_run else said


def say_dry_run(visit: Visit) -> str:
    """Say who wants the dry run, for a visit that has one."""
    return f"dry run by {'restart.dryRun' if visit.policy.dry_run else '--dry-run'}"
