"""What only ONNX has: weights in files beside the model, text inputs, and checked shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from vram_agent.backend import Task, TaskKind, Tensor, TensorSpec
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.processes.group import ProcessGroup
from vram_agent.protocol import ModelSpec, Runtime

from tests.conformance.cases import array_of, tensor


def save_with_weights_beside(path: Path) -> None:
    weight = np.arange(4_096, dtype=np.float32).reshape(2, 2_048)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2_048])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def spec(path: Path) -> ModelSpec:
    return ModelSpec(name="m", runtime=Runtime.ONNX, source=str(path))


async def test_weights_in_a_file_beside_the_model(group: ProcessGroup, tmp_path: Path) -> None:
    save_with_weights_beside(tmp_path / "m.onnx")
    loaded = await group.load(spec(tmp_path / "m.onnx"))
    assert loaded.weight_bytes > 16_384
    # In the arena from here on.
    (tmp_path / "weights.bin").unlink()
    await group.restore("m")
    x = np.array([[1, 1]], np.float32)
    result = await group.run("m", Task(kind=TaskKind.INFER, tensors=[tensor("x", x)]))
    assert array_of(result, "y")[0, :3].tolist() == [2048, 2050, 2052]


async def test_a_missing_file_beside_the_model_is_named(
    group: ProcessGroup, tmp_path: Path
) -> None:
    save_with_weights_beside(tmp_path / "m.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelFailedError, match=r"weights\.bin"):
        await group.load(spec(tmp_path / "m.onnx"))


async def test_texts_go_in_and_out(group: ProcessGroup, tmp_path: Path) -> None:
    texts = helper.make_tensor_value_info("x", TensorProto.STRING, None)
    out = helper.make_tensor_value_info("y", TensorProto.STRING, None)
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [texts], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    loaded = await group.load(spec(tmp_path / "m.onnx"))
    assert loaded.inputs == (TensorSpec(name="x", datatype="BYTES", shape=()),)
    await group.restore("m")
    data = b"\x02\0\0\0hi\x02\0\0\0" + "é".encode()
    given = Tensor(name="x", datatype="BYTES", shape=(2,), data=data)
    (back,) = (await group.run("m", Task(kind=TaskKind.INFER, tensors=[given]))).tensors
    assert (back.datatype, back.shape, bytes(back.data)) == ("BYTES", (2,), data)
    broken = Tensor(name="x", datatype="BYTES", shape=(1,), data=b"\x01\0\0\0\xff")
    with pytest.raises(BadInputError, match="UTF-8"):
        await group.run("m", Task(kind=TaskKind.INFER, tensors=[broken]))


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        pytest.param([], r"input x is missing; it takes x FP32 \[-1, 2\]", id="missing"),
        pytest.param([tensor("z", np.zeros(2, np.float32))], "input z is unknown", id="unknown"),
        pytest.param([tensor("x", np.zeros((1, 3), np.float32))], r"not FP32 \[1, 3\]", id="shape"),
        pytest.param([tensor("x", np.zeros((1, 2), np.int64))], "not INT64", id="datatype"),
        pytest.param([tensor("x", np.zeros(2, np.float32))], r"not FP32 \[2\]", id="rank"),
    ],
)
async def test_inputs_are_checked_against_the_file(
    group: ProcessGroup, tmp_path: Path, tensors: list[Tensor], match: str
) -> None:
    save_with_weights_beside(tmp_path / "m.onnx")
    await group.load(spec(tmp_path / "m.onnx"))
    await group.restore("m")
    with pytest.raises(BadInputError, match=match):
        await group.run("m", Task(kind=TaskKind.INFER, tensors=tensors))
