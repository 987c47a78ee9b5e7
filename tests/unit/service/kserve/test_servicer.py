"""The service by its own stubs: typed contents, wrong bytes, readiness, limits, many requests on one stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from ray_moe.errors import Unavailable
from ray_moe.service.admission import Admission
from ray_moe.service.grpc.guard import Guard
from ray_moe.service.kserve import streams
from ray_moe.service.kserve.servicer import KServeService
from ray_moe.wire.kserve import grpc_service_pb2 as pb
from ray_moe.wire.kserve.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.unit.service.fake_backend import WIDTH, FakeBackend, error_class
from tests.unit.service.kserve.serving import LAYER_MODEL, ask, raw, serving, serving_in_thread, text, typed

C = grpc.StatusCode
HIDDEN = np.arange(2 * WIDTH, dtype=np.float64).reshape(2, WIDTH)
FINAL = "triton_final_response"
SERVICE = "inference.GRPCInferenceService"


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def guard_and_channel(backend: FakeBackend) -> AsyncIterator[tuple[Guard, grpc.aio.Channel]]:
    async with (
        serving(backend, max_concurrent_requests=3, max_in_flight_bytes=1000) as (target, guard),
        grpc.aio.insecure_channel(target) as channel,
    ):
        yield guard, channel


@pytest.fixture
def stub(guard_and_channel: tuple[Guard, grpc.aio.Channel]) -> Any:
    return GRPCInferenceServiceStub(guard_and_channel[1])


def generate(max_tokens: int = 2, request_id: str = "", **more: Any) -> pb.ModelInferRequest:
    request = ask(text("text_input", b"x"), max_tokens=max_tokens, **more)
    request.id = request_id
    return request


def call_layer(request_id: str = "", hidden: Any = HIDDEN, **more: Any) -> pb.ModelInferRequest:
    request = ask(typed("hidden", "FP64", "fp64_contents", hidden), model=LAYER_MODEL, **more)
    request.id = request_id
    return request


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def test_every_method_of_the_proto_is_served() -> None:
    backend = FakeBackend()
    handler = KServeService(
        backend, Guard(Admission(backend, 1, 1)), max_forward_tokens=1, max_prompt_bytes=1
    ).handler()
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        details: Any = SimpleNamespace(method=f"/{SERVICE}/{method.name}")
        found: Any = handler.service(details)
        assert found is not None, method.name
        assert found.response_streaming == method.server_streaming
        assert found.request_streaming  # also those of one request: see `handlers.py`


def test_reflection_describes_the_protocol_beside_our_own() -> None:
    with serving_in_thread(FakeBackend()) as target, grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        (service,) = database.FindFileContainingSymbol(SERVICE).service
        assert "ModelStreamInfer" in {method.name for method in service.method}
        assert database.FindFileContainingSymbol("ray_moe.v1.Inference").package == "ray_moe.v1"


# --- Tensors -------------------------------------------------------------------------------------------------
async def test_typed_contents_are_taken_and_answered_raw(stub: Any, backend: FakeBackend) -> None:
    response = await stub.ModelInfer(
        ask(
            typed("hidden", "FP64", "fp64_contents", HIDDEN),
            typed("index", "INT32", "int_contents", [[1], [3]]),
            typed("weight", "FP32", "fp32_contents", [[0.5], [1]]),
            model=LAYER_MODEL,
        )
    )
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("hidden", "FP64", [2, WIDTH])
    assert not output.HasField("contents")
    (data,) = response.raw_output_contents
    np.testing.assert_array_equal(np.frombuffer(data).reshape(2, WIDTH), HIDDEN * [[1], [0]])


async def test_answers_are_typed_on_request(stub: Any) -> None:
    response = await stub.ModelInfer(call_layer(binary_data_output=False))
    assert not response.raw_output_contents
    np.testing.assert_array_equal(response.outputs[0].contents.fp64_contents, -HIDDEN.ravel())
    outputs = ("finish_reason", "token_ids", "num_cached_tokens", "text_output")
    response = await stub.ModelInfer(generate(outputs=outputs, binary_data_output=False))
    reason, token_ids, cached, words = (output.contents for output in response.outputs)
    assert (list(reason.bytes_contents), list(words.bytes_contents)) == ([b"length"], [b"0 1 "])
    assert (list(token_ids.int64_contents), list(cached.int64_contents)) == ([0, 1], [0])


async def test_half_precision_has_no_typed_contents(stub: Any) -> None:
    request = ask(raw("hidden", "BF16", [1, WIDTH]), model=LAYER_MODEL, binary_data_output=False)
    request.raw_input_contents.append(bytes(2 * WIDTH))
    failure = await refusal(stub.ModelInfer(request))
    assert "output 'hidden' is BF16, which has no typed contents" in str(failure.details())


async def test_log_probabilities_are_computed_when_they_are_asked_for(stub: Any, backend: FakeBackend) -> None:
    await stub.ModelInfer(generate())
    await stub.ModelInfer(generate(outputs=["logprobs"]))
    assert [request.logprobs for request in backend.requests] == [None, 0]


def layer_request(*inputs: Any, contents: tuple[bytes, ...] = ()) -> pb.ModelInferRequest:
    request = ask(*inputs, model=LAYER_MODEL)
    request.raw_input_contents.extend(contents)
    return request


def text_request(*contents: bytes, shape: tuple[int, ...] = (1,)) -> pb.ModelInferRequest:
    request = ask(raw("text_input", "BYTES", shape))
    request.raw_input_contents.extend(contents)
    return request


ROW = raw("hidden", "FP32", [1, WIDTH])
FP32 = bytes(4 * WIDTH)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (layer_request(ROW, contents=(FP32, FP32)), "raw_input_contents has 2 entries for 1 inputs"),
        (layer_request(ROW, contents=(FP32[1:],)), "has 15 raw bytes; its shape [1, 4] in FP32 takes 16"),
        (layer_request(ROW, ROW, contents=(FP32, FP32)), "input 'hidden' is given twice"),
        (layer_request(ROW), "has 0 elements in fp32_contents, its shape [1, 4] takes 4"),
        (layer_request(raw("hidden", "BF16", [1, WIDTH])), "is BF16, which has no typed contents: send it raw"),
        (layer_request(raw("hidden", "", [1, WIDTH])), "datatype ''; expected FP32 or FP64 or FP16 or BF16"),
        (layer_request(raw("hidden", "FP32", [-1, WIDTH])), "shape [-1, 4]; expected [-1, 4], where -1 is any size"),
        (layer_request(raw("hidden", "FP32", [1] * 50)), "[1, 1, 1, 1, 1, 1, 1, 1, ... 50 sizes]"),
        (
            layer_request(
                ROW, raw("weight", "FP32", [0, 2**62]), raw("index", "INT64", [0, 2**63 - 1]), contents=(b"",) * 3
            ),
            "input 'hidden' has 0 raw bytes",
        ),
        (
            layer_request(
                raw("hidden", "FP32", [0, WIDTH]), raw("index", "INT64", [0, 2**63 - 1]), contents=(b"", b"")
            ),
            "input 'index' has shape [0, 9223372036854775807]",
        ),
        (
            layer_request(typed("hidden", "FP32", "fp32_contents", HIDDEN), contents=(FP32,)),
            "has contents beside raw_input_contents",
        ),
        (layer_request(typed("hidden", "FP32", "fp64_contents", HIDDEN)), "but has fp64_contents: fill fp32_contents"),
        (
            layer_request(ROW, raw("weight", "FP32", [1, 1]), contents=(FP32, b"1234")),
            "index and weight belong together",
        ),
        (
            layer_request(typed("hidden", "FP64", "fp64_contents", np.zeros((101, WIDTH)))),
            "hidden has 101 tokens; at most 100 go in one call",
        ),
        (
            layer_request(
                ROW,
                raw("index", "INT32", [1, 1]),
                raw("weight", "FP32", [1, 1]),
                contents=(FP32, b"\4\0\0\0", bytes(4)),
            ),
            "index[0, 0] is 4",
        ),
        (call_layer(outputs=["logits"]), "has no output 'logits'; expected hidden"),
        (call_layer(outputs=["hidden", "hidden"]), "output 'hidden' is requested twice"),
        (call_layer(temperature=1.0), "there is no parameter 'temperature'; expected some of timeout"),
        (text_request(b"\5\0\0\0abc"), "ends at byte 7, inside element 0"),
        (text_request(b"\5\0"), "ends at byte 2, inside element 0"),
        (text_request(b"\1\0\0\0ab"), "has 1 or more elements; its shape takes 1"),
        (text_request(b""), "has 0 elements; its shape takes 1"),
        (text_request(b"\1\0\0\0a" * 2, shape=(2,)), "has shape [2]; expected [1]"),
        (text_request(b"\1\0\0\0\xff"), "text_input is not UTF-8"),
        (text_request(b"\0\0\0\0"), "the prompt is empty"),
        (generate(max_tokens=2**31), "max_tokens is 2147483648; expected -2147483648 to 2147483647"),
        (generate(temperature="warm"), "temperature is 'warm'; expected a number"),
        (generate(temperature="nan"), "temperature is nan"),
        (generate(top_k=True), "top_k is 'True'; expected an integer"),
        (generate(seed=-1), "seed is -1; expected 0 to 18446744073709551615"),
        (generate(ignore_eos=1), "ignore_eos is '1'; expected true or false"),
        (generate(stop=1), "stop is '1'; expected a text"),
        (generate(stream=True), "ModelInfer answers once: call ModelStreamInfer"),
        (generate(timeout=-5), "timeout is -5"),
        (
            ask(text("text_input", b"x"), typed("seed", "INT64", "int64_contents", [1]), seed=1),
            "seed is given as a para",
        ),
        (
            ask(text("text_input", b"x"), typed("token_ids", "INT64", "int64_contents", [1])),
            "exactly one of text_input",
        ),
        (
            ask(typed("token_ids", "INT64", "int64_contents", [100]), max_tokens=1),
            "token_ids[0] is 100; the vocabulary has 0..99",
        ),
        (pb.ModelInferRequest(model_name="tiny", parameters={"seed": pb.InferParameter()}), "seed is 'None'; expected"),
    ],
)
async def test_a_wrong_tensor_or_parameter_is_named(
    stub: Any, backend: FakeBackend, request_: pb.ModelInferRequest, said: str
) -> None:
    failure = await refusal(stub.ModelInfer(request_))
    assert failure.code() == C.INVALID_ARGUMENT
    assert said in str(failure.details())
    assert error_class(failure) in ("InvalidRequest", "WireError")
    assert not backend.calls
    assert not backend.requests


async def test_bytes_that_are_no_message_are_refused(
    stub: Any, guard_and_channel: tuple[Guard, grpc.aio.Channel]
) -> None:
    for method in ("ModelInfer", "ModelReady", "ModelStatistics"):
        call = guard_and_channel[1].unary_unary(f"/{SERVICE}/{method}", None, None)
        failure = await refusal(call(b"\xff"))
        assert (failure.code(), error_class(failure)) == (C.INVALID_ARGUMENT, "WireError")
        assert f"send an encoded inference.{method}Request" in str(failure.details())


async def test_a_model_without_a_tokenizer_knows_no_texts(stub: Any, backend: FakeBackend) -> None:
    backend.has_tokenizer = False
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
    assert {"text_input", "stop", "text_output"}.isdisjoint(each.name for each in (*metadata.inputs, *metadata.outputs))
    request = ask(typed("token_ids", "UINT32", "uint_contents", [7]), max_tokens=1)
    response = await stub.ModelInfer(request)
    assert [output.name for output in response.outputs] == ["token_ids", "finish_reason"]


async def test_a_model_that_cannot_generate_shows_only_its_layers(stub: Any, backend: FakeBackend) -> None:
    backend.vocab_size = 0
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest())
    assert [model.name for model in index.models] == [f"tiny/{layer}" for layer in backend.layers]
    failure = await refusal(stub.ModelInfer(generate()))
    assert (failure.code(), error_class(failure)) == (C.NOT_FOUND, "NotFound")


# --- Readiness and limits ------------------------------------------------------------------------------------
async def test_nothing_is_known_before_the_service_is_ready(stub: Any, backend: FakeBackend) -> None:
    backend.ready = False
    backend.layers = {}
    for call in (
        stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny")),
        stub.ModelConfig(pb.ModelConfigRequest(name="tiny")),
        stub.ModelStatistics(pb.ModelStatisticsRequest()),
        stub.RepositoryIndex(pb.RepositoryIndexRequest()),
        stub.ModelInfer(generate()),
    ):
        failure = await refusal(call)
        assert (failure.code(), error_class(failure)) == (C.UNAVAILABLE, "Unavailable")
    ready = pb.RepositoryIndexRequest(ready=True)
    assert not (await stub.RepositoryIndex(ready)).models
    (answer,) = await stream(stub, generate(request_id="early"))
    assert "the service is not ready" in answer.error_message
    assert answer.infer_response.id == "early"


async def test_a_stopping_service_is_live_but_takes_nothing(
    stub: Any, guard_and_channel: tuple[Guard, grpc.aio.Channel]
) -> None:
    guard_and_channel[0].admission.stopping = True
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest())
    assert {model.state for model in index.models} == {"UNAVAILABLE"}
    assert (await refusal(stub.ModelInfer(generate()))).code() == C.UNAVAILABLE


async def test_unknown_repositories_and_versions_have_nothing(stub: Any) -> None:
    assert not (await stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="mine"))).models
    failure = await refusal(stub.ModelStatistics(pb.ModelStatisticsRequest(version="2")))
    assert failure.code() == C.NOT_FOUND


async def test_a_layer_that_takes_too_long_is_given_up(stub: Any, backend: FakeBackend) -> None:
    backend.hold_after = 0
    failure = await refusal(stub.ModelInfer(call_layer(timeout=20_000)))
    assert (failure.code(), error_class(failure)) == (C.DEADLINE_EXCEEDED, "DeadlineExceeded")
    assert "gave no answer within 0.02 s" in str(failure.details())
    assert backend.closed.is_set()


async def test_the_time_limit_of_a_generation_is_the_shorter_one(stub: Any, backend: FakeBackend) -> None:
    await stub.ModelInfer(generate(timeout=2_500_000), timeout=100)
    await stub.ModelInfer(generate(timeout=0))
    assert [request.timeout_s for request in backend.requests] == [2.5, None]


async def test_a_fault_is_logged_under_an_id(stub: Any, backend: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    backend.failure = RuntimeError("secret")
    with caplog.at_level(logging.ERROR):
        failure = await refusal(stub.ModelInfer(call_layer()))
        (answer,) = await stream(stub, call_layer("mine"))
    for told in (str(failure.details()), answer.error_message):
        assert told.startswith("fault ")
        assert "secret" not in told
    assert caplog.text.count("RuntimeError: secret") == 2


# --- Streams -------------------------------------------------------------------------------------------------
async def stream(stub: Any, *requests: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    return [answer async for answer in stub.ModelStreamInfer(iter(requests))]


async def test_generations_on_a_stream_run_side_by_side(stub: Any, backend: FakeBackend) -> None:
    backend.hold_after = 1
    call = stub.ModelStreamInfer(iter([generate(3, "a"), generate(3, "b"), call_layer("c")]))
    await asyncio.wait_for(backend.both_open.wait(), 10)
    backend.released.set()
    answers = [answer.infer_response async for answer in call]
    assert {answer.id for answer in answers[-2:]} <= {"a", "b"}
    for name in ("a", "b"):
        mine = [answer for answer in answers if answer.id == name]
        assert [answer.parameters[FINAL].bool_param for answer in mine] == [False, False, True]
    assert [answer.parameters[FINAL].bool_param for answer in answers if answer.id == "c"] == [True]


async def test_layers_on_a_stream_are_answered_in_order(stub: Any, backend: FakeBackend) -> None:
    requests = [call_layer(str(number), HIDDEN + number) for number in range(20)]
    answers = await stream(stub, *requests)
    assert [answer.infer_response.id for answer in answers] == [str(number) for number in range(20)]
    assert [float(call[1][0, 0]) for call in backend.calls] == list(range(20))


async def test_a_failed_request_is_answered_by_its_error_and_the_stream_goes_on(
    stub: Any, guard_and_channel: tuple[Guard, grpc.aio.Channel], backend: FakeBackend
) -> None:
    wrong = call_layer("wrong", HIDDEN[:, 1:])
    unknown = pb.ModelInferRequest(model_name="nobody", id="unknown")
    sent = [wrong.SerializeToString(), b"\xff", unknown.SerializeToString(), call_layer("right").SerializeToString()]
    call: Any = guard_and_channel[1].stream_stream(f"/{SERVICE}/ModelStreamInfer", None, None)(iter(sent))
    answers = [pb.ModelStreamInferResponse.FromString(data) async for data in call]
    assert [answer.infer_response.id for answer in answers] == ["wrong", "", "unknown", "right"]
    assert [bool(answer.error_message) for answer in answers] == [True, True, True, False]
    assert "has shape [2, 3]; expected [-1, 4]" in answers[0].error_message
    assert "are not a ModelInferRequest" in answers[1].error_message
    assert "there is no model 'nobody'" in answers[2].error_message
    assert await call.code() == C.OK


async def test_a_generation_that_fails_midway_ends_with_an_error_message(stub: Any, backend: FakeBackend) -> None:
    backend.hold_after = 1
    call = stub.ModelStreamInfer(iter([generate(3, "a")]))
    await asyncio.wait_for(backend.reached.wait(), 10)
    backend.failure = Unavailable("the experts are gone: retry")
    backend.released.set()
    answers = [answer async for answer in call]
    assert [answer.error_message for answer in answers] == ["", "the experts are gone: retry"]
    (totals,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="tiny"))).model_stats
    assert (totals.inference_stats.success.count, totals.inference_stats.fail.count) == (0, 1)


async def test_the_guard_sees_the_call_of_a_request_on_a_stream(
    stub: Any, guard_and_channel: tuple[Guard, grpc.aio.Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    errors = guard_and_channel[0].errors

    def watching(context: Any) -> Any:
        seen.append(dict(context.invocation_metadata())["who"])
        return errors(context)

    monkeypatch.setattr(guard_and_channel[0], "errors", watching)
    answers = [answer async for answer in stub.ModelStreamInfer(iter([call_layer()]), metadata=(("who", "me"),))]
    assert not answers[0].error_message
    assert seen == ["me"] * 3  # the call, the reading of its request, and the work


async def nothing_until(may_end: asyncio.Event) -> AsyncIterator[pb.ModelInferRequest]:
    await may_end.wait()
    none: tuple[pb.ModelInferRequest, ...] = ()
    for request in none:
        yield request


async def test_each_request_of_a_stream_is_admitted_by_itself(stub: Any, backend: FakeBackend) -> None:
    backend.hold_after = 0
    may_end = asyncio.Event()
    idle = stub.ModelStreamInfer(nothing_until(may_end))
    call = stub.ModelStreamInfer(iter([generate(1, name) for name in "abcd"]))
    answers = aiter(call)
    refused = await anext(answers)
    assert "3 requests are being served, which is the limit" in refused.error_message
    assert refused.infer_response.id == "d"
    assert (await refusal(stub.ModelInfer(generate()))).code() == C.RESOURCE_EXHAUSTED
    backend.released.set()
    assert {answer.infer_response.id async for answer in answers} == {"a", "b", "c"}
    may_end.set()
    assert [answer async for answer in idle] == []


async def test_bytes_in_flight_are_counted_and_given_back(stub: Any, backend: FakeBackend) -> None:
    backend.hold_after = 0
    held = asyncio.ensure_future(stub.ModelInfer(call_layer(hidden=np.zeros((20, WIDTH)))))
    await asyncio.wait_for(backend.reached.wait(), 10)
    (answer,) = await stream(stub, call_layer("big", np.zeros((20, WIDTH))))
    assert "may be in flight" in answer.error_message
    backend.released.set()
    await held
    (answer,) = await stream(stub, call_layer("big", np.zeros((20, WIDTH))))
    assert not answer.error_message
    assert (await stub.ModelInfer(generate())).outputs


async def test_cancelling_a_stream_ends_its_work(
    stub: Any, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.hold_after = 1
    call = stub.ModelStreamInfer(iter([generate(3, "a"), generate(3, "b")]))
    await asyncio.wait_for(backend.both_open.wait(), 10)
    await asyncio.wait_for(backend.reached.wait(), 10)
    call.cancel()
    assert await nothing_runs(backend)
    assert (await stub.ModelInfer(call_layer())).outputs
    assert caplog.text == ""


async def nothing_runs(backend: FakeBackend) -> bool:
    for _ in range(1000):
        if backend.num_open == 0:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_stream_is_not_read_on_while_too_many_of_its_requests_are_open(
    stub: Any, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_OPEN_REQUESTS", 2)  # below the limit of the server, which would refuse the fourth
    backend.hold_after = 1
    call = stub.ModelStreamInfer(iter([generate(2, name) for name in "abcd"]))
    await asyncio.wait_for(backend.both_open.wait(), 10)
    backend.released.set()
    answers = [answer async for answer in call]
    assert not any(answer.error_message for answer in answers)
    assert {answer.infer_response.id for answer in answers} == set("abcd")
