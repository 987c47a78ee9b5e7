"""The calls of Inference as a foreign client sees them: raw stubs, and bytes that no stub would send."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from ray_moe.types import RouterAddress
from ray_moe.wire.arrays import decode, encode
from ray_moe.wire.v1 import inference_pb2 as pb
from ray_moe.wire.v1.inference_pb2_grpc import InferenceStub
from tests.unit.service.fake_backend import (
    GATELESS,
    LAYER,
    LAYERS,
    NUM_EXPERTS,
    WIDTH,
    FakeBackend,
    error_class,
    front_door,
)

C = grpc.StatusCode
HIDDEN = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
INDEX = np.array([[0, 1], [2, NUM_EXPERTS]])
WEIGHT = np.array([[0.5, 0.25], [1.0, 9.0]], np.float32)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def channel(backend: FakeBackend) -> AsyncIterator[grpc.aio.Channel]:
    limits = {"max_request_bytes": 8 * 2**20, "max_forward_tokens": 100_000, "max_prompt_bytes": 1_000_000}
    async with front_door(backend, **limits) as target, grpc.aio.insecure_channel(target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return InferenceStub(channel)


def forward(hidden: Any = HIDDEN, layer: str | int | None = LAYER, **others: Any) -> pb.ForwardRequest:
    message = pb.ForwardRequest(hidden=hidden if isinstance(hidden, pb.Tensor) else encode(hidden), **others)
    if isinstance(layer, str):
        message.layer_path = layer
    elif layer is not None:
        message.layer_index = layer
    return message


def routing(index: Any = INDEX, weight: Any = WEIGHT) -> pb.Routing:
    return pb.Routing(index=encode(np.asarray(index)), weight=encode(np.asarray(weight)))


def hidden_with(value: float, dtype: str = "float32") -> Any:
    array = HIDDEN.astype(dtype)
    array[1, 2] = value
    return array


# --- what works ----------------------------------------------------------------------------------------------
async def test_forward_by_the_models_own_gate(stub: Any, backend: FakeBackend) -> None:
    reply = await stub.Forward(forward(request_id="a"))
    np.testing.assert_array_equal(decode(reply.hidden), -HIDDEN)
    assert reply.request_id == "a"
    assert backend.calls[0][0] == LAYER
    assert backend.calls[0][2] is None


async def test_forward_with_routing(stub: Any, backend: FakeBackend) -> None:
    reply = await stub.Forward(forward(layer=GATELESS, routing=routing(INDEX.astype(np.int32))))
    np.testing.assert_array_equal(decode(reply.hidden), HIDDEN * [[1.0], [3.0]])
    layer, hidden, given = backend.calls[0]
    assert layer == GATELESS
    assert given is not None
    assert hidden.dtype == np.float32
    assert given[0].dtype == np.int64
    np.testing.assert_array_equal(given[0], INDEX)


@pytest.mark.parametrize("dtype", [pb.DTYPE_F64, pb.DTYPE_F32, pb.DTYPE_F16, pb.DTYPE_BF16])
async def test_the_reply_has_the_dtype_of_the_request(stub: Any, dtype: pb.DType.ValueType) -> None:
    reply = await stub.Forward(forward(encode(HIDDEN, dtype)))
    assert reply.hidden.dtype == dtype
    np.testing.assert_array_equal(decode(reply.hidden), -HIDDEN)


@pytest.mark.parametrize("num_tokens", [1, 100_000])
async def test_one_token_and_very_many(stub: Any, num_tokens: int) -> None:
    hidden = np.ones((num_tokens, WIDTH), np.float32)
    assert decode((await stub.Forward(forward(hidden))).hidden).shape == hidden.shape


async def test_an_empty_batch_needs_no_backend(stub: Any, backend: FakeBackend) -> None:
    empty = routing(np.empty((0, 2), np.int64), np.empty((0, 2), np.float32))
    for request in (forward(HIDDEN[:0]), forward(HIDDEN[:0], routing=empty)):
        reply = await stub.Forward(request)
        assert decode(reply.hidden).shape == (0, WIDTH)
    assert not backend.calls


async def test_layers_by_number(stub: Any, backend: FakeBackend) -> None:
    await stub.Forward(forward(layer=1))
    assert backend.calls[0][0] == LAYERS[1]


async def test_a_stream_answers_in_order(stub: Any) -> None:
    requests = [forward(HIDDEN + number, request_id=str(number)) for number in range(20)]
    replies = [reply async for reply in stub.ForwardStream(iter(requests))]
    assert [reply.request_id for reply in replies] == [str(number) for number in range(20)]
    np.testing.assert_array_equal(decode(replies[7].hidden), -(HIDDEN + 7))


async def test_a_bad_request_ends_a_stream_after_the_answers_before_it(stub: Any) -> None:
    call = stub.ForwardStream(iter([forward(), forward(layer="nowhere"), forward()]))
    np.testing.assert_array_equal(decode((await call.read()).hidden), -HIDDEN)
    with pytest.raises(grpc.aio.AioRpcError, match="nowhere"):
        await call.read()
    assert await call.code() is C.NOT_FOUND


async def test_generate_fills_in_the_defaults(stub: Any, backend: FakeBackend) -> None:
    backend.max_positions = None
    replies = [reply async for reply in stub.Generate(pb.GenerateRequest(prompt="x"))]
    assert len(replies) == 128
    assert replies[-1].finish_reason == "length"
    request = backend.requests[0]
    assert (request.max_new_tokens, request.temperature, request.top_p, request.seed) == (128, 0.0, 1.0, None)


# --- bad input -----------------------------------------------------------------------------------------------
F32 = pb.DTYPE_F32
BAD_FORWARDS: dict[str, tuple[pb.ForwardRequest, grpc.StatusCode, str]] = {
    "no layer": (forward(layer=None), C.INVALID_ARGUMENT, "no layer is named.*" + LAYER),
    "unknown layer": (
        forward(layer="model.layers.1.mlp.expert"),
        C.NOT_FOUND,
        f"did you mean {LAYERS[1]}. It has 3: {LAYER}",
    ),
    "endless layer": (forward(layer="x" * 100_000), C.NOT_FOUND, "'x{200}'.*It has 3"),
    "layer number": (forward(layer=3), C.NOT_FOUND, "index 3; the model has 3: expected 0..2"),
    "negative layer number": (forward(layer=-1), C.NOT_FOUND, "index -1"),
    "no hidden": (pb.ForwardRequest(layer_path=LAYER), C.INVALID_ARGUMENT, r"hidden is missing.*\[T, 4\]"),
    "no dtype": (forward(pb.Tensor(shape=[0, 4])), C.INVALID_ARGUMENT, "hidden has dtype number 0; expected one of"),
    "unknown dtype": (forward(pb.Tensor(dtype=77, shape=[0, 4])), C.INVALID_ARGUMENT, "dtype number 77"),  # type: ignore[arg-type]
    "integers": (forward(HIDDEN.astype(np.int64)), C.INVALID_ARGUMENT, "hidden has dtype int64; expected a float"),
    "flat": (forward(HIDDEN[0]), C.INVALID_ARGUMENT, r"hidden has shape \[4\]; .* expects \[T, 4\]"),
    "cube": (forward(HIDDEN[None]), C.INVALID_ARGUMENT, r"shape \[1, 2, 4\]"),
    "scalar": (forward(np.float32(1)[...]), C.INVALID_ARGUMENT, r"shape \[\]"),
    "width": (forward(HIDDEN[:, :3]), C.INVALID_ARGUMENT, r"shape \[2, 3\]; layer .*0.* expects \[T, 4\]"),
    "width of nothing": (forward(HIDDEN[:0, :3]), C.INVALID_ARGUMENT, r"shape \[0, 3\]"),
    "too few bytes": (forward(pb.Tensor(dtype=F32, shape=[2, 4], data=b"x")), C.INVALID_ARGUMENT, "1 bytes; .* 32"),
    "too many bytes": (forward(pb.Tensor(dtype=F32, shape=[0, 4], data=b"x")), C.INVALID_ARGUMENT, "1 bytes; .* 0"),
    "negative size": (forward(pb.Tensor(dtype=F32, shape=[-1, -4], data=b"")), C.INVALID_ARGUMENT, r"\[-1, -4\]"),
    "overflowing size": (
        forward(pb.Tensor(dtype=F32, shape=[2**62, 2**62], data=b"")),
        C.INVALID_ARGUMENT,
        "hidden has 0 bytes; its shape",
    ),
    "uncountable size": (forward(pb.Tensor(dtype=F32, shape=[2**62, 2**62, 0])), C.INVALID_ARGUMENT, "hidden has sh"),
    "rank": (forward(pb.Tensor(dtype=F32, shape=[0] * 10_000)), C.INVALID_ARGUMENT, "10000 sizes"),
    "too many tokens": (
        forward(np.zeros((100_001, WIDTH), np.float16)),
        C.INVALID_ARGUMENT,
        "100,001 tokens; at most 100,000",
    ),
    "nan": (forward(hidden_with(math.nan)), C.INVALID_ARGUMENT, r"hidden\[1, 2\] is nan; expected finite"),
    "inf": (forward(hidden_with(math.inf)), C.INVALID_ARGUMENT, r"hidden\[1, 2\] is inf"),
    "half nan": (forward(hidden_with(math.nan, "float16")), C.INVALID_ARGUMENT, r"hidden\[1, 2\] is nan"),
    "-inf in bf16": (
        forward(encode(hidden_with(-math.inf), pb.DTYPE_BF16)),
        C.INVALID_ARGUMENT,
        r"hidden\[1, 2\] is -inf",
    ),
    "beyond the layer's dtype": (
        forward(hidden_with(-1e39, "float64")),
        C.INVALID_ARGUMENT,
        r"hidden\[1, 2\] is -1e\+39; .*float32, the layer's dtype, holds up to 3.403e\+38",
    ),
    "no gate": (forward(layer=GATELESS), C.UNIMPLEMENTED, "gate of layer .*2.mlp.*give routing"),
    "empty routing": (forward(routing=pb.Routing()), C.INVALID_ARGUMENT, "index has dtype number 0"),
    "no weight": (
        forward(routing=pb.Routing(index=encode(INDEX))),
        C.INVALID_ARGUMENT,
        "weight has dtype number 0",
    ),
    "negative index": (forward(routing=routing(INDEX - 1)), C.INVALID_ARGUMENT, r"index\[0, 0\] is -1; .*0..2"),
    "index beyond no expert": (
        forward(routing=routing(INDEX + 1)),
        C.INVALID_ARGUMENT,
        r"index\[1, 1\] is 4; .*3 means no expert",
    ),
    "float index": (forward(routing=routing(WEIGHT)), C.INVALID_ARGUMENT, "index has dtype float32; expected integers"),
    "integer weight": (forward(routing=routing(weight=INDEX)), C.INVALID_ARGUMENT, "weight has dtype int64"),
    "flat index": (forward(routing=routing(INDEX[0])), C.INVALID_ARGUMENT, r"index has shape \[2\]; expected \[2, K\]"),
    "rows of index": (
        forward(routing=routing(INDEX[:1])),
        C.INVALID_ARGUMENT,
        r"index has shape \[1, 2\]; expected \[2",
    ),
    "rows of weight": (forward(routing=routing(weight=WEIGHT[:1])), C.INVALID_ARGUMENT, r"weight has shape \[1, 2\]"),
    "columns": (
        forward(routing=routing(weight=WEIGHT[:, :1])),
        C.INVALID_ARGUMENT,
        r"index has shape \[2, 2\] and weight \[2, 1\]",
    ),
    "no column": (
        forward(routing=routing(INDEX[:, :0], WEIGHT[:, :0])),
        C.INVALID_ARGUMENT,
        "index has 0 experts per token; .*expects 1..3",
    ),
    "many columns": (
        forward(routing=routing(np.zeros((2, 4), np.int64), np.zeros((2, 4)))),
        C.INVALID_ARGUMENT,
        "index has 4 experts per token",
    ),
    "nan weight": (forward(routing=routing(weight=WEIGHT * np.nan)), C.INVALID_ARGUMENT, r"weight\[0, 0\] is nan"),
}


@pytest.mark.parametrize("case", BAD_FORWARDS)
async def test_bad_forwards(stub: Any, backend: FakeBackend, case: str) -> None:
    request, code, details = BAD_FORWARDS[case]
    for call in (stub.Forward(request), stub.ForwardStream(iter([request])).read()):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        assert failure.value.code() is code
    failure.match(details)
    assert error_class(failure.value)
    assert not backend.calls
    await stub.Forward(forward())  # unharmed


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": "x", "max_new_tokens": 2, **fields})


def tokens(*ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=ids)


BAD_GENERATES: dict[str, tuple[pb.GenerateRequest, str]] = {
    "nothing": (pb.GenerateRequest(), "exactly one of prompt .* and token_ids"),
    "empty prompt": (generate(prompt=""), "the prompt is empty"),
    "no tokens": (generate(token_ids=tokens()), "the prompt is empty"),
    "long prompt": (
        generate(token_ids=tokens(*[1] * 49)),
        "the prompt has 49 tokens and max_new_tokens is 2, .*model's 50 positions",
    ),
    "long continuation": (
        generate(max_new_tokens=50),
        "the prompt has at least 1 tokens and max_new_tokens is 50, .*50 positions",
    ),
    "long prompt of unknown tokens": (generate(token_ids=tokens(*[-1] * 100_000)), "the prompt has 100,000 tokens"),
    "long text": (
        generate(prompt="ä" * 500_001),
        r"the prompt has 1,000,002 bytes of UTF-8; at most 1,000,000 are taken \(server.max_prompt_bytes\)",
    ),
    "token beyond": (generate(token_ids=tokens(1, 100)), r"token_ids\[1\] is 100; the vocabulary has 0..99"),
    "negative token": (generate(token_ids=tokens(-1)), r"token_ids\[0\] is -1"),
    "no new tokens": (generate(max_new_tokens=0), "max_new_tokens is 0; expected at least 1"),
    "negative new tokens": (generate(max_new_tokens=-5), "max_new_tokens is -5"),
    "absurd new tokens": (generate(max_new_tokens=2**31 - 1), "max_new_tokens is 2,147,483,647, "),
    "cold": (generate(temperature=-0.1), "temperature is -0.1; expected 0"),
    "nearly greedy": (generate(temperature=1e-30), "temperature is 1e-30"),
    "nan temperature": (generate(temperature=math.nan), "temperature is nan"),
    "infinite temperature": (generate(temperature=math.inf), "temperature is inf"),
    "top_p of nothing": (generate(top_p=0.0), "top_p is 0.0; expected 0 < top_p <= 1"),
    "top_p beyond": (generate(top_p=1.5), "top_p is 1.5"),
    "negative top_p": (generate(top_p=-0.5), "top_p is -0.5"),
    "nan top_p": (generate(top_p=math.nan), "top_p is nan"),
}


@pytest.mark.parametrize("case", BAD_GENERATES)
async def test_bad_generates(stub: Any, backend: FakeBackend, case: str) -> None:
    request, details = BAD_GENERATES[case]
    with pytest.raises(grpc.aio.AioRpcError, match=details) as failure:
        await stub.Generate(request).read()
    assert failure.value.code() is C.INVALID_ARGUMENT
    assert not backend.requests
    assert len([reply async for reply in stub.Generate(generate())]) == 2  # unharmed


async def test_the_routers_are_told_also_before_the_service_is_ready(stub: Any, backend: FakeBackend) -> None:
    backend.ready = False
    backend.addresses = (RouterAddress("router-0", "a:1", "http://a:2"), RouterAddress("router-1", "b:1", "", True))
    told = (await stub.ListRouters(pb.ListRoutersRequest())).routers
    assert [(r.router_id, r.grpc_address, r.http_address, r.ready) for r in told] == [
        ("router-0", "a:1", "http://a:2", False),
        ("router-1", "b:1", "", True),
    ]


async def test_a_text_of_just_the_limit(stub: Any) -> None:
    assert len([reply async for reply in stub.Generate(generate(prompt="ä" * 500_000))]) == 2


async def test_a_model_without_bounds_or_tokenizer(stub: Any, backend: FakeBackend) -> None:
    backend.max_positions = None
    with pytest.raises(grpc.aio.AioRpcError, match="2,147,483,647; expected at most 1,048,576"):
        await stub.Generate(generate(max_new_tokens=2**31 - 1)).read()
    backend.has_tokenizer = False
    with pytest.raises(grpc.aio.AioRpcError, match="no tokenizer: send token_ids"):
        await stub.Generate(generate()).read()


@pytest.mark.parametrize("method", ["Forward", "Generate", "ForwardStream"])
@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xff", b"\x0a\x05ab", b"\xff" * 100], ids=["utf-8", "cut", "noise"])
async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, method: str, data: bytes) -> None:
    path = f"/ray_moe.v1.Inference/{method}"
    calls: dict[str, Any] = {
        "Forward": lambda: channel.unary_unary(path, None, None)(data),
        "Generate": lambda: channel.unary_stream(path, None, None)(data).read(),
        "ForwardStream": lambda: channel.stream_stream(path, None, None)(iter([data])).read(),
    }
    with pytest.raises(grpc.aio.AioRpcError, match=r"bytes are not a \w+Request .*UTF-8") as failure:
        await calls[method]()
    assert failure.value.code() is C.INVALID_ARGUMENT
    assert error_class(failure.value) == "WireError"


async def test_a_request_beyond_the_limit(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as failure:
        await stub.Forward(forward(np.zeros((2**20, WIDTH), np.float32)))
    assert failure.value.code() is C.RESOURCE_EXHAUSTED
    await stub.Forward(forward())


async def test_nothing_of_what_was_refused_is_kept(stub: Any) -> None:
    large = forward(np.zeros((7 * 2**20 // 4 // WIDTH, WIDTH), np.float32))  # more tokens than one call may bring
    gc.collect()
    gc.disable()
    try:
        sizes = []
        for _ in range(3):
            for _ in range(10):
                with pytest.raises(grpc.RpcError):
                    await stub.Forward(large)
            sizes.append(psutil.Process().memory_info().rss)
    finally:
        gc.enable()
    assert sizes[-1] - sizes[0] < 40 * 2**20  # of 140 MiB
