"""What one visit counts, and when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from vram_operator.api import WorkloadStatus
from vram_operator.core.snapshot import Snapshot
from vram_operator.live import StaleError
from vram_operator.metrics import Metrics
from vram_operator.reconcile import Reconciler

from tests.support.factories import (
    NOW,
    make_policy,
    make_snapshot,
    make_template_spec,
    make_workload,
)

KEY = ("lab", "speech")


@dataclass
class StoppedClock:
    def now(self) -> datetime:
        return NOW

    def monotonic(self) -> float:
        return 0.0


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

    conflicts: int

    async def apply(self, *_: Any) -> None:
        if self.conflicts:
            self.conflicts -= 1
            raise StaleError("the workload has changed")


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
