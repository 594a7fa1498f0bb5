"""What the plan knows of a pod, whatever its kubelet says and leaves out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from vram_operator.pods import read_pod

STARTED = datetime(2026, 1, 1, 0, 0, 7, tzinfo=UTC)
BEGAN = datetime(2026, 1, 1, 0, 0, 5, tzinfo=UTC)
CREATED = datetime(2026, 1, 1, tzinfo=UTC)


def raw_pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "speech-1",
            "uid": "u1",
            "resourceVersion": "5",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"containers": [{"name": "agent"}]},
        "status": {"phase": "Running", "startTime": "2026-01-01T00:00:05Z", **status},
    }


def container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "agent", "state": state}]}


@pytest.mark.parametrize(
    ("status", "since"),
    [
        pytest.param(
            container(running={"startedAt": "2026-01-01T00:00:07Z"}), STARTED, id="it runs"
        ),
        pytest.param(container(waiting={"reason": "CrashLoopBackOff"}), None, id="it waits"),
        pytest.param(container(running={}), BEGAN, id="it runs, and nobody says since when"),
        pytest.param({}, BEGAN, id="a virtual kubelet says nothing of containers"),
        pytest.param({"startTime": None}, CREATED, id="nor when the pod started"),
        pytest.param({"phase": "Pending"}, None, id="a pod that does not run has no agent"),
    ],
)
def test_since_when_the_agent_runs(status: dict[str, Any], since: datetime | None) -> None:
    assert read_pod(raw_pod(**status), None).agent_running_since == since


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_pod_that_has_ended_is_not_present(phase: str) -> None:
    assert not read_pod(raw_pod(phase=phase), None).is_present
    assert read_pod(raw_pod(), None).is_present
