"""Fuzzing of what router and host send each other, and of the frames it travels in. See `fuzzing.py`."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import RayMoEError, WireError
from ray_moe.transport import codec, frames
from ray_moe.wire import tensors
from tests.unit.service.hostile.fuzzing import INT64, TEXTS, fuzz

INTEGERS = st.lists(st.integers(0, 6) | st.integers(0, 2**32 - 1), max_size=4).map(
    lambda it: struct.pack(f"<{len(it)}I", *it)
)
CALL_FIELDS = st.tuples(
    st.just("layer") | st.text(max_size=5) | st.none(),
    INT64 | st.booleans(),
    INTEGERS | st.binary(max_size=9),
    INTEGERS | st.none(),
    st.text(max_size=5) | st.binary(max_size=3),
).map(list)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64])


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], list[torch.Tensor | None]]:
    """Fields and tensors of a call; half of them of the kinds that a call has."""
    rows, tokens = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    if draw(st.booleans()):
        shapes = [(tokens, 4), (rows,), (rows,), (rows, 4)]
        kinds = [torch.float32, torch.int32, torch.float32, torch.float32]
        fields: list[Any] = ["layer", 1, struct.pack("<I", 0), struct.pack("<I", rows), ""]
    else:
        shapes = [tuple(draw(st.lists(st.integers(0, 4), max_size=3))) for _ in range(draw(st.integers(0, 5)))]
        kinds = [draw(DTYPES) for _ in shapes]
        fields = draw(CALL_FIELDS)
    contents = [
        None if draw(st.integers(0, 5)) == 0 else torch.full(shape, draw(st.integers(-2, 3)), dtype=kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    return fields, contents


@fuzz
@given(calls(), st.data())
def test_a_call_between_processes_is_refused_or_consistent(
    call: tuple[list[Any], list[torch.Tensor | None]], data: st.DataObject
) -> None:
    buffers, _ = tensors.encode(*call)
    sent = bytearray(b"".join(buffers))
    for _ in range(data.draw(st.sampled_from([0, 0, 1, 2]))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    try:
        fields, specs, region = tensors.decode(sent)
        read = codec.read_call(fields, specs, tensors.tensors_in(region, specs))
    except WireError as error:
        assert error.message
    else:
        assert len(read.experts) == len(read.counts)
        assert read.token is None or len(read.token) == read.num_rows
        assert read.token is None or not len(read.token) or int(read.token.max()) < len(read.hidden)
        assert read.tokens().shape == read.hidden.shape


@fuzz
@given(
    st.lists(st.integers(-1, 4) | st.none() | TEXTS | st.lists(st.integers(), max_size=2), max_size=4),
    st.lists(
        st.none() | st.builds(tensors.make_spec, DTYPES, st.lists(st.integers(0, 3), max_size=3).map(tuple)), max_size=3
    ),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_reply_between_processes_is_refused_or_fits(
    fields: list[Any], specs: list[Any], num_rows: int, packed: bool
) -> None:
    try:
        rows, _ = codec.read_reply(fields, specs, codec.Wanted(num_rows, packed))
    except RayMoEError as error:
        assert isinstance(error, WireError) or fields[0] == codec.FAILED
    else:
        assert rows.shape[0] == num_rows and (rows.dtype is torch.uint8 if packed else rows.dtype.is_floating_point)


@fuzz
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 40) | st.integers(0, 2**64 - 1), st.binary(max_size=20)), max_size=8
    ),
    st.lists(st.binary(max_size=30), max_size=2),
)
def test_frames_are_refused_or_put_together(parts: list[tuple[int, int, bytes]], noise: list[bytes]) -> None:
    assembler = frames.Assembler(1000)
    sent = dict.fromkeys(range(3), b"")
    with contextlib.suppress(WireError):
        for message_id, num_bytes, part in parts:
            done = assembler.feed(struct.pack("<QQ", message_id, num_bytes) + part)
            sent[message_id] += part
            if done is not None:
                assert done[0] == message_id
                assert bytes(done[1]) == sent[message_id]
                assert len(done[1]) == num_bytes
                sent[message_id] = b""
        for frame in noise:
            assembler.feed(frame)
