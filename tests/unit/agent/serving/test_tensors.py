from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pytest
from vram_agent.backend import Tensor
from vram_agent.errors import BadInputError
from vram_agent.serving.answers import json_answer
from vram_agent.serving.tensors import from_binary, to_binary, to_list, to_tensor

LITTLE_ENDIAN = [
    pytest.param("BOOL", [True, False], "0100", id="BOOL"),
    pytest.param("UINT8", [0, 255], "00ff", id="UINT8"),
    pytest.param("UINT16", [1, 65535], "0100ffff", id="UINT16"),
    pytest.param("UINT32", [1, 4294967295], "01000000ffffffff", id="UINT32"),
    pytest.param("UINT64", [2**64 - 1], "ff" * 8, id="UINT64"),
    pytest.param("INT8", [-1, -128], "ff80", id="INT8"),
    pytest.param("INT16", [-2, 258], "feff0201", id="INT16"),
    pytest.param("INT32", [-1, 2**31 - 1], "ffffffffffffff7f", id="INT32"),
    pytest.param("INT64", [-(2**63)], "0000000000000080", id="INT64"),
    pytest.param("FP16", [1.0, -2.5, 65504.0], "003c00c1ff7b", id="FP16"),
    pytest.param("FP32", [1.0, -2.5], "0000803f000020c0", id="FP32"),
    pytest.param("FP64", [1.0], "000000000000f03f", id="FP64"),
    pytest.param("BYTES", ["ab", ""], "02000000616200000000", id="BYTES"),
]


@pytest.mark.parametrize(("datatype", "data", "expected"), LITTLE_ENDIAN)
def test_json_becomes_little_endian_bytes_and_back(
    datatype: str, data: list[Any], expected: str
) -> None:
    tensor = to_tensor("x", datatype, [len(data)], data)
    assert bytes(tensor.data).hex() == expected
    assert to_list(tensor) == data


@pytest.mark.parametrize(("datatype", "data", "raw"), LITTLE_ENDIAN)
def test_binary_data_pass_as_they_are_and_mean_the_same_as_json(
    datatype: str, data: list[Any], raw: str
) -> None:
    view = memoryview(bytes.fromhex(raw))
    tensor = from_binary("x", datatype, [len(data)], view)
    assert tensor.data is view
    assert to_binary(tensor) == view
    assert to_list(tensor) == data


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "reason"),
    [
        pytest.param("FP32", [2], "00" * 7, "takes 8 bytes, binary_data_size is 7", id="a byte"),
        pytest.param("FP16", [1, 2], "00" * 8, "takes 4 bytes", id="twice the size"),
        pytest.param("INT8", [2**40, 2**40], "00", "takes 1208925819614629174706176", id="huge"),
        pytest.param("INT8", [], "", "takes 1 bytes", id="a scalar without a byte"),
        pytest.param("INT8", [-1], "00", "0 or more", id="a free dimension"),
        pytest.param("INT8", [1] * 33, "00", "at most 32", id="too many dimensions"),
        pytest.param("BF16", [1], "803f", "BF16 is not carried", id="BF16"),
        pytest.param("FLOAT", [1], "00", "'FLOAT' is not one of", id="unknown datatype"),
        pytest.param("BYTES", [2], "0100000061", "needs 2 elements.*has 1", id="too few texts"),
        pytest.param("BYTES", [1], "00000000" * 2, "needs 1 elements.*has 2", id="too many texts"),
        pytest.param("BYTES", [1], "0200000061", "breaks off within one", id="a text cut off"),
        pytest.param("BYTES", [1], "ffffffff61", "breaks off within one", id="a length that lies"),
        pytest.param("BYTES", [1], "010000", "breaks off within one", id="a length cut off"),
    ],
)
def test_binary_data_that_are_wrong_are_refused_with_the_reason(
    datatype: str, shape: list[int], raw: str, reason: str
) -> None:
    with pytest.raises(BadInputError, match=reason) as caught:
        from_binary("x", datatype, shape, memoryview(bytes.fromhex(raw)))
    assert caught.value.message.startswith("input x")


def test_an_empty_tensor_is_no_fault() -> None:
    for datatype in ("FP32", "BYTES", "BOOL"):
        tensor = from_binary("x", datatype, [0, 3], memoryview(b""))
        assert (to_list(tensor), to_binary(tensor).nbytes) == ([], 0)


def test_large_numbers_that_a_datatype_holds_are_in_its_range_all_together() -> None:
    assert to_list(to_tensor("x", "FP64", [2], [1e308, 1e308])) == [1e308, 1e308]


def test_whole_numbers_are_floats_where_the_datatype_is() -> None:
    assert to_list(to_tensor("x", "FP32", [2], [1, 2])) == [1.0, 2.0]


def test_nested_data_is_flattened_in_c_order() -> None:
    tensor = to_tensor("x", "INT8", [2, 1, 3], [[[1, 2, 3]], [[4, 5, 6]]])
    assert (tensor.shape, bytes(tensor.data)) == ((2, 1, 3), bytes([1, 2, 3, 4, 5, 6]))


def test_flat_data_may_have_many_dimensions() -> None:
    assert to_tensor("x", "INT8", [2, 2], [1, 2, 3, 4]).shape == (2, 2)


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        pytest.param([0], [], id="no elements"),
        pytest.param([2, 0], [[], []], id="nested and empty"),
        pytest.param([], [7], id="a scalar"),
    ],
)
def test_odd_shapes_that_are_right(shape: list[int], data: list[Any]) -> None:
    assert to_tensor("x", "INT8", shape, data).shape == tuple(shape)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "reason"),
    [
        pytest.param("FP32", [3], [1.0, 2.0], "needs 3 elements, data has 2", id="too few"),
        pytest.param("FP32", [1], [1.0, 2.0], "needs 1 elements, data has 2", id="too many"),
        pytest.param("FP32", [2, 2], [[1, 2], [3]], "in dimension 1", id="ragged"),
        pytest.param("FP32", [2, 2], [[1, 2], 3], "in dimension 1", id="half nested"),
        pytest.param("FP32", [2], [1, [2]], "no element of datatype", id="nested at the end"),
        pytest.param("FP32", [1], [[[1]]], "no element of datatype", id="nested too deep"),
        pytest.param("FP32", [-1], [1], "0 or more", id="a free dimension"),
        pytest.param("FP32", [1] * 33, [1], "at most 32", id="too many dimensions"),
        pytest.param("FP32", [1], [None], "'None' is no element", id="null"),
        pytest.param("FP32", [1], [True], "'True' is no element", id="a boolean as number"),
        pytest.param("FP32", [1], ["1"], "'1' is no element", id="a text as number"),
        pytest.param("FP32", [1], [1e39], "out of the range of FP32", id="too large for FP32"),
        pytest.param("FP64", [1], [10**400], "out of the range of FP64", id="too large for FP64"),
        pytest.param("INT32", [1], [1.5], "no element of datatype INT32", id="a fraction"),
        pytest.param("UINT8", [1], [256], "out of the range of UINT8", id="too large"),
        pytest.param("UINT8", [1], [-1], "out of the range of UINT8", id="negative"),
        pytest.param("BOOL", [1], [1], "no element of datatype BOOL", id="a number as boolean"),
        pytest.param("BYTES", [1], [1], "no element of datatype BYTES", id="a number as text"),
        pytest.param("FP16", [1], [65520], "out of the range of FP16", id="too large for FP16"),
        pytest.param("BF16", [1], [1], "BF16 is not carried.*use FP32", id="BF16"),
        pytest.param("FLOAT", [1], [1], "'FLOAT' is not one of BOOL, UINT8", id="unknown datatype"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(
    datatype: str, shape: list[int], data: list[Any], reason: str
) -> None:
    with pytest.raises(BadInputError, match=reason) as caught:
        to_tensor("x", datatype, shape, data)
    assert caught.value.message.startswith("input x")


def test_floats_that_json_lacks_become_null_in_answers() -> None:
    data = struct.pack("<3f", math.nan, math.inf, 0.5)
    elements = to_list(Tensor(name="y", datatype="FP32", shape=(3,), data=data))
    body = json_answer({"data": elements}).body
    assert isinstance(body, bytes)
    assert msgspec.json.decode(body) == {"data": [None, None, 0.5]}


@pytest.mark.parametrize(
    ("datatype", "data", "reason"),
    [
        pytest.param("INT8", b"\x01", "has 1 elements, its shape is", id="too few"),
        pytest.param("INT16", b"\x01\0\0", "3 bytes, which is no whole number", id="a half"),
        pytest.param("BYTES", b"\x09\0\0\0", "no whole number of elements", id="a text cut off"),
    ],
)
def test_an_output_whose_bytes_do_not_fit_its_shape_is_the_runtime_s_fault(
    datatype: str, data: bytes, reason: str
) -> None:
    tensor = Tensor(name="y", datatype=datatype, shape=(2,), data=data)
    for write in (to_list, to_binary):
        with pytest.raises(ValueError, match=reason):
            write(tensor)


def test_a_text_that_json_cannot_carry_is_refused_and_how_to_get_it_said() -> None:
    tensor = Tensor(name="y", datatype="BYTES", shape=(1,), data=b"\1\0\0\0\xff")
    with pytest.raises(BadInputError, match=r"output y.*no UTF-8.*binary_data"):
        to_list(tensor)
    assert bytes(to_binary(tensor)) == b"\1\0\0\0\xff"
