"""Tensors as bytes: what is written is read again, and no bytes raise anything but errors of ours."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ray_moe.errors import InvalidRequest
from ray_moe.service.kserve.catalog import Model, TensorInfo
from ray_moe.service.kserve.tensors import Output, read_inputs, texts, write_output
from ray_moe.wire.kserve import grpc_service_pb2 as pb

DTYPES = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BF16": np.float32, "INT64": np.int64}
EVERY = ("BOOL", "INT32", "INT64", "UINT32", "UINT64", "FP16", "BF16", "FP32", "FP64", "BYTES")
MODEL = Model("m", (TensorInfo("x", "FP32", (-1, -1), optional=False, also=EVERY),), ())


def read(response: pb.ModelInferResponse) -> Any:
    """The first output of a response, read as an input."""
    (output,) = response.outputs
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=output.datatype, shape=output.shape)
    if output.HasField("contents"):
        tensor.contents.CopyFrom(output.contents)
    return read_inputs(pb.ModelInferRequest(inputs=[tensor], raw_input_contents=response.raw_output_contents), MODEL)[
        "x"
    ].array


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, Any]:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    array = draw(hnp.arrays(DTYPES[datatype], hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=5)))
    if datatype == "BF16":  # the upper halves of float32 numbers
        array = (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        array = np.where(np.isnan(array), np.float32(1), array)
    return datatype, array


@settings(max_examples=50, deadline=None)
@given(matrices(), st.booleans())
def test_numbers_are_read_as_they_were_written(matrix: tuple[str, Any], raw: bool) -> None:
    datatype, array = matrix
    response = pb.ModelInferResponse()
    write_output(response, Output("x", datatype, array), raw or datatype in ("FP16", "BF16"))
    again = read(response)
    assert again.shape == array.shape
    np.testing.assert_array_equal(again, array)
    assert again.flags.c_contiguous
    assert again.flags.writeable or not again.size


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), max_size=5), st.booleans())
def test_texts_are_read_as_they_were_written(words: list[str], raw: bool) -> None:
    encodable = [word.encode(errors="replace") for word in words]
    response = pb.ModelInferResponse()
    write_output(response, Output("x", "BYTES", texts(*words).reshape(1, -1)), raw)
    assert read(response).tolist() == [encodable]


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([*EVERY, "FP8", ""]),
    st.lists(st.integers(-1, 3) | st.integers(-(2**63), 2**63 - 1), max_size=3),
    st.lists(st.binary(max_size=40) | st.builds(lambda n: struct.pack("<I", n), st.integers(0, 9)), max_size=2),
)
def test_any_bytes_are_read_or_refused(datatype: str, shape: list[int], raw: list[bytes]) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=shape)
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=raw)
    try:
        assert list(read_inputs(request, MODEL)["x"].array.shape) == shape
    except InvalidRequest as error:
        assert error.message


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT32", "int_contents", [-(2**31), 5]),
        ("UINT32", "uint_contents", [2**32 - 1, 0]),
        ("UINT64", "uint64_contents", [2**64 - 1, 0]),
    ],
)
def test_datatypes_of_settings_have_typed_and_raw_contents(datatype: str, field: str, values: list[Any]) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="x", datatype=datatype, shape=[1, 2], contents=pb.InferTensorContents(**{field: values})
    )
    typed = read_inputs(pb.ModelInferRequest(inputs=[tensor]), MODEL)["x"].array
    assert typed.tolist() == [values]
    tensor.ClearField("contents")
    data = typed.astype(typed.dtype.newbyteorder("<")).tobytes()
    again = read_inputs(pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[data]), MODEL)["x"].array
    assert again.tolist() == [values]
