"""A load tells how far it is: each step as it begins, with bytes that the process counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from vram_agent.devices.cpu import CpuDevice
from vram_agent.processes.channel import Channel
from vram_agent.processes.messages import (
    Become,
    Call,
    Done,
    Load,
    Loaded,
    MovedTo,
    Progressed,
    Reply,
    Request,
    Restore,
    decode_answer,
    encode,
)
from vram_agent.processes.spawn import build_environment, spawn_template
from vram_agent.protocol import LoadProgress, LoadStep, ModelSpec, Runtime

from tests import models
from tests.conformance.cases import python_spec

MIB = 1 << 20


@dataclass
class Template:
    """A real template, asked without a supervisor: nothing that it says can be missed."""

    channel: Channel

    def ask(self, number: int, request: Request) -> tuple[list[LoadProgress], Reply]:
        self.channel.send(encode(Call(number, request)))
        told: list[LoadProgress] = []
        while True:
            answer = decode_answer(self.channel.receive().body)
            assert answer.id == number
            if not isinstance(answer.reply, Progressed):
                return told, answer.reply
            told.append(answer.reply.progress)


@pytest.fixture
def template() -> Iterator[Template]:
    pid, sock = spawn_template(build_environment(os.environ, CpuDevice().environment()))
    channel = Channel(sock)
    yield Template(channel)
    channel.close()
    os.waitpid(pid, 0)


def steps_of(told: list[LoadProgress]) -> list[LoadStep]:
    return list(dict.fromkeys(progress.step for progress in told))


def bytes_of(told: list[LoadProgress], step: LoadStep) -> list[tuple[int | None, int | None]]:
    return [(one.done_bytes, one.total_bytes) for one in told if one.step is step]


def test_a_checkpoint_is_copied_byte_by_byte_into_host_memory_and_onto_the_device(
    template: Template,
) -> None:
    spec = ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(models.WHISPER))
    told, loaded = template.ask(1, Load(spec=spec))
    assert isinstance(loaded, Loaded)
    assert steps_of(told) == [LoadStep.IMPORTING, LoadStep.READING, LoadStep.COPYING_TO_HOST]
    assert set(bytes_of(told, LoadStep.READING)) == {(None, None)}  # the library does not say
    copied = bytes_of(told, LoadStep.COPYING_TO_HOST)
    total = copied[0][1]
    assert copied[0] == (0, total)
    assert copied[-1] == (total, total)
    # The arena's places are aligned, so that they take a little more than the tensors.
    assert total is not None
    assert loaded.weight_bytes * 0.9 < total <= loaded.weight_bytes

    placement = CpuDevice().place("")
    assert template.ask(2, Become(placement=placement, threads=1)) == (
        [],
        Done(arena_bytes=loaded.arena_bytes),
    )
    told, moved = template.ask(3, Restore(name="m"))
    assert isinstance(moved, MovedTo)
    assert steps_of(told) == [LoadStep.STARTING_PROCESS, LoadStep.COPYING_TO_DEVICE]
    copied = bytes_of(told, LoadStep.COPYING_TO_DEVICE)
    assert copied[0] == (0, loaded.weight_bytes)
    assert copied[-1] == (loaded.weight_bytes, loaded.weight_bytes)


def test_the_files_of_an_onnx_model_are_read_against_their_size(template: Template) -> None:
    size = models.DIGITS.stat().st_size
    spec = ModelSpec(name="m", runtime=Runtime.ONNX, source=str(models.DIGITS))
    told, loaded = template.ask(1, Load(spec=spec))
    assert isinstance(loaded, Loaded)
    read = bytes_of(told, LoadStep.READING)
    assert (0, size) in read
    assert (size, size) in read
    template.ask(2, Become(placement=CpuDevice().place(""), threads=1))
    told, _ = template.ask(3, Restore(name="m"))
    # ONNX Runtime does not say how far it is.
    assert bytes_of(told, LoadStep.BUILDING_SESSION) == [(None, None)]


def test_figures_only_grow_and_few_messages_tell_them(template: Template) -> None:
    spec = python_spec("make_linear", rows=1024, columns=64 * 1024)  # 256 MiB
    told, _ = template.ask(1, Load(spec=spec))
    template.ask(2, Become(placement=CpuDevice().place(""), threads=1))
    told_later, _ = template.ask(3, Restore(name="m"))
    copied = bytes_of(told_later, LoadStep.COPYING_TO_DEVICE)
    done = [one or 0 for one, _ in copied]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 256 * MIB)
    # Never more than a beginning, an end, and one for each of the copy's chunks.
    assert 2 <= len(copied) <= 2 + 256 // 64
    assert len(told) < 12
