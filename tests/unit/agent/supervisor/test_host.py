"""Host memory: what leaves it under pressure, and what follows when the kernel ends a template."""

from __future__ import annotations

import asyncio

import pytest
from vram_agent.errors import ModelFailedError, WorkerDiedError
from vram_agent.protocol import AfterTask, OffloadTier, Residency

from tests.support.backend import GIB
from tests.unit.agent.supervisor.conftest import MakeRig, Rig, ScriptedMemory, spec

pytestmark = pytest.mark.looptime

HOST = Residency(offload_tier=OffloadTier.HOST, idle_timeout_seconds=0)
KEEP = Residency(after_task=AfterTask.KEEP, idle_timeout_seconds=0)


def starve(rig: Rig, memory: ScriptedMemory, name: str) -> None:
    """The kernel counts a kill, then the process ends."""
    memory.kills += 1
    rig.backend.groups[name].kill_template()


async def test_near_the_containers_limit_models_leave_by_priority_and_use_until_there_is_room(
    make_rig: MakeRig,
) -> None:
    make_rig.host = ScriptedMemory(limit=100 * GIB)
    rig = make_rig(
        spec("old", residency=HOST, priority=1),
        spec("new", residency=HOST, priority=1),
        spec("low", residency=HOST),
    )
    for name in ("low", "old", "new"):
        await rig.ask(name)
        await rig.settle(1)
    make_rig.host.used = 94 * GIB
    await rig.settle(6)
    assert [rig.state(name) for name in ("low", "old", "new")] == ["Offloaded/Host"] * 3
    make_rig.host.used = 96 * GIB
    rig.backend.script.seconds = {"unload": 0.5}
    # The figure does not move with the first that leaves, so a second follows.
    async with asyncio.timeout(7):
        while rig.backend.count("unload") < 2:
            await rig.settle(0.1)
    make_rig.host.used = 90 * GIB
    await rig.settle(20)
    assert [name for call, name in rig.backend.calls if call == "unload"] == ["low", "old"]
    assert rig.state("new") == "Offloaded/Host"
    assert await rig.ask("low")


async def test_the_report_says_what_is_left_of_the_limit_and_what_a_model_needs(
    make_rig: MakeRig,
) -> None:
    make_rig.host = ScriptedMemory(limit=100 * GIB, used=30 * GIB)
    rig = make_rig(spec("a", residency=HOST, vram="3Gi"))
    report = rig.supervisor.report()
    assert report.memory.host_limit_bytes == 100 * GIB
    assert report.memory.host_available_bytes == 70 * GIB
    assert [model.needed_bytes for model in report.models] == [3 * GIB]


async def test_without_a_limit_nothing_is_looked_at_and_nothing_leaves(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=HOST))
    await rig.ask("a")
    make_rig.host.used = 1 << 50
    await rig.settle(60)
    assert rig.state("a") == "Offloaded/Host"


async def test_before_a_load_of_known_size_what_is_unused_makes_room(make_rig: MakeRig) -> None:
    make_rig.host = ScriptedMemory(limit=100 * GIB)
    rig = make_rig(spec("a", residency=HOST), spec("b", residency=HOST))
    await rig.ask("a")
    await rig.supervisor.unload("a")
    await rig.ask("b")
    await rig.settle(2)
    make_rig.host.used = 94 * GIB + GIB // 2
    await rig.ask("a")
    calls = rig.backend.calls
    assert calls.index(("unload", "b")) < len(calls) - 1 - calls[::-1].index(("load", "a"))


async def test_a_template_that_the_kernel_ends_fails_its_model_and_says_why(
    make_rig: MakeRig,
) -> None:
    make_rig.host = ScriptedMemory(limit=8 * GIB)
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP))
    await asyncio.gather(rig.ask("a"), rig.ask("b"))
    starve(rig, make_rig.host, "a")
    report = rig.supervisor.model("a").report
    assert (report.state, report.tier) == ("Failed", "Disk")
    assert report.error is not None
    assert f"killed by the kernel: the container is out of memory (limit {8 * GIB}" in report.error
    assert report.last_transition is not None
    assert report.last_transition.message == report.error
    assert rig.observer.restarts == [("a", "GpuOutOfMemory"), ("a", "TemplateOutOfMemory")]
    with pytest.raises(ModelFailedError, match="out of memory") as caught:
        await rig.ask("a")
    assert caught.value.retry_after_seconds == pytest.approx(1.0, abs=0.01)
    assert await rig.ask("b")
    await rig.settle(1.1)
    assert await rig.ask("a")
    assert rig.supervisor.model("a").report.error is None


async def test_requests_that_were_accepted_wait_until_their_model_may_be_tried_again(
    make_rig: MakeRig,
) -> None:
    make_rig.host = ScriptedMemory(limit=8 * GIB)
    rig = make_rig(spec("a"))
    running, queued = rig.ask("a", seconds=5.0), rig.ask("a")
    await rig.settle(1)
    starve(rig, make_rig.host, "a")
    with pytest.raises(WorkerDiedError):
        await running
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await queued
    assert loop.time() - began == pytest.approx(1.0, abs=0.01)


async def test_the_pause_doubles_until_a_task_goes_well(make_rig: MakeRig) -> None:
    make_rig.host = ScriptedMemory(limit=8 * GIB)
    rig = make_rig(spec("a", residency=KEEP))
    pauses = []
    for _ in range(4):
        request = rig.ask("a", seconds=50.0)
        await rig.settle(10)
        starve(rig, make_rig.host, "a")
        with pytest.raises(WorkerDiedError):
            await request
        with pytest.raises(ModelFailedError) as caught:
            await rig.ask("a")
        pauses.append(caught.value.retry_after_seconds)
        await rig.settle((caught.value.retry_after_seconds or 0) + 0.01)
    assert pauses == pytest.approx([1, 2, 4, 8])
    assert await rig.ask("a")
    starve(rig, make_rig.host, "a")
    with pytest.raises(ModelFailedError) as caught:
        await rig.ask("a")
    assert caught.value.retry_after_seconds == pytest.approx(1.0)


async def test_a_template_that_a_person_kills_is_no_failure_and_is_told_apart(
    make_rig: MakeRig,
) -> None:
    make_rig.host = ScriptedMemory(limit=8 * GIB, kills=3)
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    rig.backend.groups["a"].kill_template()
    report = rig.supervisor.model("a").report
    assert (report.state, report.error) == ("Absent", None)
    assert report.last_transition is not None
    assert report.last_transition.message == "its template ended by signal 9"
    assert await rig.ask("a")


async def test_a_gpu_process_that_the_kernel_ends_leaves_the_model_in_host_memory_and_says_why(
    make_rig: MakeRig,
) -> None:
    make_rig.host = ScriptedMemory(limit=8 * GIB)
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    make_rig.host.kills += 1
    rig.backend.groups["a"].kill_gpu()
    report = rig.supervisor.model("a").report
    assert (report.state, report.tier) == ("Offloaded", "Host")
    assert report.last_transition is not None
    assert "its GPU process was killed by the kernel" in report.last_transition.message
    assert await rig.ask("a")
