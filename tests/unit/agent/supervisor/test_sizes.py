"""What models hold is remembered over a restart of the container, and never in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from msgspec import structs
from vram_agent.protocol import (
    AfterTask,
    AgentConfig,
    DeviceKind,
    HostMemoryPolicy,
    Residency,
    VramPolicy,
)
from vram_agent.supervision.learning import MAX_MODELS
from vram_agent.supervision.sizes import LearnedSize, model_key

from tests.support.backend import GIB, FakeBackend
from tests.unit.agent.supervisor.conftest import MakeRig, spec

pytestmark = pytest.mark.looptime

KEEP = Residency(after_task=AfterTask.KEEP, idle_timeout_seconds=0)


class MemorySizes:
    """Keeps what it is given; a test may let it fail or hang."""

    def __init__(self) -> None:
        self.sizes: dict[str, LearnedSize] = {}
        self.error: OSError | None = None
        self.seconds = 0.0
        self.writes = 0

    async def read(self) -> Mapping[str, LearnedSize]:
        await asyncio.sleep(self.seconds)
        return dict(self.sizes)

    async def write(self, sizes: Mapping[str, LearnedSize]) -> None:
        self.writes += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.sizes = dict(sizes)


@pytest.fixture
def sizes(make_rig: MakeRig) -> MemorySizes:
    make_rig.sizes = store = MemorySizes()
    return store


async def test_a_new_boot_makes_room_at_once_for_what_the_last_one_measured(
    make_rig: MakeRig, sizes: MemorySizes
) -> None:
    """Its weights take 1 GiB, in VRAM it holds 3: unknown, it is evicted for too late."""
    budget = VramPolicy(budget="4Gi", headroom="0")
    first = make_rig(spec("a", residency=KEEP))
    first.backend.script.vram["a"] = 3 * GIB
    await first.ask("a")
    await first.settle(1)
    assert {size.vram_bytes for size in sizes.sizes.values()} == {3 * GIB}
    assert {size.host_bytes for size in sizes.sizes.values()} == {GIB}

    make_rig.backend = FakeBackend()
    other = structs.replace(spec("other", residency=KEEP), vram="2Gi")
    second = make_rig(spec("a", residency=KEEP), other, attach=False, vram=budget)
    second.backend.script.vram["a"] = 3 * GIB
    await second.supervisor.recall()
    second.attach()
    await second.ask("other")
    await second.ask("a")
    assert second.observer.evictions == [("other", "Evicted")]
    assert second.backend.peak_bytes == 3 * GIB


async def test_a_size_is_kept_under_what_makes_the_model_the_same_whatever_its_name(
    make_rig: MakeRig, sizes: MemorySizes
) -> None:
    first = make_rig(spec("a"))
    await first.ask("a")
    await first.settle(1)
    renamed = structs.replace(spec("b"), source="/models/a")
    second = make_rig(renamed, spec("c"), attach=False)
    await second.supervisor.recall()
    second.attach()
    assert dict(second.supervisor._fleet.vram.hinted_bytes) == {"b": GIB}


def test_another_source_option_or_kind_of_device_is_another_model() -> None:
    one = spec("a")
    keys = {
        model_key(one, DeviceKind.CPU),
        model_key(one, DeviceKind.CUDA),
        model_key(structs.replace(one, source="/models/other"), DeviceKind.CPU),
        model_key(structs.replace(one, options={"fp16": True}), DeviceKind.CPU),
        model_key(structs.replace(one, options={"fp16": True, "x": 1}), DeviceKind.CPU),
    }
    assert len(keys) == 5
    same = structs.replace(one, options={"x": 1, "fp16": True}, priority=5, vram="3Gi")
    assert model_key(same, DeviceKind.CPU) in keys


async def test_a_figure_that_hardly_moves_is_not_written_again(
    make_rig: MakeRig, sizes: MemorySizes
) -> None:
    rig = make_rig(spec("a"))
    await rig.ask("a")
    await rig.settle(1)
    written = sizes.writes
    rig.backend.script.vram["a"] = GIB + GIB // 200
    await rig.ask("a")
    await rig.settle(1)
    assert sizes.writes == written
    rig.backend.script.vram["a"] = 2 * GIB
    await rig.ask("a")
    await rig.settle(1)
    assert sizes.writes == written + 1


async def test_a_disk_that_cannot_be_written_costs_one_line_of_log_and_no_request(
    make_rig: MakeRig, sizes: MemorySizes, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes.error = OSError(28, "No space left on device")
    rig = make_rig(spec("a"), spec("b"))
    assert await rig.ask("a")
    assert await rig.ask("b")
    await rig.settle(1)
    assert capsys.readouterr().out.count("No space left on device") == 1


async def test_a_disk_that_hangs_holds_up_neither_the_start_nor_a_request(
    make_rig: MakeRig, sizes: MemorySizes
) -> None:
    sizes.seconds = 3600.0
    rig = make_rig(spec("a"), attach=False)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await rig.supervisor.recall()
    rig.attach()
    assert await rig.ask("a")
    assert loop.time() - began == pytest.approx(5.0, abs=0.01)


async def test_a_model_that_a_new_config_brings_is_remembered_too(
    make_rig: MakeRig, sizes: MemorySizes
) -> None:
    sizes.sizes = {
        model_key(spec("b"), DeviceKind.CPU): LearnedSize(
            source="/models/b", vram_bytes=3 * GIB, host_bytes=2 * GIB
        )
    }
    rig = make_rig(spec("a"), attach=False)
    await rig.supervisor.recall()
    rig.attach()
    memory = HostMemoryPolicy(budget="9Gi")
    await rig.supervisor.apply_config(
        AgentConfig(models=[spec("a"), spec("b")], host_memory=memory)
    )
    fleet = rig.supervisor._fleet
    assert fleet.vram.expected_bytes("b", 0, 0) == 3 * GIB
    assert fleet.host.expected_bytes("b", 0, 0) == 2 * GIB


async def test_only_so_many_models_are_remembered_and_the_latest_stay(
    make_rig: MakeRig, sizes: MemorySizes
) -> None:
    sizes.sizes = {str(n): LearnedSize(source="old", vram_bytes=n + 1) for n in range(MAX_MODELS)}
    rig = make_rig(spec("a"), attach=False)
    await rig.supervisor.recall()
    rig.attach()
    await rig.ask("a")
    await rig.settle(1)
    assert len(sizes.sizes) == MAX_MODELS
    assert "0" not in sizes.sizes
    assert list(sizes.sizes.values())[-1].source == "/models/a"
