"""Tensors of the public API: every array comes back, and bad bytes raise only `WireError`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.wire.arrays import decode, encode
from ray_moe.wire.v1 import inference_pb2 as pb

DTYPES = st.sampled_from(["<f8", "<f4", "<f2", ">f8", ">f4", ">f2", "<i8", "<i4", ">i8", ">i4"]).map(np.dtype)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@settings(deadline=None)
@given(DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)))
def test_every_array_comes_back(array: NDArray[Any]) -> None:
    for sent in (array, array.T, array[..., ::-1] if array.ndim else array):
        back = decode(pb.Tensor.FromString(encode(sent).SerializeToString()))
        assert back.dtype == sent.dtype.newbyteorder("=")
        assert back.shape == sent.shape
        assert back.flags.writeable
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, sent)


@settings(deadline=None)
@given(
    dtype=st.integers(-1, 8),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 5), max_size=10),
    data=st.binary(max_size=64),
    fit=st.booleans(),
)
def test_bad_tensors_raise_only_wire_error(dtype: Any, shape: list[int], data: bytes, fit: bool) -> None:
    tensor = pb.Tensor(dtype=dtype, shape=[0, *shape] if fit else shape, data=b"" if fit else data)
    try:
        array = decode(tensor, name="hidden")
    except WireError as error:
        assert "hidden" in error.message
    else:
        assert array.shape == tuple(tensor.shape)
        assert array.size * (2 if dtype == pb.DTYPE_BF16 else array.itemsize) == len(tensor.data)


@settings(deadline=None)
@given(hnp.arrays(np.uint32, 64))
def test_bfloat16_rounds_as_torch_does(bits: NDArray[np.uint32]) -> None:
    array = bits.view(np.float32)
    expected = torch.from_numpy(array.copy()).to(torch.bfloat16)
    tensor = encode(array, pb.DTYPE_BF16)
    back = decode(tensor)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, expected.float().numpy())
    again = encode(back, pb.DTYPE_BF16)  # what is bfloat16 already stays as it is
    np.testing.assert_array_equal(decode(again), back)


def test_results_travel_in_the_dtype_asked_for() -> None:
    array = np.array([[1.5, 1e6, -0.0]], np.float32)
    np.testing.assert_array_equal(decode(encode(array, pb.DTYPE_F16)), np.array([[1.5, np.inf, -0.0]], np.float16))
    assert decode(encode(array, pb.DTYPE_F64)).dtype == np.float64


@pytest.mark.parametrize("array", [np.zeros(2, bool), np.zeros(2, np.uint8), np.zeros(2, complex), np.array(["a"])])
def test_dtypes_off_the_wire_are_refused(array: NDArray[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"hidden has dtype .*; expected one of float64, float32"):
        encode(array, name="hidden")


def test_what_no_message_can_hold_is_refused() -> None:
    array = np.broadcast_to(np.float32(0), (2**20, 2**10))
    with pytest.raises(InvalidRequest, match=r"4,294,967,296 bytes; a message holds .*: send it in parts"):
        encode(array, name="hidden")
