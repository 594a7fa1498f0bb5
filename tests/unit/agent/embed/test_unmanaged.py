"""An application's flags, and the same code where its user asked for no management."""

from __future__ import annotations

import argparse
import threading

import pytest
import torch
from vram_agent import Manager, add_arguments
from vram_agent.errors import ModelFailedError, NoSuchModelError, NotSupportedError

from tests.unit.agent.embed.conftest import Factory, MakeManager, state, when


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--text")
    add_arguments(parser)
    return parser.parse_args(words)


def test_without_the_flag_a_model_is_made_at_its_first_use_and_kept_as_it_is() -> None:
    before = threading.active_count()
    manager = Manager.from_args(parse("--text", "hello"))
    factory = Factory()
    manager.register("a", factory)
    assert factory.calls == 0
    with manager.use("a") as first, manager.use("a") as second:
        assert second is first
    with manager.use("a") as third:
        assert third is first
    assert factory.calls == 1
    assert manager.serve_control() == ""
    assert threading.active_count() == before
    with pytest.raises(NotSupportedError, match="management is off"):
        manager.report()
    manager.close()


async def test_without_the_flag_tasks_get_it_too() -> None:
    manager = Manager(enabled=False)
    manager.register("a", Factory(), after_task="Keep", vram="1Gi")
    async with manager.ause("a") as model:
        assert isinstance(model, torch.nn.Module)


def test_without_the_flag_mistakes_are_told_in_the_same_words() -> None:
    manager = Manager(enabled=False)
    calls = 0

    def make() -> object:
        nonlocal calls
        calls += 1
        raise OSError("no checkpoint")

    manager.register("a", make)
    with pytest.raises(ValueError, match="registered already"):
        manager.register("a", make)
    for _ in range(2):
        with pytest.raises(ModelFailedError, match="OSError: no checkpoint"), manager.use("a"):
            pass
    assert calls == 2
    with pytest.raises(NoSuchModelError, match="registered are: a"), manager.use("b"):
        pass


def test_the_flags_turn_management_on_and_set_the_idle_time(make_manager: MakeManager) -> None:
    args = parse("--enable-gpu-management", "--gpu-idle-timeout", "1")
    manager = make_manager(
        enabled=args.enable_gpu_management, idle_timeout_seconds=args.gpu_idle_timeout
    )
    manager.register("a", Factory())
    with manager.use("a"):
        pass
    when(manager, lambda report: state(report) == "Absent/Disk")


def test_flags_that_say_nothing_have_their_defaults_and_bad_ones_are_refused() -> None:
    args = parse()
    assert (args.enable_gpu_management, args.gpu_idle_timeout) == (False, 600)
    for bad in ("-1", "soon"):
        with pytest.raises(argparse.ArgumentError, match="--gpu-idle-timeout"):
            parse("--gpu-idle-timeout", bad)
