"""Which pods should have an agent that reports, and when one of them is silent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import Agent, Pod, Snapshot

from tests.support.factories import NOW, make_agent, make_pod, make_snapshot

A = make_pod("speech-a")


def _agents_reporting(snapshot: Snapshot) -> tuple[str, str]:
    conditions = plan(snapshot, NOW).conditions
    found = next(one for one in conditions if one.type == "AgentsReporting")
    return found.status, found.reason


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_pod_that_has_ended_is_not_waited_for(phase: str) -> None:
    old = make_pod("speech-old", phase=phase, ready=False)
    agents = (make_agent(A), Agent(pod_uid=old.uid, error="does not answer"))
    snapshot = replace(make_snapshot(pods=(A,), agents=agents), pods=(A, old))
    status = plan(snapshot, NOW).status
    assert _agents_reporting(snapshot) == ("True", "Reporting")
    assert (status.agents.expected, status.agents.reporting, status.ready_replicas) == (1, 1, 1)


@pytest.mark.parametrize(
    ("pod", "error", "expected"),
    [
        pytest.param(A, "", ("Unknown", "Pending"), id="nobody has asked it yet"),
        pytest.param(A, "no answer", ("False", "AgentSilent"), id="it was asked"),
        pytest.param(
            replace(A, control_port=0), "", ("False", "NoControlPort"), id="nobody can ask it"
        ),
    ],
)
def test_an_agent_is_silent_once_it_was_asked(
    pod: Pod, error: str, expected: tuple[str, str]
) -> None:
    agents = (Agent(pod_uid=pod.uid, error=error),)
    assert _agents_reporting(make_snapshot(pods=(pod,), agents=agents)) == expected
