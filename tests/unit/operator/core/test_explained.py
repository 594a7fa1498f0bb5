"""What a status says of a pod that is not restarted: the rule, the sample, and no more often than
that changes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from vram_agent.protocol import ResidualSource
from vram_operator.api import Condition, RestartOutcome, RestartStatus, Window, WorkloadCondition
from vram_operator.core.condition_list import find_condition
from vram_operator.core.plan import PatchRestartStatus, PatchWorkloadStatus, Plan
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import Agent, Snapshot, Workload

from tests.support.factories import (
    NOW,
    ago,
    make_agent,
    make_model,
    make_pod,
    make_policy,
    make_restart,
    make_settings,
    make_snapshot,
    make_template_spec,
    make_workload,
)

POD, OTHER = make_pod(), make_pod("speech-b")


def test_a_refused_restart_says_which_rule_and_which_sample_refused_it() -> None:
    busy = make_agent(POD, 9.0, models=[make_model(in_flight=2)])
    snapshot = make_snapshot(pods=(POD,), agents=(busy,), restarts=(make_restart(POD),))
    (write,) = [one for one in plan(snapshot, NOW).actions if isinstance(one, PatchRestartStatus)]
    admitted = write.status.conditions[0]
    assert (admitted.status, admitted.reason) == ("False", "NotIdle")
    assert admitted.message == (
        "pod speech-a: the evidence does not hold now (NotQuiet): residual 9Gi at "
        "2026-11-23T12:00:00Z was seen with 2 requests running or waiting"
    )


def test_figures_that_move_do_not_write_a_refusal_again() -> None:
    busy = make_agent(POD, 9.0, models=[make_model(in_flight=2)])
    snapshot = make_snapshot(pods=(POD,), agents=(busy,), restarts=(make_restart(POD),))
    (write,) = [one for one in plan(snapshot, NOW).actions if isinstance(one, PatchRestartStatus)]
    waiting = replace(snapshot.restarts[0], status=write.status)
    later = NOW + timedelta(seconds=20)
    more = make_agent(POD, 9.7, later, models=[make_model(in_flight=5)])
    again = plan(replace(snapshot, agents=(more,), restarts=(waiting,)), later)
    assert not [one for one in again.actions if isinstance(one, PatchRestartStatus)]
    unknown = make_agent(POD, 9.7, later, source=ResidualSource.UNKNOWN)
    other = plan(replace(snapshot, agents=(unknown,), restarts=(waiting,)), later)
    (write,) = [one for one in other.actions if isinstance(one, PatchRestartStatus)]
    assert "(UnknownSource)" in write.status.conditions[0].message


# --- the message of Restarting --------------------------------------------------------------------


def restarting(planned: Plan) -> Condition:
    found = find_condition(planned.conditions, WorkloadCondition.RESTARTING)
    assert found is not None
    return found


def workload_with(**policy: Any) -> Workload:
    return make_workload(spec=make_template_spec(restart=make_policy(**policy)))


ENDED = RestartStatus(start_time=ago(70), completion_time=ago(60), outcome=RestartOutcome.RECOVERED)
FAILED = [
    make_restart(
        POD,
        name=f"failed-{n}",
        status=RestartStatus(
            start_time=ago(9000), completion_time=ago(8000 + n), outcome=RestartOutcome.FAILED
        ),
    )
    for n in range(3)
]


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        pytest.param(
            make_snapshot(pods=(POD,), agents=(make_agent(POD, 5.0),)),
            "speech-a: BelowThreshold, looked at again with its next report; there is no schedule: "
            "residual 5Gi at 2026-11-23T12:00:00Z is not above 8Gi",
            id="below the threshold",
        ),
        pytest.param(
            make_snapshot(
                workload=workload_with(schedule="0 3 * * *", time_zone="Asia/Shanghai"),
                pods=(POD,),
                agents=(make_agent(POD, 5.0),),
            ),
            "speech-a: BelowThreshold, looked at again with its next report; "
            "the schedule restarts at 2026-11-23T19:00:00Z: "
            "residual 5Gi at 2026-11-23T12:00:00Z is not above 8Gi",
            id="below, and a schedule",
        ),
        pytest.param(
            make_snapshot(
                pods=(POD, OTHER), agents=(make_agent(POD, 5.0), make_agent(OTHER, 9.0, idle=False))
            ),
            "speech-b: CollectingEvidence as of 2026-11-23T12:00:00Z, looked at again with its "
            "next report; there is no schedule: speech-b: residual 9Gi at 2026-11-23T12:00:00Z "
            "was seen with the agent not idle",
            id="of two the one that is nearer to a restart",
        ),
        pytest.param(
            make_snapshot(pods=(POD,), agents=(make_agent(POD, 9.0, ago(31)),)),
            "speech-a: Stale, looked at again when it reports again; there is no schedule: "
            "residual 9Gi at 2026-11-23T11:59:29Z is 31 s old; up to 30 s counts",
            id="no fresh report",
        ),
        pytest.param(
            make_snapshot(
                workload=workload_with(windows=[Window(schedule="0 1 * * *", duration_seconds=60)]),
                pods=(POD,),
                agents=(make_agent(POD, 9.0),),
            ),
            "speech-a waits (OutsideWindow); there is no schedule: the next window of "
            "restart.windows opens at 2026-11-24T01:00:00Z",
            id="outside of its windows",
        ),
        pytest.param(
            make_snapshot(
                pods=(POD,),
                agents=(make_agent(POD, 9.0),),
                restarts=(make_restart(POD, name="before", status=ENDED),),
            ),
            "speech-a waits (Cooldown); there is no schedule: pod speech-a is left alone until "
            "2026-11-23T12:10:00Z",
            id="in its cooldown",
        ),
        pytest.param(
            make_snapshot(
                workload=workload_with(suspend=True, schedule="0 3 * * *"),
                pods=(POD,),
                agents=(make_agent(POD, 9.0),),
            ),
            "speech-a waits (Suspended); restart.suspend is true, so only a person restarts: "
            "restart.suspend is true",
            id="suspended",
        ),
        pytest.param(
            make_snapshot(pods=(POD,), agents=(make_agent(POD, 9.0),), restarts=tuple(FAILED)),
            "speech-a waits (RestartsDoNotHelp); there is no schedule: 3 restarts in a row did "
            "not help",
            id="degraded",
        ),
        pytest.param(
            make_snapshot(
                pods=(POD,),
                agents=(make_agent(POD, 9.0, idle=False),),
                restarts=(make_restart(POD),),
            ),
            "speech-speech-a waits (NotIdle), looked at again within 10 s; there is no schedule: "
            "pod speech-a: the evidence does not hold now (NotQuiet): residual 9Gi at "
            "2026-11-23T12:00:00Z was seen with the agent not idle",
            id="decided, and held back by its evidence",
        ),
        pytest.param(
            make_snapshot(
                workload=workload_with(dry_run=True), pods=(POD,), agents=(make_agent(POD, 5.0),)
            ),
            "speech-a: BelowThreshold, looked at again with its next report; there is no schedule; "
            "dry run by restart.dryRun: residual 5Gi at 2026-11-23T12:00:00Z is not above 8Gi",
            id="a dry run",
        ),
        pytest.param(
            make_snapshot(settings=make_settings(dry_run=True), pods=()),
            "the workload has no pods; there is no schedule; dry run by --dry-run",
            id="no pods, and the operator's own dry run",
        ),
        pytest.param(
            make_snapshot(workload=workload_with(residual=None, schedule="0 3 * * *")),
            "restart.residual is not set; the schedule restarts at 2026-11-24T03:00:00Z",
            id="a schedule alone",
        ),
        pytest.param(
            make_snapshot(workload=workload_with(schedule="61 3 * * *")),
            "the spec is not accepted: see the condition Accepted",
            id="a spec that is refused",
        ),
    ],
)
def test_one_message_says_why_nothing_is_restarted(snapshot: Snapshot, said: str) -> None:
    found = restarting(plan(snapshot, NOW))
    assert (found.status, found.reason) == ("False", "NotRestarting")
    assert found.message == said


def seen_later(first: Snapshot, agents: tuple[Agent, ...], seconds: float) -> Plan:
    """What is planned some time after the first look, which has been carried out."""
    planned = plan(first, NOW)
    workload = replace(first.workload, status=planned.status)
    return plan(replace(first, workload=workload, agents=agents), NOW + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("gib", "writes"),
    [
        pytest.param(5.0, False, id="the same"),
        pytest.param(5.4, False, id="a little more"),
        pytest.param(5.6, True, id="more than 512Mi more"),
    ],
)
def test_the_figures_of_the_message_follow_the_sums_of_the_status(gib: float, writes: bool) -> None:
    first = make_snapshot(pods=(POD,), agents=(make_agent(POD, 5.0),))
    later = NOW + timedelta(seconds=20)
    planned = seen_later(first, (make_agent(POD, gib, later),), 20)
    assert [type(one) for one in planned.actions] == [PatchWorkloadStatus] * writes
    assert restarting(planned).message.endswith(
        "residual 5.6Gi at 2026-11-23T12:00:20Z is not above 8Gi"
        if writes
        else "residual 5Gi at 2026-11-23T12:00:00Z is not above 8Gi"
    )


@pytest.mark.parametrize(
    ("seconds", "writes"), [pytest.param(299, False, id="for five minutes"), (300, True)]
)
def test_a_busy_pod_above_its_threshold_does_not_write_with_each_report(
    seconds: float, writes: bool
) -> None:
    first = make_snapshot(pods=(POD,), agents=(make_agent(POD, 9.0, idle=False),))
    later = NOW + timedelta(seconds=seconds)
    busy = make_agent(POD, 9.1, later, models=[make_model(in_flight=3)])
    planned = seen_later(first, (busy,), seconds)
    assert [type(one) for one in planned.actions] == [PatchWorkloadStatus] * writes
