from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from vram_agent.backend import Task, TaskKind
from vram_agent.protocol import (
    ActionReport,
    AgentConfig,
    ModelSpec,
    PodIdentity,
    Residency,
    Runtime,
)
from vram_agent.supervision.ports import LoopClock, NoSizes, SizeStore, Surroundings
from vram_agent.supervisor import Supervisor

from tests.support.backend import FakeBackend

START = datetime(2026, 1, 1, tzinfo=UTC)


class RecordingObserver:
    def __init__(self) -> None:
        self.transitions: list[tuple[str, str, str]] = []
        self.evictions: list[tuple[str, str]] = []
        self.waits: list[tuple[str, float]] = []
        self.restarts: list[tuple[str, str]] = []
        self.scrubs: list[int] = []

    def observe_transition(self, model: str, transition: str, seconds: float, outcome: str) -> None:
        self.transitions.append((model, transition, outcome))

    def observe_eviction(self, model: str, reason: str) -> None:
        self.evictions.append((model, reason))

    def observe_queue_wait(self, model: str, seconds: float) -> None:
        self.waits.append((model, seconds))

    def observe_scrub(self, reclaimed_bytes: int) -> None:
        self.scrubs.append(reclaimed_bytes)

    def observe_worker_restart(self, model: str, reason: str) -> None:
        self.restarts.append((model, reason))


class MemoryJournal:
    def __init__(self) -> None:
        self.action: ActionReport | None = None
        self.error: OSError | None = None

    def read(self) -> ActionReport | None:
        return self.action

    async def write(self, action: ActionReport) -> None:
        if self.error is not None:
            raise self.error
        self.action = action


@dataclass
class ScriptedMemory:
    """A container whose figures a test sets; by default it has no limit."""

    limit: int | None = None
    used: int = 0
    kills: int = 0

    def limit_bytes(self) -> int | None:
        return self.limit

    def available_bytes(self) -> int | None:
        return None if self.limit is None else max(0, self.limit - self.used)

    def oom_kills(self) -> int:
        return self.kills


class Rig:
    """A supervisor, its fake backend and what it observed."""

    def __init__(self, config: AgentConfig, given: MakeRig, backend: FakeBackend) -> None:
        self.backend = backend
        self.observer = RecordingObserver()
        self.journal = given.journal
        self.supervisor = Supervisor(
            config,
            Surroundings(
                clock=LoopClock(START),
                observer=self.observer,
                journal=given.journal,
                sizes=given.sizes,
                host=given.host,
                pod=PodIdentity(namespace="ns", name="pod", uid="uid"),
                version="test",
            ),
        )

    def attach(self) -> None:
        self.supervisor.attach(self.backend)

    def ask(self, name: str, *, keep: float | None = None, **parameters: Any) -> asyncio.Task[Any]:
        task = Task(kind=TaskKind.INFER, parameters=parameters)
        return asyncio.ensure_future(self.supervisor.submit(name, task, keep_alive_seconds=keep))

    def state(self, name: str) -> str:
        report = self.supervisor.model(name).report
        return f"{report.state}/{report.tier}"

    async def settle(self, seconds: float = 0.0) -> None:
        await asyncio.sleep(seconds)
        for _ in range(20):
            await asyncio.sleep(0)


def spec(name: str, vram: str = "", **fields: Any) -> ModelSpec:
    residency = fields.pop("residency", None) or Residency(**fields.pop("stay", {}))
    return ModelSpec(
        name=name,
        runtime=Runtime.ONNX,
        source=f"/models/{name}",
        vram=vram,
        residency=residency,
        **fields,
    )


class MakeRig:
    def __init__(self) -> None:
        self.rigs: list[Rig] = []
        self.journal = MemoryJournal()
        self.sizes: SizeStore = NoSizes()
        self.host = ScriptedMemory()
        self.backend: FakeBackend | None = None

    def __call__(self, *specs: ModelSpec, attach: bool = True, **config: Any) -> Rig:
        backend = self.backend or FakeBackend()
        rig = Rig(AgentConfig(models=list(specs), **config), self, backend)
        self.rigs.append(rig)
        if attach:
            rig.attach()
        return rig


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    make = MakeRig()
    yield make
    for rig in make.rigs:
        assert rig.supervisor._fault is None, rig.supervisor._fault
        await rig.supervisor.close()
