"""What a model holds comes and goes with its uses, and its answers stay the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from vram_agent import Manager
from vram_agent.devices.cpu import measure_private_anonymous_bytes
from vram_agent.protocol import AgentMode, ResidualSource

from tests import models
from tests.unit.agent.embed.conftest import (
    LARGE,
    LARGE_BYTES,
    Factory,
    MakeManager,
    Model,
    find,
    state,
    when,
    when_idle,
)

MIB = 1 << 20


def held_bytes() -> int:
    return measure_private_anonymous_bytes(os.getpid()) or 0


def test_nothing_is_made_before_the_first_use(manager: Manager) -> None:
    factory = Factory()
    manager.register("a", factory)
    report = manager.report()
    assert (factory.calls, state(report), report.memory.host_bytes) == (0, "Absent/Disk", 0)
    assert (report.agent.mode, report.memory.source) == (AgentMode.EMBED, ResidualSource.PROCESS)


def test_answers_are_the_same_bits_after_each_way_back(manager: Manager) -> None:
    factory = Factory()
    manager.register("a", factory)
    expected = Model().ask()
    for _ in range(3):
        with manager.use("a") as model:
            assert torch.equal(model.ask(), expected)
        assert state(when_idle(manager)) == "Offloaded/PinnedHost"
    assert factory.calls == 1


def test_the_devices_figure_rises_with_a_use_and_falls_after_it(manager: Manager) -> None:
    manager.register("a", Factory(size=LARGE))
    with manager.use("a"):
        pass
    when_idle(manager)
    before_bytes = held_bytes()
    with manager.use("a"):
        during_bytes = held_bytes()
        report = manager.report()
    after = when_idle(manager)
    assert during_bytes - before_bytes > 0.9 * LARGE_BYTES
    assert held_bytes() - before_bytes < 0.1 * LARGE_BYTES
    assert report.memory.model_bytes >= LARGE_BYTES
    assert report.devices[0].used_bytes - after.devices[0].used_bytes > 0.9 * LARGE_BYTES
    assert after.memory.model_bytes == 0
    assert after.memory.host_bytes >= LARGE_BYTES


def test_what_the_process_held_before_is_not_the_managers(make_manager: MakeManager) -> None:
    kept = np.ones(64 * MIB, np.uint8)
    manager = make_manager()
    manager.register("a", Factory())
    with manager.use("a"):
        assert manager.report().memory.used_bytes < kept.nbytes


def test_a_model_that_is_kept_stays_on_the_device(manager: Manager) -> None:
    manager.register("a", Factory(), after_task="Keep")
    with manager.use("a"):
        pass
    assert state(when_idle(manager)) == "Resident/VRAM"


def test_an_eager_model_comes_by_itself(manager: Manager) -> None:
    manager.register("a", Factory(), eager=True, after_task="Keep")
    when(manager, lambda report: state(report) == "Resident/VRAM")


def test_an_idle_model_is_dropped_and_made_anew(manager: Manager) -> None:
    factory = Factory()
    manager.register("a", factory, idle_timeout_seconds=1)
    for calls in (1, 2):
        with manager.use("a") as model:
            assert torch.equal(model.ask(), Model().ask())
        del model
        report = when(manager, lambda report: state(report) == "Absent/Disk")
        assert (factory.calls, report.memory.host_bytes) == (calls, 0)


def test_tensors_that_the_application_kept_stay_whole_when_the_model_is_dropped(
    manager: Manager,
) -> None:
    manager.register("a", Factory(), idle_timeout_seconds=1)
    with manager.use("a") as model:
        pass
    when(manager, lambda report: state(report) == "Absent/Disk")
    assert torch.equal(model.ask(), Model().ask())


def test_a_model_leaves_for_another_where_one_fits(make_manager: MakeManager) -> None:
    manager = make_manager(vram_budget="48Mi")
    manager.register("a", Factory(1), after_task="Keep", vram="32Mi")
    manager.register("b", Factory(2), after_task="Keep", vram="32Mi")
    for name, seed in (("a", 1), ("b", 2), ("a", 1)):
        with manager.use(name) as model:
            assert torch.equal(model.ask(), Model(seed).ask())
            other = find(manager.report(), "b" if name == "a" else "a")
            assert other.vram_bytes == 0


def test_a_session_of_onnx_runtime_comes_and_goes_too(manager: Manager) -> None:
    class Reader:
        def __init__(self, path: Path) -> None:
            import onnxruntime  # noqa: PLC0415 - as model code does

            self.session = onnxruntime.InferenceSession(str(path))

        def read(self, samples: np.ndarray) -> int:
            return int(self.session.run(["digit"], {"audio": samples[None]})[0][0])

    manager.register("digits", lambda: Reader(models.DIGITS))
    clip = models.digit_clips()[3]
    for _ in range(2):
        with manager.use("digits") as reader:
            assert reader.read(models.read_samples(clip.path)) == clip.digit
        assert state(when_idle(manager), "digits") == "Offloaded/PinnedHost"
