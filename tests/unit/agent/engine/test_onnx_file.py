"""An ONNX file's signature, read without ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from vram_agent.backend import TensorSpec
from vram_agent.engine.onnx_file import BrokenOnnxError, Signature, find_beside, read_signature

from tests import models


def value(name: str, kind: int, shape: list[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def read(model: onnx.ModelProto) -> Signature:
    return read_signature(memoryview(model.SerializeToString()))


def model_of(
    inputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto] | None = None,
    nodes: list[onnx.NodeProto] | None = None,
) -> onnx.ModelProto:
    out = value("y", TensorProto.FLOAT, [1])
    nodes = nodes or [helper.make_node("Identity", ["x"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, [out], initializers or []))


def test_a_real_model() -> None:
    assert read_signature(memoryview(models.DIGITS.read_bytes())) == Signature(
        inputs=(TensorSpec(name="audio", datatype="FP32", shape=(-1, 16000)),),
        outputs=(
            TensorSpec(name="probabilities", datatype="FP32", shape=(-1, 10)),
            TensorSpec(name="digit", datatype="INT64", shape=(-1,)),
        ),
        any_rank=frozenset(),
        external_files=(),
        metadata={},
    )


def test_what_its_maker_wrote_into_the_file() -> None:
    model = model_of([value("x", TensorProto.FLOAT, [1])])
    helper.set_model_props(model, {"character": "a\nb", "empty": ""})
    assert read(model).metadata == {"character": "a\nb", "empty": ""}


@pytest.mark.parametrize(
    ("kind", "datatype"),
    [
        (TensorProto.FLOAT16, "FP16"),
        (TensorProto.DOUBLE, "FP64"),
        (TensorProto.INT8, "INT8"),
        (TensorProto.UINT64, "UINT64"),
        (TensorProto.BOOL, "BOOL"),
        (TensorProto.STRING, "BYTES"),
    ],
)
def test_datatypes_are_those_of_the_protocol(kind: int, datatype: str) -> None:
    assert read(model_of([value("x", kind, [])])).inputs == (
        TensorSpec(name="x", datatype=datatype, shape=()),
    )


def test_a_shape_that_is_left_open_is_not_a_scalar() -> None:
    signature = read(model_of([value("x", TensorProto.FLOAT, None)]))
    assert signature.any_rank == {"x"}


def test_weights_that_old_files_list_as_inputs_are_none() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    inputs = [value("x", TensorProto.FLOAT, [1]), value("w", TensorProto.FLOAT, [1])]
    assert [one.name for one in read(model_of(inputs, [weight])).inputs] == ["x"]


def test_a_sequence_is_refused_by_name() -> None:
    info = helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, [1])
    with pytest.raises(BrokenOnnxError, match="many is no tensor"):
        read(model_of([info]))


def test_files_beside_the_model_are_named_once_also_within_branches() -> None:
    def external(name: str, file: str) -> onnx.TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=file)
        tensor.external_data.add(key="offset", value="0")
        return tensor

    branch = helper.make_graph([], "b", [], [], [external("c", "inner.bin")])
    condition = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    initializers = [external("a", "w.bin"), external("b", "w.bin")]
    model = model_of([value("x", TensorProto.BOOL, [1])], initializers, [condition])
    assert set(read(model).external_files) == {"w.bin", "inner.bin"}


def test_a_file_that_is_cut_off_anywhere_is_broken(tmp_path: Path) -> None:
    whole = model_of([value("x", TensorProto.FLOAT, [1])]).SerializeToString()
    read_signature(memoryview(whole))
    for length in range(len(whole) - 12):
        with pytest.raises(BrokenOnnxError):
            read_signature(memoryview(whole[:length]))


@given(st.binary(max_size=200))
def test_nothing_but_the_one_error_comes_of_junk(junk: bytes) -> None:
    try:
        signature = read_signature(memoryview(junk))
    except BrokenOnnxError:
        return
    # A graph of nothing at all is a message too.
    assert signature == Signature((), (), frozenset(), (), signature.metadata)


@pytest.mark.parametrize(
    ("name", "is_found"),
    [
        pytest.param("w.bin", True, id="beside the model"),
        pytest.param("parts/w.bin", True, id="in a folder there"),
        pytest.param("linked.bin", True, id="a link, as a hub's cache has"),
        pytest.param("../secret", False, id="in the folder above"),
        pytest.param("parts/../../secret", False, id="in the folder above, by a detour"),
        pytest.param("{above}/secret", False, id="an absolute path"),
        pytest.param("gone.bin", False, id="nowhere"),
    ],
)
def test_a_model_names_no_file_outside_of_its_folder(
    tmp_path: Path, name: str, is_found: bool
) -> None:
    folder = tmp_path / "model"
    (folder / "parts").mkdir(parents=True)
    for path in (folder / "w.bin", folder / "parts" / "w.bin", tmp_path / "secret"):
        path.write_bytes(b"x")
    (folder / "linked.bin").symlink_to(tmp_path / "secret")
    found = find_beside(folder / "m.onnx", name.format(above=tmp_path))
    assert (found is not None) == is_found
