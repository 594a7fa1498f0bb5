"""What one visit counts, and when."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from vram_operator.api import RestartMethod, RestartTrigger, WorkloadStatus
from vram_operator.core.plan import CallRestart, PatchRestartStatus, Plan
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import ActiveRestart, Cluster, Snapshot
from vram_operator.live import StaleError
from vram_operator.metrics import Metrics
from vram_operator.reconcile import Reconciler

from tests.support.clocks import StoppedClock
from tests.support.factories import (
    NOW,
    make_agent,
    make_answer,
    make_pod,
    make_policy,
    make_restart,
    make_settings,
    make_snapshot,
    make_template_spec,
    make_workload,
)

KEY = ("lab", "speech")


@dataclass
class Gathered:
    snapshot: Snapshot

    async def gather(self, _: Any) -> Snapshot:
        return self.snapshot

    def forget(self, _: Any) -> None:
        raise AssertionError("the workload is there")


@dataclass
class Apiserver:
    """Refuses as many writes as it is told to."""

    conflicts: int = 0
    actions: list[Any] = field(default_factory=list)

    async def apply(self, _: Any, planned: Plan) -> None:
        if self.conflicts:
            self.conflicts -= 1
            raise StaleError("the workload has changed")
        self.actions += planned.actions

    async def settle(self) -> None:
        """Every write was answered."""


def missed() -> Snapshot:
    policy = make_policy(schedule="30 * * * *", starting_deadline_seconds=60)
    announced = NOW - timedelta(minutes=90)
    workload = make_workload(spec=make_template_spec(restart=policy))
    workload = replace(workload, status=WorkloadStatus(next_restart_time=announced))
    settings = replace(make_snapshot().settings, schedule_jitter_seconds=0)
    return make_snapshot(workload=workload, settings=settings)


async def test_a_missed_run_counts_once_however_often_the_status_write_fails() -> None:
    metrics = Metrics()
    gathered: Any = Gathered(missed())
    applier: Any = Apiserver(conflicts=2)
    reconciler = Reconciler(gathered, applier, metrics, StoppedClock())
    for _ in range(2):
        with pytest.raises(StaleError):
            await reconciler.reconcile(KEY)
    await reconciler.reconcile(KEY)
    assert metrics.registry.get_sample_value("vram_operator_schedule_missed_total") == 1


async def test_no_agent_is_called_while_other_workloads_wait_to_be_admitted() -> None:
    pod = make_pod()
    restart = make_restart(pod, method=RestartMethod.IN_PLACE, trigger=RestartTrigger.MANUAL)
    snapshot = make_snapshot(
        pods=(pod,), agents=(make_agent(pod),), restarts=(restart,), evictions=(make_answer(pod),)
    )
    kinds = {type(one) for one in plan(snapshot, NOW).actions}
    assert {CallRestart, PatchRestartStatus} <= kinds
    gathered: Any = Gathered(snapshot)
    applier: Any = Apiserver()
    delay = await Reconciler(gathered, applier, Metrics(), StoppedClock()).reconcile(KEY)
    done = {type(one) for one in applier.actions}
    assert (CallRestart in done, PatchRestartStatus in done, delay) == (False, True, 0.0)


def waiting_for_a_place() -> Snapshot:
    """A queued restart, and another workload's that takes the one place there is."""
    pod = make_pod()
    other = ActiveRestart(namespace="prod", name="tts-1", workload="tts", node="node-9")
    return make_snapshot(
        pods=(pod,),
        agents=(make_agent(pod, 9.0),),
        restarts=(make_restart(pod),),
        settings=make_settings(max_concurrent_restarts="1"),
        cluster=Cluster(total_pods=20, active_restarts=(other,)),
    )


def ending() -> Snapshot:
    """A recycle that is done, and the report that shows it."""
    pod = make_pod()
    restart = make_restart(pod)
    running = plan(
        make_snapshot(pods=(pod,), agents=(make_agent(pod, 9.0),), restarts=(restart,)), NOW
    )
    (written,) = (one for one in running.actions if isinstance(one, PatchRestartStatus))
    # The pod went away meanwhile: that ends it.
    return make_snapshot(pods=(), restarts=(replace(restart, status=written.status),))


async def test_the_end_of_a_restart_offers_its_place_to_a_few_that_wait_and_then_to_others() -> (
    None
):
    gathered: Any = Gathered(waiting_for_a_place())
    applier: Any = Apiserver()
    reconciler = Reconciler(gathered, applier, Metrics(), StoppedClock())
    waiting = [("lab", f"waiting-{number}") for number in range(5)]
    for key in waiting:
        await reconciler.reconcile(key)
    offered: list[Any] = []
    reconciler.on_place = offered.append
    gathered.snapshot = ending()
    await reconciler.reconcile(KEY)
    assert offered == waiting[:3]
    await reconciler.reconcile(KEY)
    assert offered == [*waiting[:3], *waiting[3:], waiting[0]]
