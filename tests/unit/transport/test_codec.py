"""Calls, replies and failures as fields and tensors; and what is refused on reading."""

from __future__ import annotations

from array import array
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import ExpertFailed, HostLost, RayMoEError, StaleRouting, WireError
from ray_moe.ops.compression import pack_rows
from ray_moe.transport import codec
from ray_moe.transport.base import ExpertCall
from ray_moe.wire import tensors


def example(**changes: Any) -> ExpertCall:
    call = ExpertCall(
        layer="model.layers.0.mlp.experts",
        epoch=3,
        hidden=torch.randn(9, 4),
        gather=torch.tensor([8, 1, 1]),
        token=torch.tensor([0, 2, 1, 2], dtype=torch.int32),
        experts=[1, 2**31],
        counts=[3, 1],
        weight=torch.rand(4),
        grad=torch.randn(4, 4),
        call_id="step-1",
    )
    for name, value in changes.items():
        setattr(call, name, value)
    return call


def through_bytes(call: ExpertCall) -> ExpertCall:
    buffers, _ = tensors.encode(codec.call_fields(call), codec.call_tensors(call))
    fields, specs, region = tensors.decode(b"".join(buffers))
    assert specs == codec.call_specs(call)
    return codec.read_call(fields, specs, tensors.tensors_in(region, specs))


def through_memory(call: ExpertCall) -> ExpertCall:
    specs = codec.call_specs(call)
    views = tensors.tensors_in(bytearray(tensors.region_bytes(specs)), specs)
    codec.write_call(call, views)
    fields = msgpack.unpackb(msgpack.packb(codec.call_fields(call)))
    return codec.read_call(fields, specs, views)


PACKED = pack_rows(torch.randn(9, 4))


@pytest.mark.parametrize("through", [through_bytes, through_memory])
@pytest.mark.parametrize(
    "call",
    [
        example(),
        example(gather=None, token=torch.tensor([8, 0, 1, 1], dtype=torch.int32)),
        example(weight=None, grad=None),
        example(token=None, counts=[3, 0], weight=None, grad=None),
        example(hidden=torch.randn(9, 4, requires_grad=True), weight=torch.rand(4, requires_grad=True)),
        example(hidden=torch.randn(4, 9).t(), gather=None),
        example(gather=torch.tensor([], dtype=torch.int64), token=None, experts=[], counts=[], weight=None, grad=None),
        example(weight=None, version=-1),
        example(weight=None, grad=None, version=3, keep=True),
        example(version=-1, weight=None, kept=True),
        example(version=-1, weight=None, hidden=PACKED, grad=None, keep=True),
        example(version=-1, weight=None, hidden=PACKED, grad=PACKED[:4]),
        example(version=-1, weight=None, hidden=PACKED, grad=PACKED[:4], kept=True),
    ],
)
def test_a_call_arrives_as_it_was(through: Any, call: ExpertCall) -> None:
    back = through(call)
    assert (back.version, back.keep, back.kept) == (call.version, call.keep, call.kept)
    if call.kept:  # the host has its tokens
        call.token = None
    assert (back.layer, back.epoch, back.call_id) == (call.layer, call.epoch, call.call_id)
    assert (back.experts, back.counts, back.gather) == (call.experts, call.counts, None)
    assert torch.equal(back.hidden, call.tokens())
    for name in ("token", "weight", "grad"):
        left, right = getattr(back, name), getattr(call, name)
        assert left is right is None or torch.equal(left, right)


FIELDS = ["layer", 1, array("I", [0, 5]).tobytes(), array("I", [2, 1]).tobytes(), ""]
TRAINED = [*FIELDS, "", [-1, False, False]]
HIDDEN = torch.zeros(2, 4)
TOKEN = torch.tensor([0, 1, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "contents", "message"),
    [
        (FIELDS[:4], (HIDDEN, TOKEN, None, None), "5 to 7 fields and 4 tensors"),
        (FIELDS, (HIDDEN, TOKEN, None), "5 to 7 fields and 4 tensors"),
        ([*FIELDS, "", "", ""], (HIDDEN, TOKEN, None, None), "5 to 7 fields and 4 tensors"),
        ([*FIELDS, "", ""], (HIDDEN, TOKEN, None, None), "seventh field"),
        ([*FIELDS, "", [-2, False, False]], (HIDDEN, TOKEN, None, None), "seventh field"),
        ([*FIELDS, "", [1, 0, 0]], (HIDDEN, TOKEN, None, None), "seventh field"),
        ([*FIELDS, "", [-1, False, True]], (HIDDEN, TOKEN, None, None), "that was kept only"),
        ([7, *FIELDS[1:]], (HIDDEN, TOKEN, None, None), "names its layer"),
        (["layer", 1.5, *FIELDS[2:]], (HIDDEN, TOKEN, None, None), "names its layer"),
        (["layer", True, *FIELDS[2:]], (HIDDEN, TOKEN, None, None), "names its layer"),
        ([*FIELDS[:4], None], (HIDDEN, TOKEN, None, None), "names its layer"),
        (FIELDS, (None, TOKEN, None, None), "floats \\[t, D\\], not absent"),
        (FIELDS, (HIDDEN[0], TOKEN, None, None), "floats \\[t, D\\]"),
        (FIELDS, (HIDDEN.int(), TOKEN, None, None), "not int32 \\[2, 4\\]"),
        ([*FIELDS[:2], [0, 5], *FIELDS[3:]], (HIDDEN, TOKEN, None, None), "32-bit integers"),
        ([*FIELDS[:2], b"123", *FIELDS[3:]], (HIDDEN, TOKEN, None, None), "32-bit integers"),
        ([*FIELDS[:2], b"1234", *FIELDS[3:]], (HIDDEN, TOKEN, None, None), "1 experts but 2 counts"),
        (FIELDS, (HIDDEN, None, None, None), "3 rows are announced for 2 tokens"),
        (FIELDS, (HIDDEN, TOKEN[:2], None, None), "int32 \\[3\\], not int32 \\[2\\]"),
        (FIELDS, (HIDDEN, TOKEN.long(), None, None), "int32 \\[3\\], not int64"),
        (FIELDS, (HIDDEN, TOKEN + 1, None, None), "outside the 2"),
        (FIELDS, (HIDDEN, TOKEN - 1, None, None), "outside the 2"),
        (FIELDS, (HIDDEN, TOKEN, torch.zeros(2), None), "routing weights must be floats \\[3\\]"),
        (FIELDS, (HIDDEN, TOKEN, TOKEN, None), "routing weights must be floats"),
        (FIELDS, (HIDDEN, TOKEN, None, torch.zeros(2, 4)), "gradient must be floats \\[3, D\\]"),
        (FIELDS, (HIDDEN, TOKEN, None, torch.zeros(3)), "gradient must be floats"),
        (FIELDS, (PACKED[:2], TOKEN, None, None), "only in training"),
        ([*FIELDS, "", [1, False, False]], (PACKED[:2], TOKEN, None, None), "only in training"),
        (TRAINED, (PACKED[:2], TOKEN, torch.zeros(3), None), "only in training"),
        (TRAINED, (PACKED[:2, :4], TOKEN, None, None), "floats \\[t, D\\]"),
        (TRAINED, (PACKED[:2], TOKEN, None, torch.zeros(3, 4)), "as the tokens are"),
        (TRAINED, (PACKED[:2], TOKEN, None, PACKED[:2]), "as the tokens are"),
        (TRAINED, (HIDDEN, TOKEN, None, PACKED[:3]), "as the tokens are"),
    ],
)
def test_a_call_that_contradicts_itself_is_refused(fields: Any, contents: Any, message: str) -> None:
    buffers, _ = tensors.encode(fields, contents)
    back, specs, region = tensors.decode(b"".join(buffers))
    with pytest.raises(WireError, match=message):
        codec.read_call(back, specs, tensors.tensors_in(region, specs))


@pytest.mark.parametrize("through", [through_bytes, through_memory])
def test_a_trace_travels_with_the_call_it_belongs_to(through: Any) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert through(example(trace=trace)).trace == trace
    assert len(codec.call_fields(example())) == 5


JUNK = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=99) | st.text(max_size=99)


@given(JUNK | st.lists(JUNK, max_size=3))
def test_a_call_is_good_without_a_trace_that_is_none(trace: Any) -> None:
    buffers, _ = tensors.encode([*FIELDS, trace], (HIDDEN, TOKEN, None, None))
    back, specs, region = tensors.decode(b"".join(buffers))
    call = codec.read_call(back, specs, tensors.tensors_in(region, specs))
    assert (call.trace, call.counts) == ("", [2, 1])


def test_how_many_rows_come_back() -> None:
    assert codec.wanted(example(weight=None, grad=None)) == (4, False)
    assert codec.wanted(example(grad=None)) == (3, False)
    assert codec.wanted(example()) == (3, False)
    assert codec.wanted(example(weight=None)) == (3, False)
    assert codec.wanted(example(weight=None, hidden=pack_rows(torch.randn(9, 4)))) == (3, True)


@pytest.mark.parametrize(
    "fields", [[], [None], ["x"], [3], [[]], [codec.FAILED], [codec.FAILED, "a"], [codec.FAILED, 1, 2]]
)
def test_a_reply_of_no_known_kind_is_refused(fields: list[Any]) -> None:
    with pytest.raises(WireError):
        codec.read_reply(fields, [tensors.make_spec(torch.float32, (2, 4))], codec.Wanted(2))


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [None],
        [tensors.make_spec(torch.float32, (3, 4))],
        [tensors.make_spec(torch.float32, (2,))],
        [tensors.make_spec(torch.int32, (2, 4))],
        [tensors.make_spec(torch.uint8, (2, 8))],
        [tensors.make_spec(torch.float32, (2, 4))] * 2,
    ],
)
def test_a_reply_with_other_rows_is_refused(specs: Any) -> None:
    with pytest.raises(WireError):
        codec.read_reply([codec.ROWS_FOLLOW], specs, codec.Wanted(2))


@pytest.mark.parametrize(
    "spec",
    [
        tensors.make_spec(torch.float32, (2, 8)),
        tensors.make_spec(torch.uint8, (3, 8)),
        tensors.make_spec(torch.uint8, (2, 4)),
        tensors.make_spec(torch.int32, (2, 8)),
    ],
)
def test_whoever_asks_in_8_bits_is_answered_in_8_bits(spec: Any) -> None:
    good = tensors.make_spec(torch.uint8, (2, 8))
    assert codec.read_reply([codec.ROWS_FOLLOW], [good], codec.Wanted(2, packed=True)) == (good, False)
    with pytest.raises(WireError, match="packed rows"):
        codec.read_reply([codec.ROWS_FOLLOW], [spec], codec.Wanted(2, packed=True))


def test_errors_arrive_as_what_they_were() -> None:
    for error in (StaleRouting("no expert 3"), HostLost("gone"), WireError("bad")):
        back = codec.read_failure(codec.failure_fields(error))
        assert type(back) is type(error)
        assert str(back) == str(error)


def test_foreign_errors_arrive_as_failed_experts() -> None:
    back = codec.read_failure(codec.failure_fields(ZeroDivisionError("division by zero")))
    assert type(back) is ExpertFailed
    assert str(back) == "ZeroDivisionError: division by zero"
    for name in ("annotations", "__name__", "NoSuchError", ""):
        back = codec.read_failure([codec.FAILED, name, "text"])
        assert type(back) is ExpertFailed
        assert str(back) == f"{name}: text"
    assert issubclass(type(codec.read_failure([codec.FAILED, "RayMoEError", ""])), RayMoEError)


def test_long_messages_of_errors_are_shortened() -> None:
    assert len(str(codec.read_failure(codec.failure_fields(ValueError("x" * 10**6))))) < 5000
