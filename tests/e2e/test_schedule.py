"""A schedule on a real kubelet. Its workload is applied first and looked at last: a container must
have run for 630 s before it may exit, or the kubelet's back-off would hold it."""

from __future__ import annotations

from datetime import datetime

from tests.e2e.system import Json, System


def test_a_scheduled_restart_exits_in_place_and_the_container_comes_back(
    system: System, scheduled: datetime
) -> None:
    def waits() -> Json | None:
        return next(iter(system.restarts_of("scheduled")), None)

    opened = system.wait("the scheduled restart", 180, waits)
    assert opened["spec"]["trigger"] == "Scheduled"
    assert opened["spec"]["scheduledTime"] == scheduled.strftime("%Y-%m-%dT%H:%M:%SZ")
    restart = system.wait("its end", 800, lambda: system.finished("scheduled"))
    assert restart["status"]["outcome"] == "Recovered", restart
    assert [attempt["method"] for attempt in restart["status"]["attempts"]] == ["InPlace"]
    after = system.container("scheduled")
    assert system.pod("scheduled")["metadata"]["uid"] == opened["spec"]["pod"]["uid"]
    assert after["restartCount"] == 1
    assert after["lastState"]["terminated"]["exitCode"] == 0
    assert len(system.restarts_of("scheduled")) == 1
