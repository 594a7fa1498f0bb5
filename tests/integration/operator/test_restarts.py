"""Restarts from beginning to end: what triggers them, what they do, what holds them up."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta

import pytest

from tests.integration.operator.client import VRAM, Object, eventually
from tests.integration.operator.world import NAME, World, condition, manual_restart, workload
from tests.support.agents import GIB, Script

pytestmark = pytest.mark.control_plane

RESIDUAL = {"threshold": "8Gi", "forSeconds": 1, "minSamples": 2}
POLICY = "/apis/policy/v1"


def leaking(after_recycle_bytes: int = 0, after_restart_bytes: int = 0) -> Script:
    return Script(
        residual_bytes=9 * GIB,
        after_recycle_bytes=after_recycle_bytes,
        after_restart_bytes=after_restart_bytes,
    )


def attempts(restart: Object) -> list[tuple[str, str]]:
    return [(one["method"], one["result"]) for one in restart["status"]["attempts"]]


async def test_a_recycle_that_helps_is_all_that_is_done(world: World) -> None:
    world.kubelet.scripts = lambda: leaking(after_recycle_bytes=0)
    await world.start()
    await world.create(workload(residual=RESIDUAL))
    (restart,) = await world.until_finished()

    assert restart["spec"]["trigger"] == "Residual"
    assert "9Gi above 8Gi" in restart["spec"]["reason"]
    assert restart["status"]["outcome"] == "Recovered"
    assert attempts(restart) == [("Recycle", "Recovered")]
    assert restart["status"]["before"]["residual"] == "9Gi"
    assert restart["status"]["after"]["residual"] == "0"
    assert restart["status"]["reclaimed"] == "9Gi"
    assert [step for _, step in world.kubelet.executed] == ["Recycle"]
    (pod,) = await world.pods()
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    assert all(agent.refused == [] for agent in world.kubelet.agents)

    async def last() -> Object | None:
        return ((await world.workload() or {}).get("status") or {}).get("lastRestart")

    shown = await eventually(last, "the workload tells of it")
    assert shown is not None
    assert (shown["method"], shown["outcome"]) == ("Recycle", "Recovered")


async def test_a_recycle_that_does_not_help_is_followed_by_an_exit_in_place(world: World) -> None:
    world.kubelet.scripts = lambda: leaking(after_recycle_bytes=9 * GIB, after_restart_bytes=0)
    await world.start()
    await world.create(workload(residual=RESIDUAL))
    (restart,) = await world.until_finished()

    assert restart["status"]["outcome"] == "Recovered"
    assert attempts(restart) == [("Recycle", "NotRecovered"), ("InPlace", "Recovered")]
    assert [step for _, step in world.kubelet.executed] == ["Recycle", "InPlace"]
    (pod,) = await world.pods()
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 1
    before, after = restart["status"]["before"], restart["status"]["after"]
    assert before["bootID"] != after["bootID"]
    assert restart["status"]["downtimeSeconds"] >= 0


async def test_after_a_restart_that_did_not_help_the_cooldown_holds(world: World) -> None:
    world.kubelet.scripts = lambda: leaking(after_restart_bytes=9 * GIB)
    operator = await world.start()
    await world.create(workload(residual=RESIDUAL, method="InPlace"))
    (restart,) = await world.until_finished(timeout_seconds=60)
    assert restart["status"]["outcome"] == "NotRecovered"
    await asyncio.sleep(5)
    assert [one["metadata"]["name"] for one in await world.restarts()] == [
        restart["metadata"]["name"]
    ]
    assert len(world.kubelet.executed) == 1
    assert 'restarts_blocked{reason="Cooldown"} 1.0' in (await operator.probe("/metrics"))[1]


async def test_an_agent_that_cannot_recycle_is_restarted_in_place(world: World) -> None:
    world.kubelet.scripts = lambda: Script(residual_bytes=9 * GIB, recycle_status=501)
    await world.start()
    await world.create(workload(residual=RESIDUAL))
    (restart,) = await world.until_finished()
    assert restart["status"]["outcome"] == "Recovered"
    assert [step for _, step in world.kubelet.executed] == ["InPlace"]


async def test_an_agent_that_refuses_calls_is_evicted(world: World) -> None:
    world.kubelet.scripts = lambda: Script(
        residual_bytes=0 if world.kubelet.history else 9 * GIB,
        recycle_status=403,
        restart_status=403,
    )
    await world.start()
    await world.create(workload(residual=RESIDUAL))
    (restart,) = await world.until_finished()
    assert restart["status"]["outcome"] == "Recovered"
    assert [method for method, _ in attempts(restart)][-1] == "Evict"
    assert world.kubelet.executed == []
    assert len(world.kubelet.history) == 2


async def test_a_schedule_restarts_each_pod_once(world: World) -> None:
    await world.start()
    body = workload(schedule="0 3 * * *")
    body["spec"]["template"]["replicas"] = 2
    await world.create(body)
    await world.until_ready()
    # The last full minute: missed a moment ago, and caught up once.
    due = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    path = world.client.path(VRAM, "gpumodelworkloads", NAME)
    schedule = f"{due.minute} {due.hour} * * *"
    await world.client.merge(path, {"spec": {"restart": {"schedule": schedule}}})
    restarts = await world.until_finished(2, timeout_seconds=120)

    assert {one["spec"]["trigger"] for one in restarts} == {"Scheduled"}
    times = {datetime.fromisoformat(one["spec"]["scheduledTime"]) for one in restarts}
    assert times == {due}
    assert [step for _, step in world.kubelet.executed] == ["InPlace", "InPlace"]
    assert len({one["spec"]["pod"]["name"] for one in restarts}) == 2
    await asyncio.sleep(2)
    assert len(await world.restarts()) == 2


async def test_the_annotation_restarts_once_for_each_value(world: World) -> None:
    operator = await world.start()
    await world.create(workload())
    await world.until_ready()
    path = world.client.path(VRAM, "gpumodelworkloads", NAME)
    body = {"metadata": {"annotations": {"vram.dev/restart": "one"}}}
    await world.client.merge(path, body)
    (restart,) = await world.until_finished()
    assert restart["spec"]["trigger"] == "Manual"
    assert restart["status"]["outcome"] == "Recovered"

    assert await operator.terminate() == 0
    await world.start()
    await asyncio.sleep(3)
    assert [step for _, step in world.kubelet.executed] == ["InPlace"]


async def test_a_restart_written_by_hand_is_carried_out(world: World) -> None:
    await world.start()
    await world.create(workload(suspend=True))
    await world.until_ready()
    (pod,) = await world.pods()
    await world.create(manual_restart("by-hand", pod["metadata"]["name"], method="Recycle"))
    (restart,) = await world.until_finished()
    assert restart["status"]["outcome"] == "Recovered"
    assert attempts(restart) == [("Recycle", "Recovered")]
    assert world.kubelet.executed[0][1] == "Recycle"


async def test_a_disruption_budget_blocks_and_is_named(world: World) -> None:
    await world.start()
    await world.create(workload())
    await world.until_ready()
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "keep-one"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"vram.dev/workload": NAME}}},
    }
    await world.client.create(POLICY, "poddisruptionbudgets", budget)

    async def is_observed() -> bool:
        found = await world.client.find(POLICY, "poddisruptionbudgets", "keep-one")
        return bool(found["status"].get("currentHealthy") == 1)

    await eventually(is_observed, "the budget has a status")
    (pod,) = await world.pods()
    await world.create(manual_restart("by-hand", pod["metadata"]["name"]))

    async def is_blocked() -> Object | None:
        (restart,) = await world.restarts()
        admitted = condition(restart, "Admitted")
        return admitted if admitted.get("status") == "False" else None

    admitted = await eventually(is_blocked, "Admitted=False")
    assert admitted is not None
    assert admitted["reason"] == "PodDisruptionBudget"
    assert "keep-one" in admitted["message"]
    blocked = await world.until_condition("RestartBlocked", "True")
    assert "keep-one" in condition(blocked, "RestartBlocked")["message"]
    assert world.kubelet.executed == []

    # It stays open, and goes on when the budget allows it.
    await world.client.delete(POLICY, "poddisruptionbudgets", "keep-one")
    (restart,) = await world.until_finished(timeout_seconds=90)
    assert restart["status"]["outcome"] == "Recovered"


async def test_dry_run_records_and_restarts_nothing(world: World) -> None:
    world.kubelet.scripts = leaking
    await world.start("--dry-run")
    await world.create(workload(residual=RESIDUAL))
    (restart,) = await world.until_finished()
    assert restart["status"]["outcome"] == "DryRun"
    assert world.kubelet.executed == []


async def test_metrics_and_events_tell_of_a_restart(world: World) -> None:
    world.kubelet.scripts = lambda: leaking(after_recycle_bytes=0)
    operator = await world.start()
    await world.create(workload(residual=RESIDUAL))
    await world.until_finished()

    async def counted() -> str | None:
        _, text = await operator.probe("/metrics")
        wanted = (
            'vram_operator_restarts_total{method="Recycle",outcome="Recovered",trigger="Residual"}'
        )
        return text if wanted + " 1.0" in text else None

    text = await eventually(counted, "the restart is counted")
    assert text is not None
    (reclaimed,) = re.findall(r"^vram_operator_reclaimed_bytes_total (.*)$", text, re.MULTILINE)
    assert float(reclaimed) == 9 * GIB
    assert 'vram_operator_workloads{ready="True"} 1.0' in text
    assert 'vram_operator_agents{state="Reporting"} 1.0' in text
    labels = f'{{namespace="{world.client.namespace}",workload="{NAME}"}}'
    assert f"vram_operator_workload_residual_bytes{labels} 0.0" in text
    assert 'vram_operator_api_requests_total{code="200",resource="pods",verb="watch"}' in text
    assert "vram_operator_leader 1.0" in text

    async def reasons() -> set[str]:
        found = await world.client.items("/apis/events.k8s.io/v1", "events")
        ours = [one for one in found if one["regarding"]["kind"] == "GPUModelWorkload"]
        return {one["reason"] for one in ours}

    async def are_told() -> bool:
        return {"ResidualHigh", "Restarting", "Restarted"} <= await reasons()

    await eventually(are_told, "the Events")
