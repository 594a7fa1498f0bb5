"""The supervisor on real processes, with a device whose figures a test sets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from vram_agent.backend import TaskResult
from vram_agent.devices.base import Placement
from vram_agent.devices.fake import FakeDevice
from vram_agent.errors import NoVramError
from vram_agent.metrics import AgentMetrics
from vram_agent.processes.group import ProcessBackend
from vram_agent.protocol import (
    AfterTask,
    AgentConfig,
    DeviceKind,
    DirtyAction,
    DirtyPolicy,
    ModelSpec,
    Residency,
    ResidualSource,
    VramPolicy,
)
from vram_agent.supervision.journal import FileJournal
from vram_agent.supervision.ports import LoopClock, Surroundings
from vram_agent.supervisor import Supervisor

from tests.conformance.cases import array_of, infer, python_spec

GIB = 1 << 30
X = np.array([1.0, 2.0], dtype=np.float32)
KEEP = Residency(after_task=AfterTask.KEEP, idle_timeout_seconds=0)


class PlacedDevice(FakeDevice):
    """Remembers what it was asked to place."""

    wanted: list[str]

    def place(self, wanted: str) -> Placement:
        self.wanted.append(wanted)
        return super().place(wanted)


class Watcher(AgentMetrics):
    """Tells a test of each change as it happens."""

    def __init__(self) -> None:
        super().__init__("test")
        self.changes: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def observe_transition(self, model: str, transition: str, seconds: float, outcome: str) -> None:
        super().observe_transition(model, transition, seconds, outcome)
        self.changes.put_nowait((model, transition))

    async def until(self, model: str, transition: str) -> None:
        while await self.changes.get() != (model, transition):
            pass


class Rig:
    """A supervisor of its own, on real processes."""

    def __init__(self, tmp_path: Path, device: FakeDevice, config: AgentConfig) -> None:
        self.device = device
        self.watcher = Watcher()
        self.supervisor = Supervisor(
            config,
            Surroundings(
                clock=LoopClock(), observer=self.watcher, journal=FileJournal(tmp_path / "state")
            ),
        )
        self.supervisor.attach(ProcessBackend(device))

    async def ask(self, name: str) -> list[float]:
        result: TaskResult = await self.supervisor.submit(name, infer(X))
        values: list[float] = array_of(result, "y").tolist()
        return values


class MakeRig:
    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self.rigs: list[Rig] = []

    def __call__(
        self, *models: ModelSpec, baseline: int = 0, dirty: DirtyPolicy | None = None
    ) -> Rig:
        device = PlacedDevice(kind=DeviceKind.CPU, source=ResidualSource.PROCESS, baseline=baseline)
        device.wanted = []
        config = AgentConfig(models=list(models), vram=VramPolicy(dirty=dirty))
        self.rigs.append(Rig(self._tmp_path, device, config))
        return self.rigs[-1]


@pytest.fixture
async def make_rig(tmp_path: Path) -> AsyncIterator[MakeRig]:
    make = MakeRig(tmp_path)
    yield make
    for rig in make.rigs:
        await rig.supervisor.close()


async def test_the_device_that_was_decided_reaches_the_process(make_rig: MakeRig) -> None:
    rig = make_rig(python_spec("make_doubler"))
    assert await rig.ask("m") == [2.0, 4.0]
    assert isinstance(rig.device, PlacedDevice)
    assert rig.device.wanted == ["GPU-fake"]


async def test_no_process_begins_on_a_dirty_device_until_the_others_have_left(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(
        python_spec("make_doubler"),
        baseline=3 * GIB,
        dirty=DirtyPolicy(policy=DirtyAction.WAIT),
    )
    request = asyncio.ensure_future(rig.ask("m"))
    await rig.watcher.until("m", "load")
    report = rig.supervisor.report()
    assert (report.models[0].tier, report.models[0].queued) == ("Host", 1)
    assert (report.devices[0].baseline_bytes, report.devices[0].dirty) == (3 * GIB, True)
    assert isinstance(rig.device, PlacedDevice)
    assert rig.device.wanted == []
    rig.device.baseline = GIB
    assert await request == [2.0, 4.0]
    assert not rig.supervisor.report().devices[0].dirty


async def test_a_dirty_device_is_refused_with_its_figures_and_nothing_is_started(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(
        python_spec("make_doubler"),
        baseline=3 * GIB,
        dirty=DirtyPolicy(policy=DirtyAction.REFUSE),
    )
    with pytest.raises(NoVramError, match=f"{3 * GIB} bytes of device GPU-fake were in use"):
        await rig.ask("m")
    report = rig.supervisor.report()
    assert (report.models[0].tier, report.memory.host_bytes) == ("Disk", 0)


async def test_an_offload_measures_its_scrub(make_rig: MakeRig) -> None:
    rig = make_rig(python_spec("make_doubler"))
    await rig.ask("m")
    await rig.watcher.until("m", "offload")
    scrub = rig.supervisor.report().memory.last_scrub
    assert scrub is not None
    # An interpreter's heap: there is something in it, and collecting garbage does not add to it.
    assert 0 < scrub.after_bytes <= scrub.before_bytes + (1 << 20)
    assert scrub.reclaimed_bytes == max(0, scrub.before_bytes - scrub.after_bytes)
