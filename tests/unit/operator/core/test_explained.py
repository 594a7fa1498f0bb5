"""What a status says of a pod that is not restarted: the rule, the sample, and no more often than
that changes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from vram_agent.protocol import ResidualSource
from vram_operator.core.plan import PatchRestartStatus
from vram_operator.core.planning import plan

from tests.support.factories import (
    NOW,
    make_agent,
    make_model,
    make_pod,
    make_restart,
    make_snapshot,
)

POD = make_pod()


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
