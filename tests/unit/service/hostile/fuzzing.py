"""What fuzzing takes: how many examples, and messages of protobuf with any content, sound or damaged.

`RAY_MOE_FUZZ_EXAMPLES` is the number of examples for each test, 100 if absent; 5,000 take some minutes.
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ray_moe.errors import InvalidRequest, NotFound, UnsupportedModel
from ray_moe.types import GenerateRequest
from tests.unit.service.fake_backend import LAYER, WIDTH, FakeBackend

fuzz = settings(
    max_examples=int(os.environ.get("RAY_MOE_FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
REFUSED = (InvalidRequest, NotFound, UnsupportedModel)
"""What a caller may be told of a request; anything else that is raised fails the test."""

BACKEND = FakeBackend()


def assert_sound(request: GenerateRequest) -> None:
    """The engine can do what is asked."""
    assert all(0 <= token < BACKEND.vocab_size for token in (*(request.token_ids or ()), *request.stop_token_ids))
    assert BACKEND.max_positions is not None
    assert 1 <= request.max_new_tokens <= BACKEND.max_positions
    assert 0 <= request.temperature < math.inf and 0 < request.top_p <= 1 and 0 <= request.min_p <= 1
    assert request.repetition_penalty is None or 0.01 <= request.repetition_penalty <= 100
    assert len(request.stop) <= 16 and all(request.stop)


INT64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 9) | st.sampled_from([2**31, 2**32, 2**62, -(2**31)])
FLOATS = st.floats() | st.sampled_from([0.0, -1.0, 0.5, 1e-300, 5e-324, math.nan, math.inf])
NAMES = st.sampled_from(
    f"tiny tiny/{LAYER} {LAYER} text_input token_ids hidden index weight stop temperature max_tokens seed stream "
    "timeout binary_data_output FP32 FP16 INT64 BYTES BOOL".split()
)
TEXTS = NAMES | st.text(max_size=20)
LENGTHS = st.integers(0, 9).map(lambda number: struct.pack("<I", number))
BYTES = st.binary(max_size=40) | st.integers(0, 8).map(lambda rows: bytes(rows * WIDTH * 4)) | LENGTHS
_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 40),
    FieldDescriptor.CPPTYPE_INT64: INT64,
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: FLOATS,
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 8),
}


def fill(draw: st.DrawFn, message: Message, in_ten: int, depth: int = 3) -> None:
    """Give so many in ten of the fields a value, whatever it may be."""
    for field in message.DESCRIPTOR.fields:
        if draw(st.integers(0, 9)) >= in_ten:
            continue
        number = draw(st.integers(1, 4)) if field.is_repeated else 1
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(number):
                fill(draw, getattr(message, field.name)[draw(TEXTS)], 5, depth - 1)
        elif field.message_type is not None:
            for _ in range(number if depth else 0):
                inner = getattr(message, field.name)
                inner = inner.add() if field.is_repeated else inner
                inner.SetInParent()
                fill(draw, inner, in_ten, depth - 1)
        else:
            values = [draw(_value(field)) for _ in range(number)]
            if field.is_repeated:
                getattr(message, field.name).extend(values)
            else:
                setattr(message, field.name, values[0])


def _value(field: Any) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return BYTES
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXTS
    return _SCALARS[field.cpp_type]


@st.composite
def encoded(draw: st.DrawFn, kind: type[Message], good: Message | None = None) -> bytes:
    """The bytes of a message of that kind, which may be `good` with a few changes; some damaged, some none at all."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=60))
    message = kind()
    if good is not None and draw(st.booleans()):
        message.CopyFrom(good)
        fill(draw, message, 1)
    else:
        fill(draw, message, 5)
    data = bytearray(message.SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data)
