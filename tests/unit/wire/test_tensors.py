"""Tensors to bytes and back, and bytes that are not tensors."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import WireError
from ray_moe.wire import tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, so that NaNs and denormals must survive as well."""
    bits = torch.randint(0, 256, (torch.empty(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Bit by bit."""
    if left is None or right is None:
        return left is right
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype is right.dtype and left.shape == right.shape and torch.equal(*bits)


def message(fields: Any, *contents: torch.Tensor | None) -> bytes:
    buffers, num_bytes = tensors.encode(fields, contents)
    joined = b"".join(buffers)
    assert len(joined) == num_bytes
    return joined


def read(data: bytes | bytearray) -> tuple[list[Any], list[torch.Tensor | None]]:
    fields, specs, region = tensors.decode(data)
    return fields, tensors.tensors_in(region, specs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 7), (1, 1024), (2, 3, 4)])
def test_every_dtype_and_shape_comes_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random(dtype, *shape)
    fields, (back,) = read(message(["a", 1], tensor))
    assert fields == ["a", 1]
    assert same(back, tensor)


def test_several_tensors_lie_aligned_one_after_the_other() -> None:
    sent = (random(torch.bfloat16, 3, 5), None, random(torch.int32, 7), random(torch.float64, 0, 2), None)
    data = message([], *sent)
    assert len(data) % tensors.ALIGNMENT == 0
    _, back = read(data)
    assert all(same(left, right) for left, right in zip(back, sent, strict=True))


@pytest.mark.parametrize(
    "tensor", [torch.randn(4, 6).t(), torch.randn(8, 8)[::2, 1:5], torch.randn(3, requires_grad=True)]
)
def test_views_and_parameters_are_sent_by_value(tensor: torch.Tensor) -> None:
    _, (back,) = read(message([], tensor))
    assert back is not None
    assert not back.requires_grad
    assert same(back, tensor.detach())


def test_writable_memory_is_shared_and_read_only_memory_is_copied() -> None:
    data = bytearray(message([], torch.zeros(16)))
    _, (back,) = read(data)
    assert back is not None
    back.fill_(1)
    assert data[-1:] == b"\x3f"  # the last byte of 1.0

    frozen = bytes(data)
    _, (back,) = read(frozen)
    assert back is not None
    back.fill_(2)
    assert frozen[-1:] == b"\x3f"


def test_a_header_alone_says_what_lies_elsewhere() -> None:
    tensor = random(torch.bfloat16, 5, 3)
    spec = tensors.make_spec(tensor.dtype, tuple(tensor.shape))
    memory = bytearray(tensors.region_bytes([spec]))
    tensors.tensor_at(memory, 0, spec).copy_(tensor)
    fields, specs, region = tensors.decode(tensors.encode_header([7], [None, spec]))
    assert (fields, specs, len(region)) == ([7], [None, spec], 0)
    assert same(tensors.tensors_in(memory, specs)[1], tensor)


def test_a_dtype_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(WireError, match=r"torch.complex64 cannot be sent; these can: float64"):
        message([], torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(WireError, match=r"torch.bool cannot be sent"):
        tensors.encode_header([], [tensors.make_spec(torch.bool, (2,))])


def packed(fields: Any, specs: Any, region: bytes = b"") -> bytes:
    """A message whose header may be anything msgpack can say."""
    header = msgpack.packb((fields, specs))
    padding = bytes(-(4 + len(header)) % tensors.ALIGNMENT)
    return struct.pack("<I", len(header)) + header + padding + region


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack("<I", 2**32 - 1) + bytes(64),
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1" + bytes(64),
        packed({}, []),
        packed([], None),
        packed([], 5),
        packed([], {"float32": 1}),
        packed([], [[]]),
        packed([], [["float32", -1]]),
        packed([], [["float32", 1.0]]),
        packed([], [["float32", True]], bytes(64)),
        packed([], [["float32", "1"]]),
        packed([], [["float32", 2**41]]),
        packed([], [["float32", *[1] * 9]], bytes(64)),
        packed([], [["float32", 2**40, 2**40]]),
        packed([], [["float32", 0, *[2**40] * 7]]),
        packed([], [["complex64", 1]], bytes(64)),
        packed([], [[["float32"], 1]], bytes(64)),
        packed([], [[1, 1]], bytes(64)),
        packed([], [["float32", 17]], bytes(64)),
        packed([], [["float32", 16]], bytes(128)),
        packed([], [["float32", 16]], bytes(63)),
        packed([], [], bytes(64)),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        read(data)


def test_a_shape_that_was_seen_before_is_checked_again() -> None:
    """Shapes are remembered, and for Python 1 is 1.0 is True."""
    assert read(packed([], [["float32", 1]], bytes(64)))[1][0] is not None
    for one in (1.0, True):
        with pytest.raises(WireError):
            read(packed([], [["float32", one]], bytes(64)))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_read(data: bytes) -> None:
    with contextlib.suppress(WireError):
        read(data)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=9)
        | st.binary(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=12,
    ),
    st.binary(max_size=200),
)
def test_any_header_is_refused_or_read(header: Any, region: bytes) -> None:
    body = msgpack.packb(header)
    for data in (
        struct.pack("<I", len(body)) + body + bytes(-(4 + len(body)) % 64) + region,
        packed([], header, region),
        packed([], [header, ["int32", 3]], region),
    ):
        with contextlib.suppress(WireError):
            read(data)


@given(st.data())
def test_damaged_messages_are_refused_or_read(data: st.DataObject) -> None:
    good = message(["layer", 3, b"\1\0\0\0"], torch.zeros(2, 5), None, torch.zeros(3, dtype=torch.int32))
    damaged = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        read(bytes(damaged))


@given(
    st.lists(
        st.none()
        | st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)).map(
            lambda it: random(it[0], *it[1])
        ),
        max_size=5,
    )
)
def test_any_list_of_tensors_comes_back(contents: list[torch.Tensor | None]) -> None:
    _, back = read(message([], *contents))
    assert all(same(left, right) for left, right in zip(back, contents, strict=True))
