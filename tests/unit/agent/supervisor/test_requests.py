"""What becomes of a request: it waits, runs, is refused, or gives its place up."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from vram_agent.errors import (
    BadInputError,
    ModelFailedError,
    NoSuchModelError,
    NoVramError,
    QueueFullError,
    QueueTimeoutError,
    TaskFailedError,
)
from vram_agent.protocol import ModelState, QueuePolicy, VramPolicy

from tests.support.backend import GIB
from tests.unit.agent.supervisor.conftest import MakeRig, spec

pytestmark = pytest.mark.looptime


async def test_a_lazy_model_is_absent_until_its_first_request_and_offloaded_after_it(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.seconds = {"load": 2.0, "restore": 0.5, "offload": 0.2, "run": 1.0}
    assert rig.state("a") == "Absent/Disk"
    answer = await rig.ask("a", hello=1)
    assert answer.values == {"model": "a", "hello": 1}
    assert rig.state("a") == "Offloading/VRAM"
    await rig.settle(0.3)
    assert rig.state("a") == "Offloaded/PinnedHost"
    assert rig.backend.calls == [("load", "a"), ("restore", "a"), ("run", "a"), ("offload", "a")]


async def test_requests_that_come_before_the_devices_are_known_wait_for_them(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"), attach=False)
    request = rig.ask("a")
    await rig.settle(5)
    assert not request.done()
    assert rig.supervisor.is_ready()
    rig.attach()
    assert (await request).values["model"] == "a"


async def test_a_model_serves_its_requests_in_the_order_they_came(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.seconds = {"load": 1.0, "run": 0.1}
    done: list[int] = []
    requests = [rig.ask("a", n=n) for n in range(20)]
    for request in requests:
        request.add_done_callback(lambda done_one: done.append(done_one.result().values["n"]))
    await asyncio.gather(*requests)
    assert done == list(range(20))


async def test_beyond_max_depth_a_request_is_refused_with_a_measured_retry_after(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"), queue=QueuePolicy(max_depth=3))
    await rig.ask("a", seconds=7.0)
    running = rig.ask("a", seconds=7.0)
    await rig.settle(1)
    waiting = [rig.ask("a") for _ in range(3)]
    await rig.settle()
    with pytest.raises(QueueFullError, match="maxDepth is 3") as caught:
        await rig.ask("a")
    assert caught.value.retry_after_seconds == pytest.approx(7.0)
    await asyncio.gather(running, *waiting)


async def test_ten_thousand_requests_are_refused_beyond_the_depth_with_flat_memory(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"), queue=QueuePolicy(max_depth=256))
    rig.backend.script.seconds = {"load": 100.0}
    accepted = [rig.ask("a") for _ in range(256)]
    await rig.settle()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    refused = 0
    for _ in range(10_000 - 256):
        try:
            await rig.ask("a")
        except QueueFullError:
            refused += 1
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused == 10_000 - 256
    assert after - before < 200_000
    assert rig.supervisor.model("a").report.queued == 256
    await asyncio.gather(*accepted)


async def test_a_request_that_waits_longer_than_the_timeout_gets_its_504(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"), queue=QueuePolicy(timeout_seconds=3))
    running = rig.ask("a", seconds=60.0)
    await rig.settle(0.1)
    late = rig.ask("a")
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(QueueTimeoutError):
        await late
    assert loop.time() - began == pytest.approx(3.0, abs=0.01)
    assert rig.supervisor.model("a").report.queued == 0
    await running


async def test_a_504_says_when_the_queue_ahead_is_likely_served(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"), queue=QueuePolicy(timeout_seconds=30))
    await rig.ask("a", seconds=4.0)
    running = rig.ask("a", seconds=60.0)
    await rig.settle(0.1)
    late = rig.ask("a")
    await rig.settle(10)
    later = [rig.ask("a", seconds=1.0) for _ in range(3)]
    with pytest.raises(QueueTimeoutError) as caught:
        await late
    assert caught.value.retry_after_seconds == pytest.approx((1 + 3) * 4.0)
    results = await asyncio.gather(*later, return_exceptions=True)
    assert [type(result) for result in results] == [QueueTimeoutError] * 3
    await running


async def test_the_parameter_at_fault_reaches_the_client(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("run", "a", BadInputError("odd", param="language"))
    with pytest.raises(BadInputError) as caught:
        await rig.ask("a")
    assert (caught.value.message, caught.value.param) == ("odd", "language")


async def test_a_running_task_is_not_bound_by_the_queue_timeout(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"), queue=QueuePolicy(timeout_seconds=3))
    assert await rig.ask("a", seconds=60.0)


async def test_a_cancelled_request_gives_its_place_up(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    running = rig.ask("a", seconds=10.0, n=0)
    await rig.settle(0.1)
    gone, stays = rig.ask("a", n=1), rig.ask("a", n=2)
    await rig.settle()
    gone.cancel()
    await rig.settle()
    assert rig.supervisor.model("a").report.queued == 1
    assert (await stays).values["n"] == 2
    assert rig.backend.count("run") == 2
    await running


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5, 3.5, 4.5])
async def test_cancelled_at_any_stage_the_model_ends_at_rest_and_the_next_request_is_served(
    make_rig: MakeRig, seconds: float
) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.seconds = {"load": 1.0, "restore": 1.0, "run": 1.0, "offload": 1.0}
    request = rig.ask("a")
    await rig.settle(seconds)
    request.cancel()
    await rig.settle(10)
    report = rig.supervisor.report()
    assert report.idle
    assert rig.state("a") == "Offloaded/PinnedHost" or seconds < 2.0
    assert report.models[0].in_flight == 0
    assert await rig.ask("a")


async def test_the_lease_of_a_cancelled_task_lasts_as_long_as_the_task(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    request = rig.ask("a", seconds=10.0)
    await rig.settle(1)
    request.cancel()
    await rig.settle(1)
    assert rig.supervisor.model("a").report.in_flight == 1
    assert rig.state("a") == "Resident/VRAM"
    await rig.settle(10)
    assert rig.state("a") == "Offloaded/PinnedHost"


async def test_an_unknown_model_is_named_with_those_that_exist(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"), spec("b"))
    with pytest.raises(NoSuchModelError, match="the config has: a, b"):
        await rig.ask("c")


async def test_a_failed_load_tells_all_who_wait_and_is_tried_again_after_its_pause(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.seconds = {"load": 1.0}
    rig.backend.script.fail("load", "a", ModelFailedError("no such file: /models/a"))
    results = await asyncio.gather(*(rig.ask("a") for _ in range(3)), return_exceptions=True)
    assert [str(r) for r in results] == ["no such file: /models/a"] * 3
    assert len({id(r) for r in results}) == 3
    report = rig.supervisor.model("a").report
    assert (report.state, report.error) == (ModelState.FAILED, "no such file: /models/a")
    with pytest.raises(ModelFailedError) as caught:
        await rig.ask("a")
    assert caught.value.retry_after_seconds == pytest.approx(1.0, abs=0.01)
    assert rig.backend.count("load") == 1
    await rig.settle(1.1)
    assert await rig.ask("a")
    assert rig.supervisor.model("a").report.error is None


async def test_the_pause_doubles_with_each_failure_up_to_a_minute(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    pauses = []
    for _ in range(8):
        rig.backend.script.fail("load", "a", ModelFailedError("broken"))
        with pytest.raises(ModelFailedError) as caught:
            await rig.ask("a")
        pauses.append(caught.value.retry_after_seconds)
        await rig.settle((caught.value.retry_after_seconds or 0) + 0.01)
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60])


async def test_one_broken_model_does_not_keep_others_from_serving(make_rig: MakeRig) -> None:
    rig = make_rig(spec("bad"), spec("good"))
    rig.backend.script.fail("load", "bad", ModelFailedError("broken"))
    bad, good = rig.ask("bad"), rig.ask("good")
    assert (await good).values["model"] == "good"
    with pytest.raises(ModelFailedError):
        await bad


async def test_a_task_that_raises_costs_only_its_own_request(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.fail("run", "a", TaskFailedError("ValueError: odd input"))
    first, second = rig.ask("a", n=1), rig.ask("a", n=2)
    with pytest.raises(TaskFailedError):
        await first
    assert (await second).values["n"] == 2
    assert rig.backend.count("restore") == 1


async def test_an_oversize_model_is_refused_with_figures_before_it_is_loaded(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a", vram="3Gi"), vram=VramPolicy(budget="2Gi"))
    with pytest.raises(NoVramError, match=rf"{3 * GIB} bytes.*{2 * GIB}") as caught:
        await rig.ask("a")
    assert caught.value.retry_after_seconds
    assert rig.supervisor.model("a").report.state is ModelState.FAILED
    assert rig.backend.calls == []


async def test_a_model_found_oversize_after_its_load_holds_no_host_memory(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(spec("a"), vram=VramPolicy(budget="2Gi"))
    rig.backend.script.weights["a"] = 3 * GIB
    with pytest.raises(NoVramError, match=str(3 * GIB)):
        await rig.ask("a")
    await rig.settle(1)
    assert rig.state("a") == "Failed/Disk"
    assert rig.supervisor.report().memory.host_bytes == 0


async def test_models_are_served_in_turn_however_many_requests_one_has(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a", group="g"), spec("b", group="g"))
    rig.backend.script.seconds = {"run": 0.1}
    many = [rig.ask("a") for _ in range(50)]
    few = [rig.ask("b") for _ in range(2)]
    await asyncio.gather(*few)
    assert sum(request.done() for request in many) <= 4
    await asyncio.gather(*many)


async def test_waiting_seconds_are_observed_once_for_each_task(make_rig: MakeRig) -> None:
    rig = make_rig(spec("a"))
    rig.backend.script.seconds = {"load": 2.0, "run": 1.0}
    await asyncio.gather(rig.ask("a"), rig.ask("a"))
    assert [(m, round(s, 3)) for m, s in rig.observer.waits] == [("a", 2.0), ("a", 3.0)]
