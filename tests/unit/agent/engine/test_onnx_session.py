"""Sessions begin at restore and are proven gone at offload."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from vram_agent.devices.base import Placement
from vram_agent.devices.cpu import AnonymousMemory
from vram_agent.engine.arena import Arena
from vram_agent.engine.onnx import OnnxWeights, SessionChoices
from vram_agent.errors import ModelFailedError
from vram_agent.protocol import DeviceKind

from tests import models

# Before the engine imports it: onnxruntime would start a thread that uploads.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def placement(kind: DeviceKind) -> Placement:
    return Placement(kind=kind, index=0, uuid="D", total_bytes=1 << 40)


@pytest.fixture
def weights() -> Iterator[OnnxWeights]:
    arena = Arena("t")
    made = OnnxWeights(models.DIGITS, {}, arena, SessionChoices())
    yield made
    made.release()
    assert arena.used_bytes == 0
    arena.close()


def test_a_session_lives_between_restore_and_offload(weights: OnnxWeights) -> None:
    clip = models.digit_clips()[0]
    feeds = {"audio": models.read_samples(clip.path)[None]}
    with pytest.raises(RuntimeError, match="not on the device"):
        weights.run(feeds)
    memory = AnonymousMemory(placement(DeviceKind.CPU))
    weights.restore(memory, 1)
    assert weights.run(feeds)["digit"].tolist() == [clip.digit]
    left = weights.offload()
    assert (left.held_bytes, left.message) == (0, "")
    assert weights.offload() == left
    with pytest.raises(RuntimeError, match="not on the device"):
        weights.run(feeds)


def test_who_still_holds_the_session_is_named(weights: OnnxWeights) -> None:
    weights.restore(AnonymousMemory(placement(DeviceKind.CPU)), 1)
    holder = [weights._session]
    assert weights.offload().message == "the session is still held by builtins.list"
    assert holder[0].run(None, {"audio": np.zeros((1, 16_000), np.float32)})


def test_a_build_without_cuda_does_not_quietly_use_the_cpu(weights: OnnxWeights) -> None:
    memory = AnonymousMemory(placement(DeviceKind.CUDA))
    with pytest.raises(ModelFailedError, match="onnxruntime"):
        weights.restore(memory, 1)
