"""Tensors of the protocol as arrays, and faults named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vram_agent.backend import Tensor
from vram_agent.errors import BadInputError
from vram_agent.runtimes.arrays import as_array, as_tensor, read_audio


def tensor(datatype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    return Tensor(name="x", datatype=datatype, shape=shape, data=data)


@pytest.mark.parametrize(
    ("datatype", "data", "value"),
    [
        ("FP32", b"\x00\x00\x80\x3f", 1.0),
        ("FP16", b"\x00\x3c", 1.0),
        ("INT64", b"\xff" * 8, -1),
        ("UINT16", b"\x01\x02", 513),
        ("BOOL", b"\x01", True),
        ("BYTES", b"\x02\x00\x00\x00hi", b"hi"),
    ],
)
def test_data_is_little_endian(datatype: str, data: bytes, value: object) -> None:
    array = as_array(tensor(datatype, (1,), data))
    assert array.tolist() == [value]
    back = as_tensor("x", array)
    assert (back.datatype, back.shape, bytes(back.data)) == (datatype, (1,), data)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        pytest.param(tensor("FP32", (2,), b"1234"), "takes 8 bytes, not 4", id="too short"),
        pytest.param(tensor("FP31", (1,), b"1234"), "FP31 is unknown", id="unknown datatype"),
        pytest.param(tensor("FP32", (-1,), b""), "negative", id="negative dimension"),
        pytest.param(tensor("BYTES", (2,), b"\1\0\0\0a"), "needs 2 elements", id="too few texts"),
        pytest.param(tensor("BYTES", (1,), b"\xff\0\0\0a"), "needs 1 elements", id="text cut off"),
        pytest.param(tensor("BYTES", (1,), b"\1\0"), "needs 1 elements", id="length cut off"),
    ],
)
def test_what_does_not_agree_is_the_callers_fault(bad: Tensor, match: str) -> None:
    with pytest.raises(BadInputError, match=match) as caught:
        as_array(bad)
    assert caught.value.param == "x"


@given(
    hnp.arrays(
        st.sampled_from([np.dtype(code) for code in ("<f4", ">f4", "<i8", "u1", "?", ">u2")]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_arrays_come_back_as_they_were(array: np.ndarray[Any, Any]) -> None:
    back = as_array(as_tensor("x", array))
    assert back.shape == array.shape
    assert back.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


@given(st.lists(st.binary(max_size=10), max_size=5))
def test_texts_come_back_as_they_were(texts: list[bytes]) -> None:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    assert as_array(as_tensor("x", array)).tolist() == texts


def test_texts_of_python_are_utf8() -> None:
    assert bytes(as_tensor("x", np.array(["é"])).data) == b"\x02\x00\x00\x00\xc3\xa9"


def test_a_dtype_without_a_datatype_is_named() -> None:
    with pytest.raises(TypeError, match="complex128"):
        as_tensor("x", np.array([1j]))


def test_audio_must_be_there_and_flat() -> None:
    audio = np.zeros(3, np.float32)
    good = Tensor(name="audio", datatype="FP32", shape=(3,), data=audio.tobytes())
    assert read_audio([good]).shape == (3,)
    with pytest.raises(BadInputError, match="no tensor audio"):
        read_audio([])
    stereo = Tensor(name="audio", datatype="FP32", shape=(1, 3), data=audio.tobytes())
    with pytest.raises(BadInputError, match=r"not FP32 of shape \[1, 3\]"):
        read_audio([stereo])
