"""A device that others use before our first context: said, waited for, or refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vram_agent.errors import NoVramError, QueueTimeoutError
from vram_agent.protocol import (
    AfterTask,
    AgentConfig,
    DirtyAction,
    DirtyPolicy,
    LoadPolicy,
    OffloadTier,
    QueuePolicy,
    Residency,
    VramPolicy,
)

from tests.support.backend import GIB, FakeBackend
from tests.unit.agent.supervisor.conftest import MakeRig, Rig, spec

pytestmark = pytest.mark.looptime

KEEP = Residency(after_task=AfterTask.KEEP, idle_timeout_seconds=0)


def dirty_rig(make_rig: MakeRig, action: DirtyAction, **config: Any) -> Rig:
    """Another pod holds 3 GiB of the one device."""
    make_rig.backend = FakeBackend(total_bytes=20 * GIB)
    make_rig.backend.baselines = {0: 3 * GIB}
    policy = VramPolicy(dirty=DirtyPolicy(policy=action))
    return make_rig(spec("a", residency=KEEP), vram=policy, **config)


async def test_report_says_so_and_goes_on(
    make_rig: MakeRig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = dirty_rig(make_rig, DirtyAction.REPORT)
    (device,) = rig.supervisor.report().devices
    assert (device.baseline_bytes, device.dirty) == (3 * GIB, True)
    lines = [text for text in capsys.readouterr().out.splitlines() if "device dirty" in text]
    assert len(lines) == 1
    assert f"baseline_bytes={3 * GIB}" in lines[0]
    assert await rig.ask("a")


async def test_up_to_a_gibibyte_is_clean_where_the_config_says_nothing(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend()
    make_rig.backend.baselines = {0: GIB}
    rig = make_rig(spec("a"))
    assert not rig.supervisor.report().devices[0].dirty
    make_rig.backend.baselines = {0: GIB + 1}
    assert rig.supervisor.report().devices[0].dirty


async def test_wait_loads_and_goes_on_within_two_seconds_once_the_others_have_left(
    make_rig: MakeRig,
) -> None:
    rig = dirty_rig(make_rig, DirtyAction.WAIT)
    request = rig.ask("a")
    await rig.settle(30)
    assert (rig.state("a"), request.done()) == ("Offloaded/Host", False)
    rig.backend.baselines = {0: GIB // 2}
    await asyncio.wait_for(request, 2.1)
    assert rig.backend.calls == [("load", "a"), ("restore", "a"), ("run", "a")]


async def test_a_wait_that_outlasts_the_queue_timeout_says_what_it_waited_for(
    make_rig: MakeRig,
) -> None:
    rig = dirty_rig(make_rig, DirtyAction.WAIT, queue=QueuePolicy(timeout_seconds=10))
    with pytest.raises(QueueTimeoutError, match=rf"{3 * GIB} bytes of device FAKE-0 were in use"):
        await rig.ask("a")


async def test_refuse_answers_at_once_with_the_figures_and_loads_nothing(
    make_rig: MakeRig,
) -> None:
    rig = dirty_rig(make_rig, DirtyAction.REFUSE)
    with pytest.raises(NoVramError, match=rf"{3 * GIB} bytes.*another pod") as caught:
        await rig.ask("a")
    assert caught.value.retry_after_seconds
    assert (rig.state("a"), rig.backend.calls) == ("Absent/Disk", [])
    rig.backend.baselines = {0: 0}
    assert await rig.ask("a")


async def test_an_eager_model_comes_up_once_the_device_is_clean(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend()
    make_rig.backend.baselines = {0: 3 * GIB}
    eager = Residency(load=LoadPolicy.EAGER, after_task=AfterTask.KEEP)
    policy = VramPolicy(dirty=DirtyPolicy(policy=DirtyAction.WAIT))
    rig = make_rig(spec("a", residency=eager), vram=policy)
    await rig.settle(60)
    assert rig.state("a") == "Offloaded/Host"
    rig.backend.baselines = {0: 0}
    await rig.settle(2.1)
    assert rig.state("a") == "Resident/VRAM"


async def test_where_a_process_of_ours_is_already_a_new_policy_closes_nothing(
    make_rig: MakeRig,
) -> None:
    rig = dirty_rig(make_rig, DirtyAction.REPORT)
    await rig.ask("a")
    await rig.supervisor.offload("a")
    strict = VramPolicy(dirty=DirtyPolicy(policy=DirtyAction.REFUSE))
    config = AgentConfig(models=[spec("a", residency=KEEP)], vram=strict)
    await rig.supervisor.apply_config(config)
    assert rig.state("a") == "Offloaded/PinnedHost"
    assert await rig.ask("a")
    await rig.supervisor.offload("a", OffloadTier.HOST)
    with pytest.raises(NoVramError, match="before this pod's first context"):
        await rig.ask("a")


async def test_of_two_devices_the_clean_one_is_used(make_rig: MakeRig) -> None:
    make_rig.backend = FakeBackend(total_bytes=20 * GIB, devices=2)
    make_rig.backend.baselines = {0: 3 * GIB}
    policy = VramPolicy(dirty=DirtyPolicy(policy=DirtyAction.REFUSE))
    rig = make_rig(spec("a", residency=KEEP), vram=policy)
    assert await rig.ask("a")
    assert rig.backend.groups["a"].device == 1
    assert [device.dirty for device in rig.supervisor.report().devices] == [True, False]
