"""Who holds VRAM: eviction, keep-alive, idle tiers, groups, what comes back late."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs
from vram_agent.backend import Scrubbed
from vram_agent.errors import ModelFailedError, NoVramError
from vram_agent.protocol import (
    AfterTask,
    DeviceKind,
    HostMemoryPolicy,
    LoadPolicy,
    OffloadTier,
    Residency,
    ResidualSource,
    VramPolicy,
)

from tests.support.backend import CONTEXT_BYTES, GIB, FakeBackend
from tests.unit.agent.supervisor.conftest import MakeRig, spec

pytestmark = pytest.mark.looptime

KEEP = Residency(after_task=AfterTask.KEEP, idle_timeout_seconds=0)
LET_GO = Residency(after_task=AfterTask.OFFLOAD, idle_timeout_seconds=0)
ONE_AT_A_TIME = VramPolicy(budget="1Gi", headroom="0")


async def test_two_models_in_a_budget_for_one_take_turns(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP), vram=ONE_AT_A_TIME)
    rig.backend.script.seconds = {"restore": 0.1, "offload": 0.1, "run": 0.1}
    await rig.ask("a")
    assert rig.state("a") == "Resident/VRAM"
    await rig.ask("b")
    await rig.settle()
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/PinnedHost", "Resident/VRAM")
    assert rig.backend.peak_bytes == GIB
    assert rig.observer.evictions == [("a", "Evicted")]


async def test_requests_for_both_models_at_once_are_all_served_and_swaps_stay_few(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP), vram=ONE_AT_A_TIME)
    rig.backend.script.seconds = {"restore": 0.1, "offload": 0.1, "run": 0.1}
    await asyncio.gather(*(rig.ask(name) for _ in range(30) for name in "ab"))
    assert rig.backend.peak_bytes == GIB
    # 60 tasks of 0.1 s in turns of a second: about six turns.
    assert rig.backend.count("restore") <= 9


async def test_a_waiting_model_is_up_after_one_turn_of_a_busy_one(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP), vram=ONE_AT_A_TIME)
    rig.backend.script.seconds = {"run": 0.1}
    many = [rig.ask("a") for _ in range(200)]
    await rig.settle(0.5)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await rig.ask("b")
    assert loop.time() - began < 1.5
    await asyncio.gather(*many)


async def test_a_model_is_never_evicted_while_a_task_runs_on_it(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP), vram=ONE_AT_A_TIME)
    long = rig.ask("a", seconds=30.0)
    await rig.settle(5)
    other = rig.ask("b")
    await rig.settle(20)
    assert rig.state("a") == "Resident/VRAM"
    assert not other.done()
    await long
    assert await other


async def test_a_request_waits_for_memory_of_a_model_that_is_leaving_and_evicts_no_other(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(
        spec("a"),
        spec("b", residency=KEEP),
        spec("c"),
        vram=VramPolicy(budget="2Gi", headroom="0"),
    )
    rig.backend.script.seconds = {"offload": 5.0}
    await rig.ask("b")
    await rig.ask("a")
    assert rig.state("a") == "Offloading/VRAM"
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await rig.ask("c")
    assert loop.time() - began == pytest.approx(5.0, abs=0.01)
    assert rig.state("b") == "Resident/VRAM"
    assert rig.observer.evictions == []


async def test_the_budget_binds_on_the_larger_of_declared_and_measured_bytes(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(
        spec("declared", vram="2Gi", residency=KEEP),
        spec("measured", vram="1Gi", residency=KEEP),
        spec("c", residency=KEEP),
        vram=VramPolicy(budget="4Gi", headroom="0"),
    )
    rig.backend.script.vram = {"declared": GIB, "measured": 2 * GIB, "c": GIB}
    await rig.ask("declared")
    await rig.ask("measured")
    await rig.ask("c")
    assert rig.observer.evictions == [("declared", "Evicted")]


@pytest.mark.parametrize("residency", [KEEP, LET_GO])
@pytest.mark.parametrize(
    ("keep", "after", "later"),
    [
        pytest.param(0, "Offloaded/PinnedHost", "Offloaded/PinnedHost", id="zero offloads at once"),
        pytest.param(-1, "Resident/VRAM", "Resident/VRAM", id="minus one keeps"),
        pytest.param(5, "Resident/VRAM", "Offloaded/PinnedHost", id="five keeps for five seconds"),
    ],
)
async def test_keep_alive_overrides_after_task_whatever_that_says(
    make_rig: MakeRig, residency: Residency, keep: float, after: str, later: str
) -> None:
    rig = make_rig(spec("a", residency=residency))
    await rig.ask("a", keep=keep)
    await rig.settle(4.9)
    assert rig.state("a") == after
    await rig.settle(0.2)
    assert rig.state("a") == later
    await rig.settle(100)
    assert rig.state("a") == later


async def test_each_request_decides_anew_and_one_that_says_nothing_leaves_it_to_the_spec(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=LET_GO), spec("b", residency=KEEP))
    await rig.ask("a", keep=5)
    await rig.settle(4)
    await rig.ask("a", keep=5)
    await rig.settle(4)
    assert rig.state("a") == "Resident/VRAM"
    await rig.ask("a")
    await rig.settle(0.1)
    assert rig.state("a") == "Offloaded/PinnedHost"
    await rig.ask("b", keep=0)
    await rig.settle(0.1)
    assert rig.state("b") == "Offloaded/PinnedHost"
    await rig.ask("b")
    await rig.settle(100)
    assert rig.state("b") == "Resident/VRAM"


async def test_a_model_that_is_kept_alive_is_evicted_all_the_same_and_sinks_when_idle(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", stay={"idle_timeout_seconds": 60}), spec("b"), vram=ONE_AT_A_TIME)
    await rig.ask("a", keep=-1)
    await rig.ask("b")
    assert rig.observer.evictions == [("a", "Evicted")]
    await rig.ask("a", keep=-1)
    await rig.settle(59)
    assert rig.state("a") == "Resident/VRAM"
    await rig.settle(2)
    assert rig.state("a") == "Offloaded/Host"


async def test_an_idle_model_sinks_to_its_idle_tier_and_comes_back(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", stay={"idle_timeout_seconds": 600}))
    await rig.ask("a")
    await rig.settle(599)
    assert rig.state("a") == "Offloaded/PinnedHost"
    await rig.settle(2)
    assert rig.state("a") == "Offloaded/Host"
    assert rig.backend.groups["a"].gpu_pid is None
    assert await rig.ask("a")
    assert rig.backend.count("load") == 1


@pytest.mark.parametrize(
    ("tier", "state"),
    [
        pytest.param("PinnedHost", "Offloaded/PinnedHost", id="PinnedHost keeps the process"),
        pytest.param("Host", "Offloaded/Host", id="Host ends the GPU process"),
        pytest.param("Disk", "Absent/Disk", id="Disk keeps nothing"),
    ],
)
async def test_after_a_task_a_model_goes_to_its_offload_tier(
    make_rig: MakeRig, tier: str, state: str
) -> None:
    rig = make_rig(spec("a", stay={"offload_tier": OffloadTier(tier)}))
    await rig.ask("a")
    await rig.settle(1)
    assert rig.state("a") == state
    assert await rig.ask("a")


@pytest.mark.parametrize(
    ("options", "state"), [({}, "Offloaded/Host"), ({"loadsOn": "cuda"}, "Absent/Disk")]
)
async def test_an_offload_that_fails_ends_the_process_and_says_what_that_left(
    make_rig: MakeRig, options: dict[str, str], state: str
) -> None:
    stay = {"idle_tier": OffloadTier.DISK}
    rig = make_rig(spec("a", options=options, stay=stay))
    error = ModelFailedError("2 CUDA graphs were captured")
    rig.backend.script.fail("offload", "a", error)
    assert await rig.ask("a")
    await rig.settle(1)
    assert rig.state("a") == state
    transition = rig.supervisor.model("a").report.last_transition
    assert transition is not None
    assert transition.message == error.message
    assert await rig.ask("a")


async def test_while_a_mate_needs_the_gpu_process_a_model_only_leaves_vram(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(
        spec("a", group="g", stay={"offload_tier": OffloadTier.HOST}),
        spec("b", group="g", residency=KEEP),
    )
    await rig.supervisor.load("b")
    await rig.settle()
    await rig.ask("a")  # loading ends the process; b comes back at its next request
    await rig.ask("b")
    await rig.ask("a")
    await rig.settle(1)
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/PinnedHost", "Resident/VRAM")
    await rig.supervisor.offload("b", OffloadTier.HOST)
    await rig.settle(1)
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/Host", "Offloaded/Host")


async def test_models_of_a_group_offloaded_to_host_one_by_one_end_their_gpu_process(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", group="g", residency=KEEP), spec("b", group="g", residency=KEEP))
    for name in ("a", "b", "a"):  # loading the second ends the process of the first
        await rig.ask(name)
    await rig.supervisor.offload("a", OffloadTier.PINNED_HOST)
    assert (await rig.supervisor.offload("b", OffloadTier.HOST)).tier == "PinnedHost"
    await rig.settle()
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/PinnedHost", "Offloaded/PinnedHost")
    assert (await rig.supervisor.offload("a", OffloadTier.HOST)).tier == "Host"
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/Host", "Offloaded/Host")


async def test_a_use_takes_back_the_tier_that_a_caller_wanted(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", group="g", residency=KEEP), spec("b", group="g", residency=KEEP))
    for name in ("a", "b", "a"):
        await rig.ask(name)
    await rig.supervisor.offload("b", OffloadTier.HOST)
    await rig.ask("b")
    await rig.supervisor.offload("b", OffloadTier.PINNED_HOST)
    await rig.supervisor.offload("a", OffloadTier.HOST)
    await rig.settle(1)
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/PinnedHost", "Offloaded/PinnedHost")


async def test_loading_into_a_live_group_ends_its_gpu_process_once_its_task_is_done(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", group="g", residency=KEEP), spec("b", group="g", residency=KEEP))
    task = rig.ask("a", seconds=10.0)
    await rig.settle(1)
    other = rig.ask("b")
    await rig.settle(5)
    assert not task.done()
    assert (await task).values["model"] == "a"
    await other
    calls = rig.backend.calls
    assert calls.index(("end_gpu", "group:g")) > calls.index(("run", "a"))


async def test_a_new_model_of_a_busy_group_is_not_starved(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", group="g", residency=KEEP), spec("b", group="g", residency=KEEP))
    rig.backend.script.seconds = {"run": 0.1, "load": 0.1}
    many = [rig.ask("a") for _ in range(100)]
    await rig.settle(1)
    await asyncio.wait_for(rig.ask("b"), 2)
    await asyncio.gather(*many)


async def test_eager_models_are_up_at_the_start_and_never_evict_each_other(
    make_rig: MakeRig,
) -> None:
    eager = Residency(load=LoadPolicy.EAGER, after_task=AfterTask.KEEP)
    rig = make_rig(spec("a", residency=eager), spec("b", residency=eager), vram=ONE_AT_A_TIME)
    await rig.settle(1)
    assert rig.state("a") == "Resident/VRAM"
    assert rig.state("b") == "Offloaded/Host"
    assert rig.observer.evictions == []
    assert rig.supervisor.report().idle


async def test_an_eager_model_that_fails_is_failed_at_the_start(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=Residency(load=LoadPolicy.EAGER)), attach=False)
    rig.backend.script.fail("load", "a", OSError("no such file"))
    rig.attach()
    await rig.settle(1)
    assert rig.state("a") == "Failed/Disk"
    assert rig.supervisor.model("a").report.error == "OSError: no such file"


async def test_a_model_loaded_by_hand_stays_and_one_unloaded_by_hand_loads_again(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    report = await rig.supervisor.load("a")
    assert (report.state, report.vram_bytes) == ("Resident", GIB)
    await rig.settle(10)
    assert rig.state("a") == "Resident/VRAM"
    report = await rig.supervisor.unload("a")
    assert (report.state, report.tier, report.vram_bytes) == ("Absent", "Disk", 0)
    assert await rig.ask("a")


async def test_a_failed_model_unloaded_by_hand_is_absent_and_tried_at_its_next_request(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("load", "a", ModelFailedError("no such file: /models/a"))
    with pytest.raises(ModelFailedError):
        await rig.ask("a")
    assert rig.state("a") == "Failed/Disk"
    report = await rig.supervisor.unload("a")
    assert (report.state, report.tier, report.error) == ("Absent", "Disk", None)
    assert await rig.ask("a")


async def test_unload_waits_for_the_task_that_runs(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    task = rig.ask("a", seconds=5.0)
    await rig.settle(1)
    unloading = asyncio.ensure_future(rig.supervisor.unload("a"))
    await rig.settle(1)
    assert not unloading.done()
    assert await task
    assert (await unloading).state == "Absent"


async def test_memory_of_strangers_is_waited_for_and_then_named(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend(total_bytes=4 * GIB)
    make_rig.backend.foreign_bytes = 3 * GIB
    rig = make_rig(spec("a", vram="2Gi"), vram=VramPolicy(headroom="0"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(NoVramError, match=rf"needs {2 * GIB} bytes.*{GIB} are free") as caught:
        await rig.ask("a")
    assert loop.time() - began == pytest.approx(5.0, abs=0.3)
    assert caught.value.retry_after_seconds
    assert rig.state("a").startswith("Offloaded")
    rig.backend.foreign_bytes = 0
    assert await rig.ask("a")


async def test_memory_of_strangers_that_comes_back_in_time_costs_no_request(
    make_rig: MakeRig,
) -> None:
    make_rig.backend = FakeBackend(total_bytes=4 * GIB)
    make_rig.backend.foreign_bytes = 3 * GIB
    rig = make_rig(spec("a", vram="2Gi"), vram=VramPolicy(headroom="0"))
    request = rig.ask("a")
    await rig.settle(3)
    rig.backend.foreign_bytes = 0
    assert await request


async def test_a_device_that_is_out_of_memory_after_all_makes_the_policy_free_more(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP))
    await rig.ask("a")
    rig.backend.script.fail("restore", "b", NoVramError("CUDA out of memory"))
    assert await rig.ask("b")
    assert rig.observer.evictions == [("a", "Evicted")]
    assert rig.backend.count("restore", "b") == 2


async def test_an_idle_process_that_only_holds_a_context_is_ended_for_another_model(
    make_rig: MakeRig,
) -> None:
    make_rig.backend = FakeBackend(total_bytes=GIB + CONTEXT_BYTES // 2)
    rig = make_rig(spec("a"), spec("b"), vram=VramPolicy(headroom="0"))
    await rig.ask("a")
    await rig.settle(1)
    assert rig.state("a") == "Offloaded/PinnedHost"
    assert await rig.ask("b")
    assert rig.state("a") == "Offloaded/Host"


async def test_the_host_budget_unloads_what_is_unused(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"), spec("b"), host_memory=HostMemoryPolicy(budget="1Gi"))
    await rig.ask("a")
    await rig.settle(1)
    await rig.ask("b")
    await rig.settle(1)
    assert (rig.state("a"), rig.state("b")) == ("Absent/Disk", "Offloaded/PinnedHost")
    await rig.ask("a")
    await rig.settle(1)
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/PinnedHost", "Absent/Disk")


@pytest.mark.parametrize("kind", [DeviceKind.CUDA, DeviceKind.MIG])
async def test_models_go_where_they_fit_best_and_the_processes_go_with_them(
    make_rig: MakeRig, kind: DeviceKind
) -> None:
    make_rig.backend = FakeBackend()
    make_rig.backend.kind = kind
    make_rig.backend.totals = [10 * GIB, 3 * GIB]
    rig = make_rig(
        spec("small", vram="1Gi", residency=KEEP),
        spec("large", vram="9Gi", residency=KEEP),
        spec("told", device="1", residency=KEEP),
        vram=VramPolicy(headroom="512Mi"),
    )
    for name in ("small", "large", "told"):
        await rig.ask(name)
    where = {name: rig.backend.groups[name].device for name in ("small", "large", "told")}
    assert where == {"small": 1, "large": 0, "told": 1}
    charges = rig.supervisor._fleet.vram.charges
    assert {name: charges[name].device for name in where} == {
        "small": "FAKE-1",
        "large": "FAKE-0",
        "told": "FAKE-1",
    }
    assert rig.observer.evictions == []


async def test_the_headroom_is_kept_free_on_each_device(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend(total_bytes=2 * GIB, devices=2)
    rig = make_rig(
        *(spec(name, vram="1Gi", residency=KEEP) for name in "abc"),
        vram=VramPolicy(headroom="512Mi"),
    )
    for name in "abc":
        await rig.ask(name)
        await rig.settle(1)
    assert [rig.state(name) for name in "abc"].count("Resident/VRAM") == 2
    assert {rig.backend.groups[name].device for name in "bc"} == {0, 1}
    assert rig.observer.evictions == [("a", "Evicted")]


async def test_a_model_without_a_gpu_process_is_placed_anew(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend(total_bytes=2 * GIB, devices=2)
    rig = make_rig(
        spec("a", stay={"offload_tier": OffloadTier.HOST}),
        spec("b", device="0", residency=KEEP),
        vram=VramPolicy(headroom="0"),
    )
    await rig.ask("a")
    await rig.settle(1)
    busy = rig.ask("b", seconds=60.0)
    await rig.settle(1)
    await rig.ask("a")
    assert rig.backend.groups["a"].device == 1
    assert not busy.done()
    await busy


async def test_a_pinned_model_leaves_a_full_device_for_one_with_room(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend(total_bytes=3 * GIB, devices=2)
    rig = make_rig(
        spec("a", vram="2Gi"),
        spec("b", vram="2Gi", device="0", residency=KEEP),
        vram=VramPolicy(headroom="0"),
    )
    await rig.ask("a")
    await rig.settle(1)
    assert (rig.state("a"), rig.backend.groups["a"].device) == ("Offloaded/PinnedHost", 0)
    busy = rig.ask("b", seconds=60.0)
    await rig.settle(1)
    await rig.ask("a")
    assert (rig.backend.groups["a"].device, busy.done()) == (1, False)
    assert rig.backend.count("end_gpu") == 1
    await busy


async def test_models_of_a_group_share_one_gpu_process_and_keep_their_own_tiers(
    make_rig: MakeRig,
) -> None:
    make_rig.backend = FakeBackend(total_bytes=10 * GIB, devices=2)
    rig = make_rig(
        spec("a", group="g", device="1", residency=KEEP), spec("b", group="g", residency=KEEP)
    )
    await asyncio.gather(rig.ask("a"), rig.ask("b"))
    await rig.settle(1)
    assert list(rig.backend.groups) == ["group:g"]
    assert (rig.state("a"), rig.state("b")) == ("Resident/VRAM", "Resident/VRAM")
    assert rig.backend.groups["group:g"].device == 1
    pid = rig.backend.groups["group:g"].gpu_pid
    await rig.supervisor.offload("a")
    assert (rig.state("a"), rig.state("b")) == ("Offloaded/PinnedHost", "Resident/VRAM")
    assert rig.backend.groups["group:g"].gpu_pid == pid
    report = rig.supervisor.report()
    assert [m.vram_bytes for m in report.models] == [0, GIB]
    assert report.memory.residual_bytes == CONTEXT_BYTES


async def test_a_device_that_the_pod_does_not_have_is_named_before_anything_is_loaded(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", device="7"))
    with pytest.raises(NoVramError, match=r"asks for device 7; this pod has 1, numbered from 0"):
        await rig.ask("a")
    assert rig.backend.calls == []


async def test_of_two_devices_only_the_one_that_refused_is_doubted(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend(total_bytes=4 * GIB, devices=2)
    rig = make_rig(spec("a", vram="1Gi", residency=KEEP), vram=VramPolicy(headroom="0"))
    rig.backend.script.fail("restore", "a", NoVramError("CUDA out of memory"))
    assert await rig.ask("a")
    assert rig.backend.groups["a"].device == 1
    assert rig.backend.count("restore", "a") == 2


async def test_what_a_load_says_is_in_the_report(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.messages["a"] = "2 tensors were left alone: sparse"
    rig.backend.script.seconds = {"restore": 5.0}
    request = rig.ask("a")
    await rig.settle(1)
    transition = rig.supervisor.model("a").report.last_transition
    assert transition is not None
    assert (transition.kind, transition.message) == ("load", "2 tensors were left alone: sparse")
    await request


async def test_scrub_waits_for_the_task_and_leaves_the_model_resident(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    task = rig.ask("a", seconds=5.0)
    await rig.settle(1)
    report = await rig.supervisor.scrub()
    assert task.done()
    assert rig.backend.count("scrub") == 1
    assert report.models[0].state == "Resident"


@pytest.mark.parametrize(
    ("source", "used", "other_processes"),
    [
        pytest.param(
            ResidualSource.EXCLUSIVE,
            GIB + 2 * CONTEXT_BYTES + 5 * GIB,
            5 * GIB,
            id="Exclusive counts all that came into use on the pod's devices",
        ),
        pytest.param(
            ResidualSource.SELF,
            GIB + 2 * CONTEXT_BYTES,
            0,
            id="Self counts our own processes and nobody else on the device",
        ),
    ],
)
async def test_over_several_devices_the_source_says_what_counts(
    make_rig: MakeRig, source: ResidualSource, used: int, other_processes: int
) -> None:
    make_rig.backend = FakeBackend(total_bytes=20 * GIB, devices=2)
    make_rig.backend.source = source
    make_rig.backend.baselines = {0: GIB, 1: 2 * GIB}
    rig = make_rig(spec("a", device="0", residency=KEEP), spec("b", device="1"))
    await asyncio.gather(rig.ask("a"), rig.ask("b"))
    await rig.settle(1)
    # Strangers come to one device after us: 5 GiB.
    make_rig.backend.later_bytes = {1: 5 * GIB}
    report = rig.supervisor.report()
    memory = report.memory
    assert (memory.source, memory.used_bytes, memory.model_bytes) == (source, used, GIB)
    assert memory.classes.other_processes == other_processes
    assert memory.residual_bytes == used - GIB
    assert [device.baseline_bytes for device in report.devices] == [GIB, 2 * GIB]
    assert [device.exclusive for device in report.devices] == [source != "Self"] * 2


async def test_an_offload_says_what_its_scrub_gave_back(
    make_rig: MakeRig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = make_rig(spec("a"))
    assert rig.supervisor.report().memory.last_scrub is None
    rig.backend.script.scrubbed = Scrubbed(before_bytes=700, after_bytes=300)
    await rig.ask("a")
    await rig.settle(1)
    scrub = rig.supervisor.report().memory.last_scrub
    assert scrub is not None
    assert (scrub.before_bytes, scrub.after_bytes, scrub.reclaimed_bytes) == (700, 300, 400)
    assert scrub.at == "2026-01-01T00:00:00.000Z"
    assert rig.observer.scrubs == [400]
    (line,) = (text for text in capsys.readouterr().out.splitlines() if "PinnedHost" in text)
    assert "scrub_before_bytes=700" in line
    assert "scrub_after_bytes=300" in line


async def test_a_scrub_by_hand_answers_with_what_all_processes_gave_back(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=KEEP), spec("b", residency=KEEP))
    await asyncio.gather(rig.ask("a"), rig.ask("b"))
    rig.backend.script.scrubbed = Scrubbed(before_bytes=700, after_bytes=300)
    scrub = (await rig.supervisor.scrub()).memory.last_scrub
    assert scrub is not None
    assert (scrub.before_bytes, scrub.after_bytes, scrub.reclaimed_bytes) == (1400, 600, 800)
    assert rig.observer.scrubs == [400, 400]


async def test_a_scrub_during_which_more_was_taken_reclaimed_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.scrubbed = Scrubbed(before_bytes=300, after_bytes=700)
    await rig.ask("a")
    await rig.settle(1)
    assert rig.observer.scrubs == [0]


async def test_the_report_accounts_for_models_and_residual(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", residency=KEEP))
    await rig.ask("a")
    await rig.settle(1)
    report = rig.supervisor.report()
    memory = report.memory
    assert (memory.used_bytes, memory.model_bytes) == (GIB + CONTEXT_BYTES, GIB)
    assert memory.residual_bytes == memory.classes.context_and_libraries == CONTEXT_BYTES
    assert memory.host_bytes == GIB
    assert report.agent.pod.name == "pod"
    assert report.observed_at == "2026-01-01T00:00:01.000Z"
    assert report.idle_since == "2026-01-01T00:00:00.000Z"
    model = report.models[0]
    assert model.last_transition is not None
    assert (model.tier, model.last_transition.kind) == ("VRAM", "restore")
    assert rig.supervisor.report().sequence == report.sequence + 1


async def test_each_transition_is_one_line_with_its_reason_bytes_and_seconds(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", residency=LET_GO))
    rig.backend.script.seconds = {"load": 2.0, "restore": 0.5, "offload": 0.25}
    with capture_logs() as logs:
        await rig.ask("a")
        await asyncio.sleep(1)  # on the loop's own clock, which does not wait
    lines = [entry for entry in logs if entry["event"] == "transition"]
    assert [(line["model"], line["from"], line["to"]) for line in lines] == [
        ("a", "Absent/Disk", "Offloaded/Host"),
        ("a", "Offloaded/Host", "Resident/VRAM"),
        ("a", "Resident/VRAM", "Offloaded/PinnedHost"),
    ]
    assert [line["seconds"] for line in lines] == [2.0, 0.5, 0.25]
    assert {line["bytes"] for line in lines} == {GIB}
    assert all(line["reason"] for line in lines)
