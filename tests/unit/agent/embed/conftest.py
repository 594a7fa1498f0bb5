"""Managers on the CPU device, with real torch modules, in this very process."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
import torch
from vram_agent import Manager
from vram_agent.protocol import ModelReport, Report

DEADLINE_SECONDS = 60.0
SMALL, LARGE = 256, 2048
LARGE_BYTES = 2 * (LARGE * LARGE + LARGE) * 4


@pytest.fixture(scope="module", autouse=True)
def _leaves_logging_as_it_was() -> Iterator[None]:
    """A Manager sets structlog up where nobody has; tests of other parts read what it prints."""
    yield
    structlog.reset_defaults()


class Model(torch.nn.Module):
    """Two layers; what it answers depends on every weight."""

    def __init__(self, seed: int = 0, size: int = SMALL) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(size, size)
        self.second = torch.nn.Linear(size, size)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(value)))
        return result

    def ask(self) -> torch.Tensor:
        with torch.no_grad():
            return self(torch.linspace(-1, 1, self.first.in_features)[None])  # type: ignore[no-any-return]


class Factory:
    """Makes models and counts them."""

    def __init__(self, seed: int = 0, size: int = SMALL) -> None:
        self.seed, self.size = seed, size
        self.calls = 0

    def __call__(self) -> Model:
        self.calls += 1
        return Model(self.seed, self.size)


def when(manager: Manager, is_so: Callable[[Report], bool]) -> Report:
    """Ask for reports until one is as wanted."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_so(report := manager.report()):
        assert time.monotonic() < deadline, report
        time.sleep(0.02)
    return report


def when_idle(manager: Manager) -> Report:
    return when(manager, lambda report: report.idle)


def find(report: Report, name: str) -> ModelReport:
    return next(model for model in report.models if model.name == name)


def state(report: Report, name: str = "a") -> str:
    model = find(report, name)
    return f"{model.state}/{model.tier}"


class Background:
    """A use in a thread that ends when told to."""

    def __init__(self, manager: Manager, name: str) -> None:
        self.is_in = threading.Event()
        self.may_go = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._use, args=(manager, name))
        self._thread.start()

    def _use(self, manager: Manager, name: str) -> None:
        try:
            with manager.use(name) as self.value:
                self.is_in.set()
                assert self.may_go.wait(DEADLINE_SECONDS)
        except BaseException as error:
            self.error = error
            self.is_in.set()

    def wait(self) -> Background:
        assert self.is_in.wait(DEADLINE_SECONDS)
        return self

    def end(self) -> None:
        self.may_go.set()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()


MakeManager = Callable[..., Manager]


@pytest.fixture(autouse=True, scope="module")
def _leaves_nothing_to_collect() -> Iterator[None]:
    """Other tests count descriptors, and a model that a test kept has one until it is collected."""
    yield
    gc.collect()


@pytest.fixture
def make_manager() -> Iterator[MakeManager]:
    made: list[Manager] = []

    def make(**options: Any) -> Manager:
        manager = Manager(**{"device": "CPU", "vram_headroom": "0", **options})
        made.append(manager)
        return manager

    yield make
    for manager in made:
        manager.close(grace_seconds=0)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("vram-agent")]
    assert left == []


@pytest.fixture
def manager(make_manager: MakeManager) -> Manager:
    return make_manager()


@pytest.fixture
def in_background(manager: Manager) -> Iterator[Callable[[str], Background]]:
    """Uses of the manager in threads; those that a test leaves open are ended."""
    made: list[Background] = []

    def begin(name: str) -> Background:
        made.append(Background(manager, name))
        return made[-1]

    yield begin
    for one in made:
        one.end()
