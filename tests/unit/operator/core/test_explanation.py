"""The words of ``vram-operator explain`` say what the plan of the same moment does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vram_agent.protocol import ResidualSource
from vram_operator.api import RestartTrigger, Window, WorkloadStatus
from vram_operator.core.explanation import explain
from vram_operator.core.plan import CreateRestart, PatchWorkloadStatus
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import Agent, Snapshot

from tests.support.factories import (
    NOW,
    ago,
    make_agent,
    make_pod,
    make_policy,
    make_restart,
    make_settings,
    make_snapshot,
    make_template_spec,
    make_workload,
)

A, B = make_pod("speech-a"), make_pod("speech-b", ready=False)


def told(snapshot: Snapshot) -> str:
    return explain(snapshot, plan(snapshot, NOW), NOW)


def test_a_workload_in_full() -> None:
    policy = make_policy(
        schedule="0 3 * * *",
        time_zone="Asia/Shanghai",
        windows=[Window(schedule="0 10 * * *", duration_seconds=14_400)],
        max_unavailable="50%",
    )
    seen = make_snapshot(pods=(A,), agents=(make_agent(A, 5.0),))
    status = plan(seen, ago(60)).status
    snapshot = make_snapshot(
        workload=make_workload(spec=make_template_spec(restart=policy), status=status),
        pods=(A, B),
        agents=(make_agent(A, 5.0, ago(3)), Agent(pod_uid=B.uid, error="does not answer")),
        settings=make_settings(max_concurrent_restarts="10%"),
    )
    assert told(snapshot).splitlines() == [
        "GPUModelWorkload lab/speech, generation 3, at 2026-11-23T12:00:00Z",
        "answer",
        (
            "  nothing is restarted: speech-a: BelowThreshold, looked at again with its next "
            "report; the schedule restarts at 2026-11-23T19:00:00Z: speech-a: residual 5Gi at "
            "2026-11-23T11:59:57Z is not above 8Gi"
        ),
        "accepted",
        "  yes",
        "pods",
        "  speech-a: ready, node node-of-speech-a",
        "    agent     boot boot-spe, epoch 0, report 3 s old",
        "    memory    used 5Gi, models 0, residual 5Gi (source Exclusive, quiet)",
        "    evidence  BelowThreshold: residual 5Gi at 2026-11-23T11:59:57Z is not above 8Gi",
        "    trend     unknown: 13 quiet samples",
        "    residual  may begin",
        "    scheduled may begin",
        "  speech-b: not ready, node node-of-speech-b",
        "    agent     no report: does not answer",
        "    evidence  NoReport: no report: does not answer",
        "    trend     unknown: 0 quiet samples",
        "    residual  may begin",
        "    scheduled may begin",
        "schedule",
        "  0 3 * * * in Asia/Shanghai",
        "  next at 2026-11-23T19:00:00Z; may begin for 1 h after that",
        "windows",
        "  0 10 * * * in Etc/UTC for 4 h",
        (
            "  open from 2026-11-23T10:00:00Z to 2026-11-23T14:00:00Z, opens again at "
            "2026-11-24T10:00:00Z"
        ),
        "limits",
        "  maxUnavailable 50%: 1 of 2 pods",
        "  --max-concurrent-restarts 10%: 1 of 2 pods, 0 run; one on each node",
        "  maxConsecutiveFailures 3: 0 in a row",
        "restarts",
        "  none is open",
        "plan",
        (
            "  tell AgentSilent: no fresh report from speech-b; see that vram-agent runs there and "
            "that the operator can reach its control port"
        ),
        "next look",
        "  at 2026-11-23T12:01:28Z, and with news of pods, agents or the spec",
        "status, as the operator wrote it last",
        "  Accepted=True, Accepted",
        "  Ready=True, Ready",
        "  AgentsReporting=True, Reporting",
        "  ResidualHigh=False, BelowThreshold",
        "  VRAMHigh=False, NoWarning",
        (
            "  Restarting=False, NotRestarting: speech-a: BelowThreshold, looked at again with its "
            "next report; there is no schedule: residual 5Gi at 2026-11-23T12:00:00Z is not "
            "above 8Gi"
        ),
        "  RestartBlocked=False, NotBlocked",
        "  Degraded=False, Healthy",
    ]


def section(text: str, title: str) -> list[str]:
    """The lines below a title."""
    lines = text.splitlines()
    below = lines[lines.index(title) + 1 :]
    end = next((n for n, line in enumerate(below) if not line.startswith(" ")), len(below))
    return [line.strip() for line in below[:end]]


@pytest.mark.parametrize(
    ("fields", "title", "line"),
    [
        pytest.param(
            {"pods": (A,), "agents": (make_agent(A, 9.0),)},
            "answer",
            "restarts are decided now: speech-a",
            id="a restart that is decided",
        ),
        pytest.param(
            {"pods": (A,), "agents": (make_agent(A, 9.0),)},
            "next look",
            "at once, since something is done",
            id="and what follows",
        ),
        pytest.param(
            {"pods": (A,), "agents": (make_agent(A, 9.0),), "restarts": (make_restart(A),)},
            "plan",
            "recycle pod speech-a",
            id="a restart that goes",
        ),
        pytest.param(
            {
                "pods": (A,),
                "agents": (make_agent(A, 9.0, idle=False),),
                "restarts": (make_restart(A),),
            },
            "restarts",
            "speech-speech-a: Residual of speech-a, Queued: residual 9Gi above 8Gi",
            id="a restart that waits",
        ),
        pytest.param(
            {
                "pods": (A,),
                "restarts": (make_restart(A, method="Evict", trigger=RestartTrigger.MANUAL),),
            },
            "plan",
            "ask the PodDisruptionBudgets about pod speech-a",
            id="a budget that is asked",
        ),
        pytest.param(
            {"workload": make_workload(spec=make_template_spec(restart=make_policy(suspend=True)))},
            "pods",
            "scheduled would wait, Suspended: restart.suspend is true",
            id="suspended",
        ),
        pytest.param(
            {
                "workload": make_workload(
                    spec=make_template_spec(restart=make_policy(schedule="0 3 * *"))
                )
            },
            "accepted",
            "no, InvalidSchedule: restart.schedule: '0 3 * *' does not have five fields; write "
            "for example 0 3 * * *",
            id="a refused spec",
        ),
        pytest.param(
            {"settings": make_settings(dry_run=True)},
            "limits",
            "dry run by --dry-run: nothing is carried out",
            id="a dry run",
        ),
        pytest.param({"pods": ()}, "pods", "none", id="no pods"),
        pytest.param(
            {"objects": ()}, "plan", "apply Service speech", id="objects that are missing"
        ),
        pytest.param(
            {"workload": make_workload(status=WorkloadStatus())},
            "status, as the operator wrote it last",
            "it has not looked at the workload yet",
            id="a workload that nobody has seen",
        ),
    ],
)
def test_a_line_for_each_thing(fields: dict[str, Any], title: str, line: str) -> None:
    assert line in section(told(make_snapshot(**fields)), title)


@given(
    st.sampled_from([1.0, 9.0]),
    st.booleans(),
    st.sampled_from(list(ResidualSource)),
    st.sampled_from([0, 29, 31, 200]),
    st.booleans(),
)
@settings(deadline=None)
def test_what_is_told_is_what_is_planned(
    gib: float, idle: bool, source: ResidualSource, age: int, is_open: bool
) -> None:
    restarts = (make_restart(A),) if is_open else ()
    agent = make_agent(A, gib, ago(age), idle=idle, source=source)
    snapshot = make_snapshot(pods=(A,), agents=(agent,), restarts=restarts)
    planned = plan(snapshot, NOW)
    lines = section(told(snapshot), "plan")
    deeds = [one for one in planned.actions if not isinstance(one, PatchWorkloadStatus)]
    assert len(lines) == max(1, len(deeds))
    creates = [one for one in deeds if isinstance(one, CreateRestart)]
    assert [line.split(":")[0] for line in lines if line.startswith("create ")] == [
        f"create GPUPodRestart {one.manifest['metadata']['name']}" for one in creates
    ]
