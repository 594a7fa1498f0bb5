"""Processes die at any time; a request is lost only with the process that ran it."""

from __future__ import annotations

import asyncio

import pytest
from vram_agent.errors import ModelFailedError, NotResidentError, WorkerDiedError
from vram_agent.protocol import AfterTask, Residency

from tests.unit.agent.supervisor.conftest import MakeRig, Rig, spec

pytestmark = pytest.mark.looptime

KEEP = Residency(after_task=AfterTask.KEEP)
SLOW = {"load": 1.0, "restore": 1.0, "run": 1.0, "offload": 1.0, "end_gpu": 1.0, "unload": 1.0}


async def test_a_gpu_process_that_dies_costs_the_running_request_only(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    running, *queued = [rig.ask("a", seconds=5.0, n=n) for n in range(4)]
    await rig.settle(1)
    rig.backend.groups["a"].kill_gpu()
    with pytest.raises(WorkerDiedError):
        await running
    assert [(await q).values["n"] for q in queued] == [1, 2, 3]
    assert rig.backend.count("load") == 1
    assert rig.observer.restarts == [("a", "GpuDied")]


async def test_an_idle_gpu_process_that_dies_leaves_the_model_in_host_memory(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    rig.backend.groups["a"].kill_gpu()
    assert rig.state("a") == "Offloaded/Host"
    assert rig.supervisor.report().memory.model_bytes == 0
    assert await rig.ask("a")


async def test_a_template_that_dies_leaves_nothing_and_the_next_request_loads(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    rig.backend.groups["a"].kill_template()
    assert rig.state("a") == "Absent/Disk"
    assert await rig.ask("a")
    assert rig.backend.count("load") == 2


async def test_a_template_that_dies_during_a_task_costs_that_task_only(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    running, queued = rig.ask("a", seconds=5.0), rig.ask("a")
    await rig.settle(1)
    rig.backend.groups["a"].kill_template()
    with pytest.raises(WorkerDiedError):
        await running
    assert await queued


def kill(rig: Rig, role: str) -> None:
    group = rig.backend.groups["a"]
    if role == "gpu":
        group.kill_gpu()
    else:
        group.kill_template()


@pytest.mark.parametrize("role", ["gpu", "template"])
@pytest.mark.parametrize("tenths", range(1, 75, 3))
async def test_killed_at_any_moment_every_request_is_answered_and_the_model_serves_again(
    make_rig: MakeRig, role: str, tenths: int
) -> None:
    rig = make_rig(
        spec("a", stay={"idle_timeout_seconds": 1}),
    )
    rig.backend.script.seconds = dict(SLOW)
    requests = [rig.ask("a") for _ in range(3)]
    await rig.settle(tenths / 10)
    kill(rig, role)
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert all(not isinstance(r, BaseException) or isinstance(r, WorkerDiedError) for r in results)
    assert sum(isinstance(r, WorkerDiedError) for r in results) <= 1
    await rig.settle(20)
    assert rig.supervisor.report().idle
    assert rig.state("a") in ("Offloaded/Host", "Absent/Disk")
    assert await rig.ask("a")


async def test_a_process_that_dies_in_each_restore_fails_the_model_after_three(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("restore", "a", *[WorkerDiedError("exit 137")] * 3)
    with pytest.raises(ModelFailedError, match="exit 137"):
        await rig.ask("a")
    assert rig.backend.count("restore") == 3
    await rig.settle(2)
    assert await rig.ask("a")


async def test_a_process_that_dies_in_one_restore_is_made_again_without_help(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("restore", "a", WorkerDiedError("exit 1"))
    assert await rig.ask("a")


async def test_a_restore_that_fails_for_the_models_own_reason_fails_the_model(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("restore", "a", ModelFailedError("bad opset"))
    with pytest.raises(ModelFailedError, match="bad opset"):
        await rig.ask("a")
    await rig.settle(0.5)
    assert rig.state("a") == "Failed/Disk"
    assert rig.supervisor.report().memory.host_bytes == 0
    await rig.settle(1)
    assert await rig.ask("a")


async def test_a_task_that_never_began_is_run_again(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("run", "a", NotResidentError("left before it began"))
    assert await rig.ask("a")


@pytest.mark.parametrize("call", ["offload", "end_gpu", "unload"])
async def test_a_way_out_of_vram_that_fails_is_forced(make_rig: MakeRig, call: str) -> None:
    tier = {"offload": "PinnedHost", "end_gpu": "Host", "unload": "Disk"}[call]
    rig = make_rig(spec("a", stay={"offload_tier": tier}))
    rig.backend.script.fail(call, "", RuntimeError("odd"))
    await rig.ask("a")
    await rig.settle(1)
    assert rig.state("a") in ("Offloaded/Host", "Absent/Disk")
    assert rig.supervisor.report().memory.used_bytes == 0
    assert await rig.ask("a")


async def test_late_news_of_an_old_process_changes_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    group = rig.backend.groups["a"]
    old = group.gpu_pid
    group.kill_gpu()
    await rig.ask("a")
    assert old is not None
    group._tell("gpu", old, 9)
    assert rig.state("a") == "Resident/VRAM"
