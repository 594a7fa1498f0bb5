"""Weights move by pointing tensors elsewhere; what cannot move stays, with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vram_agent.devices.base import OutOfDeviceMemoryError, Placement
from vram_agent.devices.cpu import CPU_UUID, AnonymousMemory
from vram_agent.engine.arena import Arena
from vram_agent.engine.torch import TorchWeights
from vram_agent.protocol import DeviceKind

GIB = 1 << 30


def open_memory(total_bytes: int = 64 * GIB) -> AnonymousMemory:
    return AnonymousMemory(
        Placement(kind=DeviceKind.CPU, index=0, uuid=CPU_UUID, total_bytes=total_bytes)
    )


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("t")
    yield made
    made.close()


def addresses(tensors: list[torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def test_values_are_the_same_bits_in_every_place(arena: Arena) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = addresses(list(model.state_dict().values()))
    weights = TorchWeights(model, arena)
    assert weights.left_alone == []

    def assert_same() -> None:
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])

    in_arena = addresses(list(model.state_dict().values()))
    assert not in_arena & own
    assert_same()
    memory = open_memory()
    for _ in range(3):
        assert weights.restore(memory, 1) == weights.weight_bytes
        assert not addresses(list(model.state_dict().values())) & in_arena
        assert_same()
        assert weights.offload().held_bytes == 0
        assert addresses(list(model.state_dict().values())) == in_arena
        assert_same()


def test_every_kind_of_tensor_that_can_move_moves(arena: Arena) -> None:
    base = torch.arange(24, dtype=torch.float64)
    root = SimpleNamespace(
        transposed=base.reshape(4, 6).t(),
        tail=base[20:],
        half=torch.ones(3, dtype=torch.float16),
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(5),
        parameter=torch.nn.Parameter(torch.ones(2, 2)),
        empty=torch.empty(0),
        expanded=torch.tensor([9.0]).expand(4),
        complex=torch.tensor([1 + 2j]),
    )
    weights = TorchWeights(root, arena)
    del base
    assert weights.left_alone == []
    weights.restore(open_memory(), 1)
    assert root.transposed.shape == (6, 4)
    assert root.transposed[5, 3] == 23
    assert root.tail.tolist() == [20, 21, 22, 23]
    assert root.tail.untyped_storage().data_ptr() == root.transposed.untyped_storage().data_ptr()
    # Tied weights stay tied: a write through one is seen through the other.
    root.tail[0] = -1
    assert root.transposed[2, 3] == -1
    assert root.flags.tolist() == [True, False]
    assert root.expanded.tolist() == [9, 9, 9, 9]
    assert root.expanded.stride() == (0,)
    assert root.complex.tolist() == [1 + 2j]
    assert root.parameter.requires_grad
    weights.offload()
    assert root.transposed[2, 3] == -1


def sparse() -> torch.Tensor:
    return torch.eye(2).to_sparse()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(sparse, "no flat storage", id="sparse"),
        pytest.param(lambda: torch.empty(2, device="meta"), "no bytes", id="meta"),
        pytest.param(lambda: torch.tensor([1j]).conj(), "lazy", id="a lazy conjugate"),
    ],
)
def test_what_cannot_move_is_left_alone_with_a_reason(arena: Arena, make: Any, words: str) -> None:
    root = SimpleNamespace(odd=make(), plain=torch.ones(2))
    weights = TorchWeights(root, arena)
    assert [(one.path, words in one.reason) for one in weights.left_alone] == [("model.odd", True)]
    weights.restore(open_memory(), 1)
    assert root.plain.tolist() == [1, 1]


def test_a_tensor_made_in_inference_mode_moves_and_stays_what_it_is(arena: Arena) -> None:
    with torch.inference_mode():
        frozen = torch.arange(4.0)
        layer = torch.nn.Linear(4, 1)
    wanted = layer(frozen).item()
    root = SimpleNamespace(frozen=frozen, view=frozen[2:], layer=layer, other=torch.zeros(1))
    weights = TorchWeights(root, arena)
    assert not weights.left_alone
    host = frozen.data_ptr()
    weights.restore(open_memory(), 1)
    assert frozen.data_ptr() != host
    with torch.inference_mode():
        # Slicing asks for a version counter, unless the tensor still is one of inference mode.
        assert (frozen[1:].tolist(), root.view.tolist()) == ([1, 2, 3], [2, 3])
        assert layer(frozen).item() == wanted
        frozen.add_(1)
    weights.offload()
    assert frozen.data_ptr() == host
    assert (frozen.is_inference(), frozen.tolist(), root.view.tolist()) == (
        True,
        [1, 2, 3, 4],
        [3, 4],
    )
    layer.bias.data = torch.ones(1)
    weights.restore(open_memory(), 1)
    weights.offload()
    assert frozen.tolist() == [1, 2, 3, 4]


def test_quantised_tensors_are_left_alone(arena: Arena) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    weights = TorchWeights([quantised], arena)
    assert "quantised" in weights.left_alone[0].reason


@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_a_changed_weight_is_copied_back_and_an_unchanged_one_is_not(
    arena: Arena, in_inference_mode: bool
) -> None:
    root = [torch.zeros(2), torch.zeros(2)]
    weights = TorchWeights(root, arena)
    host = [tensor.data_ptr() for tensor in root]
    weights.restore(open_memory(), 1)
    with torch.inference_mode(mode=in_inference_mode):
        root[0].add_(3)
    # Through .data the version does not move: the documented limit.
    root[1].data.add_(3)
    weights.offload()
    assert [tensor.data_ptr() for tensor in root] == host
    assert [tensor.tolist() for tensor in root] == [[3, 3], [0, 0]]


def test_a_replaced_weight_keeps_its_values_or_gets_its_loaded_ones_back(arena: Arena) -> None:
    same, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    weights = TorchWeights([same, other], arena)
    weights.restore(open_memory(), 1)
    same.data = torch.ones(2)
    other.data = torch.ones(3)
    message = weights.offload().message
    assert "model[0] was replaced; its new values were kept" in message
    assert "model[1] was replaced; its loaded values are back" in message
    assert (same.tolist(), other.tolist()) == ([1, 1], [0, 0])


def test_a_restore_that_does_not_fit_changes_nothing(arena: Arena) -> None:
    root = [torch.ones(1 << 20)]
    weights = TorchWeights(root, arena)
    host = root[0].data_ptr()
    memory = open_memory(total_bytes=1 << 20)
    with pytest.raises(OutOfDeviceMemoryError, match="4 MiB wanted, 0 of 1 MiB free"):
        weights.restore(memory, 1)
    assert root[0].data_ptr() == host
    assert weights.offload().held_bytes == 0


def test_a_copy_that_fails_frees_the_block(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    root = [torch.ones(32 << 20)]
    weights = TorchWeights(root, arena)
    host = root[0].data_ptr()
    memory = open_memory()
    before_bytes = memory.used_bytes()

    def fail() -> None:
        raise RuntimeError("the device was lost")

    monkeypatch.setattr(memory, "synchronize", fail)
    with pytest.raises(RuntimeError, match="lost"):
        weights.restore(memory, 1)
    assert root[0].data_ptr() == host
    assert memory.used_bytes() - before_bytes < 32 << 20


def test_who_still_looks_into_the_weights_is_told_of(arena: Arena) -> None:
    root = [torch.ones(1 << 20)]
    weights = TorchWeights(root, arena)
    weights.restore(open_memory(), 1)
    leaked = root[0][5:]
    left = weights.offload()
    assert left.held_bytes == weights.weight_bytes
    assert "still looks into" in left.message
    assert leaked.sum() == (1 << 20) - 5


def test_the_device_holds_what_is_restored_and_no_more(arena: Arena) -> None:
    root = [torch.ones(64 << 20, dtype=torch.uint8), torch.zeros(3)]
    weights = TorchWeights(root, arena)
    memory = open_memory()
    before_bytes = memory.used_bytes()
    weights.restore(memory, 1)
    assert memory.used_bytes() - before_bytes == pytest.approx(64 << 20, rel=0.05)
    weights.offload()
    assert memory.used_bytes() - before_bytes < 4 << 20


def test_what_still_looks_into_released_weights_reads_zeros(arena: Arena) -> None:
    root = [torch.ones(1 << 20)]
    TorchWeights(root, arena).release()
    assert root[0].sum() == 0


def test_released_weights_give_the_arena_back(arena: Arena) -> None:
    weights = TorchWeights([torch.ones(1 << 20)], arena)
    assert arena.used_bytes > 0
    weights.release()
    assert arena.used_bytes == 0


def test_a_script_module_is_found_too(arena: Arena) -> None:
    with pytest.warns(DeprecationWarning, match="jit.script"):
        script = torch.jit.script(torch.nn.Linear(2, 2))
    with torch.no_grad():
        script.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        script.bias.zero_()
    weights = TorchWeights(script, arena)
    assert weights.weight_bytes > 0
    weights.restore(open_memory(), 1)
    assert script(torch.tensor([1.0, 1.0])).tolist() == [3, 7]


def test_a_frozen_script_module_within_plain_objects_moves_with_its_constants(
    arena: Arena,
) -> None:
    linear = torch.nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.zero_()
    with pytest.warns(DeprecationWarning, match="jit"):
        frozen = torch.jit.freeze(torch.jit.script(linear.eval()))
    root = SimpleNamespace(layers=[{"frozen": frozen}])
    weights = TorchWeights(root, arena)
    # Its weight and its bias, which are parameters no more.
    assert weights.weight_bytes == 2 * 512
    weights.restore(open_memory(), 1)
    assert frozen(torch.tensor([1.0, 1.0])).tolist() == [3, 7]
    assert weights.offload().message == ""
    # Nothing but the arena holds the values: without it they are gone.
    weights.release()
    assert frozen(torch.tensor([1.0, 1.0])).tolist() == [0, 0]
