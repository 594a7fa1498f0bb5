"""An ONNX model of one matrix, and batches that make ONNX Runtime's arena grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

ROWS = 1024
BATCHES = (1, 512, 32)


def write_matmul(path: Path, size_bytes: int, rows: int = ROWS) -> None:
    """Write ``output = input @ weight`` with a weight of ``size_bytes``, all ones."""
    import onnx  # noqa: PLC0415 - may be missing
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - may be missing

    columns = size_bytes // (rows * 4)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "matmul",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(np.ones((rows, columns), np.float32), "weight")],
    )
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
