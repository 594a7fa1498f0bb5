"""What tasks leave on a model is named, and moved or dropped where its rules say so."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vram_agent.devices.base import Placement
from vram_agent.devices.cpu import CPU_UUID, AnonymousMemory
from vram_agent.engine.arena import Arena, Region
from vram_agent.engine.cuda import GRAPHS, GraphWatch
from vram_agent.engine.rules import TensorRules, read_rules
from vram_agent.engine.torch import CapturedGraphError, TorchWeights
from vram_agent.protocol import DeviceKind

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("t")
    yield made
    made.close()


@pytest.fixture
def memory() -> AnonymousMemory:
    return AnonymousMemory(
        Placement(kind=DeviceKind.CPU, index=0, uuid=CPU_UUID, total_bytes=1 << 40)
    )


def rules(**patterns: str) -> TensorRules:
    return read_rules(patterns)


def make_root() -> Any:
    return SimpleNamespace(weight=torch.arange(4.0), cache={}, layers=[])


def test_what_tasks_made_stays_and_is_named_by_size(arena: Arena, memory: AnonymousMemory) -> None:
    root = make_root()
    weights = TorchWeights(root, arena)
    weights.restore(memory, 1)
    root.cache["small"] = torch.ones(MIB // 4)
    root.layers.append(torch.ones(2, MIB // 4))
    root.layers.append(root.layers[0][1])
    left = weights.offload()
    assert left.held_bytes == 0
    assert left.message.startswith("3 MiB of tensors that tasks made stay on the device: layers[0]")
    assert "cache['small']" in left.message
    assert weights.stray_bytes == 3 * MIB
    assert root.layers[1].sum() == MIB // 4
    root.layers.clear()
    root.cache.clear()
    weights.restore(memory, 1)
    assert weights.offload().message == ""
    assert weights.stray_bytes == 0


def test_little_is_not_worth_words(arena: Arena, memory: AnonymousMemory) -> None:
    root = make_root()
    weights = TorchWeights(root, arena)
    weights.restore(memory, 1)
    root.cache["attn"] = torch.ones(10)
    assert weights.offload().message == ""
    assert weights.stray_bytes == 40


def test_a_stray_that_is_to_move_leaves_the_device_and_comes_back(
    arena: Arena, memory: AnonymousMemory
) -> None:
    root = make_root()
    weights = TorchWeights(root, arena, rules(**{"cache*": "move"}))
    weights.restore(memory, 1)
    base = torch.arange(64 * MIB // 4, dtype=torch.float32)
    root.cache["key"], root.cache["tail"] = base, base[-2:]
    expected = base[-2:].tolist()
    del base
    full_bytes = memory.used_bytes()
    assert weights.offload().message == ""
    assert full_bytes - memory.used_bytes() > 60 * MIB
    assert weights.stray_bytes == 0
    assert root.cache["key"].shape == (0,)
    weights.restore(memory, 1)
    assert root.cache["tail"].tolist() == expected
    # Still one storage.
    root.cache["key"][-1] = -1
    assert root.cache["tail"][1] == -1
    assert full_bytes - memory.used_bytes() < 4 * MIB


def test_a_stray_made_in_inference_mode_moves_and_can_still_be_sliced(
    arena: Arena, memory: AnonymousMemory
) -> None:
    root = make_root()
    weights = TorchWeights(root, arena, rules(**{"cache*": "move"}))
    weights.restore(memory, 1)
    with torch.inference_mode():
        root.cache["table"] = torch.arange(6.0).reshape(2, 3)
    weights.offload()
    assert (weights.stray_bytes, root.cache["table"].shape) == (0, (0, 0))
    weights.restore(memory, 1)
    assert root.cache["table"][1:].tolist() == [[3, 4, 5]]
    assert root.cache["table"].is_inference()


def test_strays_that_cannot_be_kept_stay_and_so_does_the_model(
    arena: Arena, memory: AnonymousMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root()
    weights = TorchWeights(root, arena, rules(**{"cache*": "move"}))
    weights.restore(memory, 1)
    address = root.weight.data_ptr()
    root.cache["one"], root.cache["two"] = torch.ones(5), torch.ones(6)
    regions = iter([None, OSError(28, "out")])

    def populate(*_: object) -> None:
        fault = next(regions)
        if fault is not None:
            raise fault

    monkeypatch.setattr(Region, "populate", populate)
    with pytest.raises(OSError, match="out"):
        weights.offload()
    assert root.weight.data_ptr() == address
    assert root.cache["one"].tolist() == [1] * 5
    assert root.cache["two"].tolist() == [1] * 6
    monkeypatch.undo()
    assert weights.offload().held_bytes == 0
    assert root.weight.data_ptr() != address


def test_a_stray_that_is_to_be_dropped_comes_back_as_zeros_of_its_shape(
    arena: Arena, memory: AnonymousMemory
) -> None:
    root = make_root()
    weights = TorchWeights(root, arena, rules(**{"cache*": "drop"}))
    weights.restore(memory, 1)
    root.cache["key"] = torch.ones(3, 5, dtype=torch.float16)
    weights.offload()
    assert root.cache["key"].shape == (0, 0)
    weights.restore(memory, 1)
    assert root.cache["key"].shape == (3, 5)
    assert root.cache["key"].dtype == torch.float16
    assert root.cache["key"].sum() == 0


def test_scratch_that_was_loaded_takes_no_host_memory_and_comes_back_as_zeros(
    arena: Arena, memory: AnonymousMemory
) -> None:
    root = SimpleNamespace(weight=torch.ones(4), scratch=torch.ones(2, 8 * MIB // 4))
    weights = TorchWeights(root, arena, rules(scratch="drop"))
    assert weights.weight_bytes < MIB
    assert root.scratch.shape == (0, 0)
    assert weights.restore(memory, 1) > 16 * MIB
    assert root.scratch.shape == (2, 8 * MIB // 4)
    assert root.scratch.sum() == 0
    root.scratch.fill_(7)
    assert weights.offload().held_bytes == 0
    weights.restore(memory, 1)
    assert root.scratch.sum() == 0
    assert root.weight.tolist() == [1, 1, 1, 1]


def test_what_is_to_be_left_is_left_without_a_word(arena: Arena, memory: AnonymousMemory) -> None:
    root = SimpleNamespace(weight=torch.ones(4), table=torch.ones(4), odd=torch.eye(2).to_sparse())
    address = root.table.data_ptr()
    weights = TorchWeights(root, arena, rules(table="leave"))
    assert weights.notes == "1 tensors do not move (odd: its layout has no flat storage)"
    weights.restore(memory, 1)
    assert root.table.data_ptr() == address
    assert root.weight.data_ptr() != address


def test_a_view_of_a_weight_that_a_task_kept_goes_where_the_weight_goes(
    arena: Arena, memory: AnonymousMemory
) -> None:
    root = make_root()
    weights = TorchWeights(root, arena)
    weights.restore(memory, 1)
    root.cache["last"] = root.weight[1:]
    for _ in range(2):
        left = weights.offload()
        assert weights.offload().message == ""
        assert (left.held_bytes, left.message) == (0, "")
        assert root.cache["last"].tolist() == [1, 2, 3]
        weights.restore(memory, 1)
        assert root.cache["last"].data_ptr() == root.weight.data_ptr() + 4
        assert root.cache["last"].tolist() == [1, 2, 3]


class WithDevice:
    """Remembers its device at the first look, as CosyVoice does."""

    def __init__(self) -> None:
        self.weight = torch.ones(1)

    @functools.cached_property
    def device(self) -> torch.device:
        return self.weight.device

    @functools.cached_property
    def width(self) -> int:
        return 1


def test_a_device_that_was_remembered_while_loading_is_asked_for_anew(arena: Arena) -> None:
    root = WithDevice()
    assert root.device.type == "cpu"
    assert root.width == 1
    TorchWeights([root], arena)
    assert "device" not in vars(root)
    assert "width" in vars(root)


def test_captures_are_counted_whoever_keeps_the_graph() -> None:
    captured: list[int] = []

    class Graph:
        def capture_begin(self, pool: int) -> None:
            captured.append(pool)

    watch = GraphWatch()
    watch.begin(Graph)
    watch.begin(Graph)
    assert watch.captures == 0
    Graph().capture_begin(pool=3)
    assert watch.captures == 1
    assert captured == [3]


def test_a_model_in_a_process_with_captured_graphs_stays_where_it_is(
    arena: Arena, memory: AnonymousMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root()
    weights = TorchWeights(root, arena)
    weights.restore(memory, 1)
    address = root.weight.data_ptr()
    monkeypatch.setattr(GRAPHS, "captures", 2)
    with pytest.raises(
        CapturedGraphError, match=r"2 CUDA graphs were captured .* offloadTier Host"
    ):
        weights.offload()
    assert root.weight.data_ptr() == address
    monkeypatch.setattr(GRAPHS, "captures", 0)
    assert weights.offload().held_bytes == 0
