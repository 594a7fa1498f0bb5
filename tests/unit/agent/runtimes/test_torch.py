"""Modules in every form of file, through the arena; what is taken, given and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vram_agent.backend import Tensor, TensorSpec
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import Runtime
from vram_agent.runtimes.torch_sources import ExportCallee, retarget
from vram_agent.runtimes.torch_tensors import from_torch, name_outputs, to_torch
from vram_agent.runtimes.torch_weights import build, read_state

from tests.models import tiny_torch
from tests.unit.agent.runtimes.hosting import (
    hosted,
    infer,
    load_only,
    move_away_and_back,
    tensor,
)

pytestmark = [
    # TorchScript is deprecated, and its files are what users have.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # torch.export reads an archive's weights from bytes that cannot be written to.
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
X = tensor("x", tiny_torch.X)
AFFINE = "tests.models.tiny_torch:Affine"
DECLARED = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]


def values_of(result: Any) -> dict[str, Any]:
    dtypes = {"FP32": "<f4", "INT64": "<i8", "FP16": "<f2"}
    return {
        one.name: np.frombuffer(one.data, dtypes[one.datatype]).reshape(one.shape).tolist()
        for one in result.tensors
    }


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "save", "weight_floats"),
    [
        # Three places for weights: 3 x 2, one factor, two of the shift.
        pytest.param("scripted.pt", tiny_torch.save_scripted, 9, id="scripted"),
        pytest.param("frozen.pt", tiny_torch.save_frozen, 9, id="frozen: constants of the graph"),
        pytest.param("traced.pt", tiny_torch.save_traced, 9, id="traced: some are constants"),
        pytest.param("program.pt2", tiny_torch.save_exported, 9, id="exported: lifted constants"),
    ],
)
def test_a_file_answers_the_same_wherever_its_weights_are(
    tmp_path: Path, name: str, save: Callable[[Path], None], weight_floats: int
) -> None:
    save(tmp_path / name)
    with hosted(Runtime.TORCH, str(tmp_path / name)) as model:
        # Each has a place of 512 bytes in the arena, scalars of the graph too.
        assert model.weights.weight_bytes >= 3 * 512
        assert model.weights.weight_bytes % 512 == 0
        # More than once: graph executors optimise at the second call.
        for _ in range(3):
            first, second = infer(model, X).tensors
            y = np.frombuffer(first.data, "<f4").reshape(first.shape)
            assert y.tolist() == tiny_torch.Y
            assert np.frombuffer(second.data, "<f4").tolist() == tiny_torch.SUMS
            move_away_and_back(model)


def test_what_the_graph_of_a_frozen_module_holds_is_moved_and_not_copied(tmp_path: Path) -> None:
    tiny_torch.save_frozen(tmp_path / "m.pt", rows=64, columns=256)
    with hosted(Runtime.TORCH, str(tmp_path / "m.pt")) as model:
        assert model.weights.weight_bytes >= 64 * 256 * 4
        x = tensor("x", np.eye(64)[1:2])
        infer(model, x)
        model.weights.offload()
        # With the arena zeroed, forward finds zeros: it has no other copy. Only the shift, which
        # lies there too, is gone with it.
        model.weights._host.zero_()  # type: ignore[attr-defined]
        assert set(np.frombuffer(infer(model, x).tensors[0].data, "<f4")) == {0.0}


def test_an_exported_program_declares_itself(tmp_path: Path) -> None:
    tiny_torch.save_exported(tmp_path / "m.pt2")
    with hosted(Runtime.TORCH, str(tmp_path / "m.pt2")) as model:
        assert model.inputs == (TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),)
        assert model.outputs == (
            TensorSpec(name="output0", datatype="FP32", shape=(-1, 2)),
            TensorSpec(name="output1", datatype="FP32", shape=(-1,)),
        )
        with pytest.raises(BadInputError, match=r"must be x FP32 \[-1, 3\], not FP32 \[2, 2\]"):
            infer(model, tensor("x", np.zeros((2, 2))))


def test_what_a_graph_creates_is_created_where_the_weights_are(tmp_path: Path) -> None:
    tiny_torch.save_exported(tmp_path / "m.pt2")
    callee = ExportCallee(torch.export.load(tmp_path / "m.pt2"))
    module = callee._module
    # The meta device stands for any that is not the one of the export.
    retarget(module, torch.device("meta"))
    module.to("meta")
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to("meta"))
    y, sums = module(torch.empty(2, 3, device="meta"))
    assert (y.device.type, sums.device.type) == ("meta", "meta")
    assert sums.shape == (2,)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_factory_gets_its_weights_from_a_file(tmp_path: Path, name: str) -> None:
    tiny_torch.save_weights(tmp_path / name)
    weights = str(tmp_path / name)
    with hosted(Runtime.TORCH, AFFINE, weights=weights, inputs=DECLARED) as model:
        (tmp_path / name).unlink()
        for _ in range(2):
            found = values_of(infer(model, X))
            assert found == {"y": tiny_torch.Y, "sums": tiny_torch.SUMS}
            move_away_and_back(model)


def test_a_factory_without_weights_keeps_its_own() -> None:
    with hosted(Runtime.TORCH, AFFINE, arguments={"columns": 1}) as model:
        assert values_of(infer(model, X))["y"] == [[100.0], [100.0]]
        assert values_of(infer(model, X, tensor("more", [5.0])))["y"] == [[105.0], [105.0]]


def test_a_module_is_made_without_data_where_that_works(tmp_path: Path) -> None:
    devices: list[str] = []

    def make() -> torch.nn.Module:
        module = torch.nn.Linear(3, 2)
        devices.append(module.weight.device.type)
        return module

    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    module = build(make, state)
    assert devices == ["meta"]
    # The very tensors of the state dict.
    assert module.weight.data_ptr() == state["weight"].data_ptr()  # type: ignore[operator]


def test_a_module_that_needs_data_to_be_made_is_made_again_with_it() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))
            self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight * self.scale  # type: ignore[operator]

    module = build(Counting, {"weight": torch.tensor([1.0, 2.0])})
    assert module(torch.ones(2)).tolist() == [3.0, 6.0]


def test_tied_weights_stay_tied_and_what_a_task_writes_is_kept(tmp_path: Path) -> None:
    # As safetensors names it: once.
    torch.save({"down.weight": torch.eye(3) * 2, "calls": torch.tensor(0)}, tmp_path / "w.pt")
    with hosted(
        Runtime.TORCH, "tests.models.tiny_torch:Tied", weights=str(tmp_path / "w.pt")
    ) as model:
        # One weight of 36 bytes, one count.
        assert model.weights.weight_bytes == 2 * 512
        x = tensor("x", [[1.0, 0.0, 0.0]])
        assert values_of(infer(model, x)) == {"output0": [[4.0, 0.0, 0.0]], "output1": 1}
        move_away_and_back(model)
        assert values_of(infer(model, x))["output1"] == 2


def test_weights_are_cast_when_they_are_loaded_and_clients_keep_fp32(tmp_path: Path) -> None:
    tiny_torch.save_weights(tmp_path / "w.pt")
    options = {"weights": str(tmp_path / "w.pt"), "dtype": "bfloat16"}
    with hosted(Runtime.TORCH, AFFINE, **options) as model:
        module: Any = model._callee._module  # type: ignore[attr-defined]
        assert module.weight.dtype == torch.bfloat16
        (y, sums) = infer(model, X).tensors
        assert (y.datatype, sums.datatype) == ("FP32", "FP32")
        # bfloat16 has eight bits for these: 226 and 156 fit, and 346 does not.
        assert np.frombuffer(y.data, "<f4").tolist() == [120.0, 226.0, 156.0, 280.0]


# --- names ----------------------------------------------------------------------------------------


def test_inputs_and_outputs_have_the_names_that_the_options_give(tmp_path: Path) -> None:
    tiny_torch.save_traced(tmp_path / "m.pt")
    with hosted(
        Runtime.TORCH,
        str(tmp_path / "m.pt"),
        inputs=[{"name": "rows", "datatype": "FP32", "shape": [2, 3]}],
        outputs=[{"name": "first", "datatype": "FP32", "shape": [2, 2]}],
    ) as model:
        assert [spec.name for spec in (*model.inputs, *model.outputs)] == ["rows", "first"]
        assert values_of(infer(model, tensor("rows", tiny_torch.X))) == {"first": tiny_torch.Y}
        with pytest.raises(BadInputError, match="input x is unknown; it takes rows FP32") as caught:
            infer(model, X)
        assert caught.value.param == "x"


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        pytest.param([], "input x is missing; it takes x, more .optional.", id="missing"),
        pytest.param([X, tensor("z", [1.0])], "input z is unknown", id="unknown"),
        pytest.param(
            [Tensor(name="x", datatype="BYTES", shape=(1,), data=b"\0\0\0\0")],
            "BYTES are no tensor",
            id="texts",
        ),
        pytest.param(
            [Tensor(name="x", datatype="FP32", shape=(2,), data=b"\0\0\0\0")],
            "takes 8 bytes, not 4",
            id="too short",
        ),
    ],
)
def test_a_bad_input_is_named(tensors: list[Tensor], match: str) -> None:
    with (
        hosted(Runtime.TORCH, AFFINE) as model,
        pytest.raises(BadInputError, match=match),
    ):
        infer(model, *tensors)


def test_too_few_outputs_are_the_models_fault() -> None:
    named = [{"name": f"n{index}", "datatype": "FP32", "shape": [-1]} for index in range(3)]
    with (
        hosted(Runtime.TORCH, AFFINE, outputs=named) as model,
        pytest.raises(ValueError, match="forward returned y, sums, and the outputs are n0, n1, n2"),
    ):
        infer(model, X)


def test_outputs_are_named_by_their_structure() -> None:
    found = {"a": 1, "b": (2, {"c": 3}), "none": None}
    assert dict(name_outputs(found)) == {"a": 1, "b.0": 2, "b.1.c": 3}
    assert dict(name_outputs([4, [5, 6]])) == {"output0": 4, "output1.0": 5, "output1.1": 6}
    assert dict(name_outputs(7)) == {"output": 7}


def test_bfloat16_travels_as_its_bits() -> None:
    one = Tensor(name="x", datatype="BF16", shape=(2,), data=b"\x80\x3f\x00\xc0")
    assert to_torch(one).tolist() == [1.0, -2.0]
    assert from_torch("x", to_torch(one)) == one
    with pytest.raises(TypeError, match="complex64"):
        from_torch("x", torch.ones(1, dtype=torch.complex64))


# --- refused --------------------------------------------------------------------------------------


class Opener:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_is_refused_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2), "x": Opener()}, tmp_path / "w.pt")
    with pytest.raises(ModelFailedError, match="allowPickle"):
        load_only(Runtime.TORCH, AFFINE, weights=str(tmp_path / "w.pt"))
    assert not Path("ran").exists()
    with pytest.raises(ModelFailedError, match="no state dict"):
        load_only(Runtime.TORCH, AFFINE, weights=str(tmp_path / "w.pt"), allowPickle=True)
    assert Path("ran").exists()


def test_an_archive_with_a_pickle_inside_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.export.load would run it: it falls back to plain pickle for the sample inputs."""
    import zipfile  # noqa: PLC0415 - one test of many

    monkeypatch.chdir(tmp_path)
    tiny_torch.save_exported(tmp_path / "good.pt2")
    torch.save(((Opener(),), {}), tmp_path / "bad.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt2") as good,
        zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad,
    ):
        for name in good.namelist():
            data = good.read(name)
            is_sample = "sample_inputs" in name
            bad.writestr(name, (tmp_path / "bad.pt").read_bytes() if is_sample else data)
    with pytest.raises(ModelFailedError, match=r"sample_inputs.*allowPickle"):
        load_only(Runtime.TORCH, str(tmp_path / "bad.pt2"))
    assert not Path("ran").exists()


def test_a_state_dict_of_another_module_says_what_does_not_fit(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(5, 5), "other": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelFailedError, match=r"do not fit.*factor.*other.*size mismatch"):
        load_only(Runtime.TORCH, AFFINE, weights=str(tmp_path / "w.pt"))


def make_starred() -> torch.nn.Module:
    class Starred(torch.nn.Module):
        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            return x[0]

    return Starred()


@pytest.mark.parametrize(
    ("source", "options", "match"),
    [
        pytest.param(AFFINE, {"dtype": "float8"}, "float16, bfloat16 or float32", id="dtype"),
        pytest.param(AFFINE, {"inputs": ["x"]}, "list of {name, datatype, shape}", id="inputs"),
        pytest.param(AFFINE, {"weigths": "x"}, "did you mean weights", id="misspelt"),
        pytest.param(AFFINE, {"weights": "/none.pt"}, "there is no file /none.pt", id="no weights"),
        pytest.param(
            AFFINE,
            {"inputs": [{"name": n, "datatype": "FP32", "shape": []} for n in "abc"]},
            "inputs names a, b, c, and forward takes x, more",
            id="too many inputs",
        ),
        pytest.param(
            AFFINE,
            {"inputs": [{"name": "more", "datatype": "FP32", "shape": []}]},
            "inputs names more, and forward takes x",
            id="one is left out",
        ),
        pytest.param("json:JSONDecoder", {}, "JSONDecoder, and no torch.nn", id="no module"),
        pytest.param(f"{__name__}:make_starred", {}, r"takes \*x", id="no names"),
        pytest.param("/none.pt", {}, "there is no file /none.pt", id="no file"),
    ],
)
def test_what_cannot_be_served_says_why(source: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelFailedError, match=match) as caught:
        load_only(Runtime.TORCH, source, **options)
    assert caught.value.message.startswith("model m: ")


def test_options_of_a_factory_are_refused_for_a_file(tmp_path: Path) -> None:
    tiny_torch.save_scripted(tmp_path / "m.pt")
    with pytest.raises(ModelFailedError, match="option weights is for a source module:factory"):
        load_only(Runtime.TORCH, str(tmp_path / "m.pt"), weights="x.pt")


def test_a_file_of_an_unreadable_form_names_what_to_do(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(ModelFailedError, match=r"torch.save.*options.weights"):
        load_only(Runtime.TORCH, str(tmp_path / "state.pt"))
    (tmp_path / "junk.pt2").write_bytes(b"junk")
    with pytest.raises(ModelFailedError, match="neither TorchScript nor"):
        load_only(Runtime.TORCH, str(tmp_path / "junk.pt2"))
    (tmp_path / "w.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelFailedError, match="cannot be read"):
        load_only(Runtime.TORCH, AFFINE, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "save"),
    [("m.pt", tiny_torch.save_traced), ("m.pt2", tiny_torch.save_exported)],
)
def test_a_file_that_is_damaged_inside_cannot_be_read(
    tmp_path: Path, name: str, save: Callable[[Path], None]
) -> None:
    save(tmp_path / name)
    damaged = bytearray((tmp_path / name).read_bytes())
    # The zip's directory, at the end, is whole, and what it leads to is not.
    damaged[200 : len(damaged) // 2] = b"?" * (len(damaged) // 2 - 200)
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ModelFailedError, match=r"cannot be read \(\w+.*copy the file again"):
        load_only(Runtime.TORCH, str(tmp_path / name))


def test_old_files_of_torch_save_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "w.pt", allow_pickle=False)["w"].tolist() == [1.0]
