"""``kubectl describe gmw`` and ``vram-operator explain`` say why a pod is or is not restarted."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.integration.operator.client import VRAM, Object, eventually
from tests.integration.operator.world import NAME, World, condition, workload
from tests.support.agents import GIB, Script

pytestmark = pytest.mark.control_plane

RESIDUAL = {"threshold": "8Gi", "forSeconds": 1, "minSamples": 2}
CLOSED = {"schedule": "0 0 29 2 *", "durationSeconds": 60}


async def explain(kubeconfig: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command as a person does; returns status, output and errors."""
    command = [sys.executable, "-W", "error", "-m", "vram_operator", "explain", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def until_told(world: World, words: str) -> Object:
    """Wait until the message of Restarting has these words; returns the workload."""

    async def check() -> Object | None:
        found = await world.workload()
        return found if words in condition(found, "Restarting").get("message", "") else None

    found = await eventually(check, words)
    assert found is not None
    return found


async def test_a_pod_below_its_threshold_is_explained_by_both_in_the_same_words(
    world: World, control_plane_kubeconfig: Path
) -> None:
    world.kubelet.scripts = lambda: Script(residual_bytes=5 * GIB)
    operator = await world.start()
    await world.create(workload(residual=RESIDUAL, schedule="0 3 * * *"))
    await world.until_ready()
    told = await until_told(world, "BelowThreshold")
    assert "is not above 8Gi" in condition(told, "Restarting")["message"]
    assert await operator.terminate() == 0

    before = await world.workload()
    place = f"{world.client.namespace}/{NAME}"
    # As the operator of this test runs: with another jitter, its next time would be another.
    flags = ("--schedule-jitter", "0")
    status, output, errors = await explain(control_plane_kubeconfig, place, *flags)
    assert (status, errors) == (0, "")
    (pod,) = await world.pods()
    name, next_time = pod["metadata"]["name"], told["status"]["nextRestartTime"]
    rule = f"{name}: BelowThreshold, looked at again with its next report; "
    assert f"nothing is restarted: {rule}the schedule restarts at {next_time}: " in output
    assert f"Restarting=False, NotRestarting: {rule}" in output
    assert "  maxUnavailable 1: 1 of 1 pods\n" in output
    # Nothing was done, and there is nothing to do.
    assert "\nplan\n  nothing to do\n" in output
    assert await world.workload() == before
    assert await world.restarts() == []


async def test_a_leak_outside_of_its_windows_is_explained_and_left_alone(
    world: World, control_plane_kubeconfig: Path
) -> None:
    world.kubelet.scripts = lambda: Script(residual_bytes=9 * GIB)
    await world.start()
    await world.create(workload(residual=RESIDUAL, windows=[CLOSED]))
    told = await until_told(world, "waits (OutsideWindow)")
    assert (
        "the next window of restart.windows opens at 20"
        in (condition(told, "Restarting")["message"])
    )
    place = f"{world.client.namespace}/{NAME}"
    status, output, _ = await explain(
        control_plane_kubeconfig, place, "--listen", "3", "--poll-interval", "0.5"
    )
    assert status == 0
    assert "evidence  Sufficient: residual 9Gi above 8Gi" in output
    assert "residual  would wait, OutsideWindow: the next window of restart.windows" in output
    assert await world.restarts() == []


async def test_a_decided_restart_is_explained_without_an_operator_and_not_made(
    world: World, control_plane_kubeconfig: Path
) -> None:
    world.kubelet.scripts = lambda: Script(residual_bytes=5 * GIB)
    operator = await world.start()
    await world.create(workload(residual=RESIDUAL))
    await world.until_ready()
    assert await operator.terminate() == 0
    for agent in world.kubelet.agents:
        agent.script.residual_bytes = 9 * GIB
    place = f"{world.client.namespace}/{NAME}"
    status, output, _ = await explain(
        control_plane_kubeconfig, place, "--listen", "3", "--poll-interval", "0.5"
    )
    assert status == 0
    (pod,) = await world.pods()
    assert f"restarts are decided now: {pod['metadata']['name']}" in output
    assert f"  create GPUPodRestart {NAME}-" in output
    assert await world.restarts() == []
    assert world.kubelet.executed == []


async def test_a_workload_that_is_not_there_is_one_line_and_status_1(
    world: World, control_plane_kubeconfig: Path
) -> None:
    place = f"{world.client.namespace}/no-such"
    status, output, errors = await explain(control_plane_kubeconfig, place)
    assert (status, output) == (1, "")
    assert errors == (
        f"vram-operator: there is no GPUModelWorkload no-such in namespace "
        f"{world.client.namespace}; kubectl get gmw -A lists them\n"
    )
    assert await world.client.items(VRAM, "gpupodrestarts") == []
