"""NVIDIA's own client against the service, in the same process: blocking and asynchronous."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.unit.service.fake_backend import GATELESS, LAYERS, WIDTH, FakeBackend
from tests.unit.service.kserve.serving import LAYER_MODEL, serving, serving_in_thread

HIDDEN = np.arange(3 * WIDTH, dtype=np.float32).reshape(3, WIDTH)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[Any]:
    with serving_in_thread(backend) as target, triton.InferenceServerClient(target) as client:
        yield client


@pytest.fixture
async def aio_client(backend: FakeBackend) -> AsyncIterator[Any]:
    async with serving(backend) as (target, _), triton_aio.InferenceServerClient(target) as client:
        yield client


def given(name: str, values: Any, datatype: str | None = None, module: Any = triton) -> Any:
    array = np.asarray(values)
    tensor = module.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def words(*values: str) -> Any:
    return np.array([value.encode() for value in values], object)


# --- What there is -------------------------------------------------------------------------------------------
def test_a_ready_service_says_so(client: Any, backend: FakeBackend) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready(LAYER_MODEL, "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("other")
    backend.ready = False
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert not client.is_model_ready("tiny")


def test_the_server_and_its_models_are_described(client: Any) -> None:
    server = client.get_server_metadata()
    assert server.name == "ray_moe"
    assert set(server.extensions) == {"model_configuration", "parameters", "statistics"}
    index = client.get_model_repository_index()
    assert [(model.name, model.version, model.state) for model in index.models] == [
        (name, "1", "READY") for name in ("tiny", *(f"tiny/{layer}" for layer in LAYERS))
    ]
    layer = client.get_model_metadata(LAYER_MODEL, as_json=True)
    assert layer["versions"] == ["1"]
    assert [(each["name"], each["datatype"], each["shape"]) for each in layer["inputs"]] == [
        ("hidden", "FP32", ["-1", "4"]),
        ("index", "INT64", ["-1", "-1"]),
        ("weight", "FP32", ["-1", "-1"]),
    ]
    whole = client.get_model_metadata("tiny")
    assert {"text_input", "token_ids", "max_tokens", "stop"} <= {each.name for each in whole.inputs}
    assert {"text_output", "token_ids", "finish_reason"} <= {each.name for each in whole.outputs}


def test_a_configuration_tells_what_may_be_left_out(client: Any) -> None:
    config = client.get_model_config(LAYER_MODEL).config
    assert (config.name, config.backend, config.max_batch_size) == (LAYER_MODEL, "ray_moe", 0)
    assert not config.model_transaction_policy.decoupled
    assert [(each.name, each.optional) for each in config.input] == [
        ("hidden", False),
        ("index", True),
        ("weight", True),
    ]
    gateless = client.get_model_config(f"tiny/{GATELESS}").config
    assert not any(each.optional for each in gateless.input)
    assert client.get_model_config("tiny").config.model_transaction_policy.decoupled


# --- Layers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_layer_answers_in_the_dtype_of_its_input(client: Any, backend: FakeBackend, dtype: Any) -> None:
    result = client.infer(LAYER_MODEL, [given("hidden", HIDDEN.astype(dtype))], request_id="mine")
    hidden = result.as_numpy("hidden")
    assert hidden.dtype == dtype
    np.testing.assert_array_equal(hidden, -HIDDEN)
    assert result.get_response().id == "mine"
    assert result.get_response().model_version == "1"
    assert backend.calls[0][1].dtype == dtype


def test_bfloat16_goes_there_and_back(client: Any) -> None:
    result = client.infer(
        LAYER_MODEL, [given("hidden", HIDDEN, "BF16")], outputs=[triton.InferRequestedOutput("hidden")]
    )
    assert result.get_output("hidden").datatype == "BF16"
    np.testing.assert_array_equal(result.as_numpy("hidden"), -HIDDEN)


@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_given_experts_are_used(client: Any, backend: FakeBackend, integer: Any) -> None:
    index = np.array([[0, 3], [1, 2], [3, 3]], integer)  # 3 is no expert
    weight = np.array([[1, 9], [0.5, 2], [1, 1]], np.float32)
    inputs = [given("weight", weight), given("hidden", HIDDEN), given("index", index)]
    result = client.infer(LAYER_MODEL, inputs, compression_algorithm="gzip")
    np.testing.assert_array_equal(result.as_numpy("hidden"), HIDDEN * [[1], [7], [0]])
    routing = backend.calls[0][2]
    assert routing is not None
    assert routing[0].dtype == np.int64


def test_no_tokens_are_an_answer_too(client: Any, backend: FakeBackend) -> None:
    result = client.infer(LAYER_MODEL, [given("hidden", HIDDEN[:0])])
    assert result.as_numpy("hidden").shape == (0, WIDTH)
    assert backend.calls == []


async def test_a_large_batch_goes_through_whole(aio_client: Any, backend: FakeBackend) -> None:
    width = 2**14
    backend.layers = {path: spec_of(backend, path, width) for path in LAYERS}
    hidden = np.random.default_rng(1).normal(size=(32, width)).astype(np.float32)
    result = await aio_client.infer(LAYER_MODEL, [given("hidden", hidden, module=triton_aio)])
    np.testing.assert_array_equal(result.as_numpy("hidden"), -hidden)


def spec_of(backend: FakeBackend, path: str, width: int) -> Any:
    spec = backend.layers[path]
    return type(spec)(path, spec.num_experts, width, width, spec.dtype, spec.expert_bytes)


# --- Generation ----------------------------------------------------------------------------------------------
async def test_a_generation_is_one_answer(aio_client: Any, backend: FakeBackend) -> None:
    backend.weights = [4]
    inputs = [
        given("text_input", words("hello")),
        given("temperature", np.array([0.5], np.float32)),
        given("stop", words("x", "y")),
        given("stop_token_ids", np.array([7, 8], np.int32)),
    ]
    settings = {"max_tokens": 3, "top_p": "0.25", "top_k": 9, "seed": 11, "ignore_eos": True}
    result = await aio_client.infer("tiny", inputs, request_id="a", parameters=settings, client_timeout=9.0)
    assert result.as_numpy("text_output").tolist() == [b"0 1 2 "]
    assert result.as_numpy("token_ids").tolist() == [0, 1, 2]
    assert result.as_numpy("finish_reason").tolist() == [b"length"]
    assert result.get_response().parameters["weights_version"].int64_param == 4
    (asked,) = backend.requests
    assert (asked.prompt, asked.max_new_tokens, asked.temperature, asked.top_p) == ("hello", 3, 0.5, 0.25)
    assert (asked.top_k, asked.seed, asked.ignore_eos, asked.stop) == (9, 11, True, ("x", "y"))
    assert asked.stop_token_ids == (7, 8)
    assert asked.timeout_s is not None
    assert 0 < asked.timeout_s < 10  # the client's deadline, which gRPC rounds up as it travels


def test_tokens_go_in_and_chosen_outputs_come_back(client: Any, backend: FakeBackend) -> None:
    outputs = [triton.InferRequestedOutput(name) for name in ("num_prompt_tokens", "token_ids")]
    inputs = [given("token_ids", np.array([5, 6, 7])), given("max_tokens", np.array([2], np.int32))]
    result = client.infer("tiny", inputs, outputs=outputs)
    assert [output.name for output in result.get_response().outputs] == ["num_prompt_tokens", "token_ids"]
    assert result.as_numpy("num_prompt_tokens").tolist() == [3]
    assert result.as_numpy("token_ids").tolist() == [0, 1]
    assert backend.requests[0].token_ids == (5, 6, 7)


def test_pieces_come_one_by_one_and_the_last_is_marked(client: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    send = partial(client.async_stream_infer, "tiny", [given("text_input", words("x"))])
    send(request_id="good", parameters={"max_tokens": 3}, enable_empty_final_response=True)
    pieces = [answers.get(timeout=10) for _ in range(3)]
    assert [piece.get_response().parameters["weights_version"].int64_param for piece, _ in pieces] == [0, 0, 0]
    assert [error for _, error in pieces] == [None] * 3
    assert [result.as_numpy("text_output").tolist() for result, _ in pieces] == [[b"0 "], [b"1 "], [b"2 "]]
    responses = [result.get_response() for result, _ in pieces]
    assert [each.parameters["triton_final_response"].bool_param for each in responses] == [False, False, True]
    assert {each.id for each in responses} == {"good"}

    send(parameters={"max_tokens": 0})
    result, error = answers.get(timeout=10)
    assert result is None
    assert "max_tokens is 0; expected at least 1" in str(error)

    send(parameters={"max_tokens": 2, "stream": False})
    result, error = answers.get(timeout=10)
    assert error is None
    assert result.as_numpy("text_output").tolist() == [b"0 1 "]
    client.async_stream_infer(LAYER_MODEL, [given("hidden", HIDDEN)], request_id="layer")
    result, error = answers.get(timeout=10)
    assert error is None
    np.testing.assert_array_equal(result.as_numpy("hidden"), -HIDDEN)
    assert result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert answers.empty()


async def test_the_asynchronous_client_streams_too(aio_client: Any) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for name in ("a", "b"):
            inputs = [given("text_input", words(name), module=triton_aio)]
            yield {"model_name": "tiny", "inputs": inputs, "request_id": name, "parameters": {"max_tokens": 2}}

    texts: dict[str, list[bytes]] = {"a": [], "b": []}
    async for result, error in aio_client.stream_infer(requests()):
        assert error is None
        texts[result.get_response().id] += result.as_numpy("text_output").tolist()
    assert texts == {"a": [b"0 ", b"1 "], "b": [b"0 ", b"1 "]}


# --- Errors and statistics -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "version", "inputs", "options", "status", "said"),
    [
        ("tinny", "", [], {}, "NOT_FOUND", "no model 'tinny': did you mean tiny"),
        ("tiny", "3", [], {}, "NOT_FOUND", "no version '3'; expected '1' or none"),
        ("tiny/none", "", [], {}, "NOT_FOUND", "no model 'tiny/none'"),
        ("tiny", "", [given("prompt", words("x"))], {}, "INVALID_ARGUMENT", "has no input 'prompt'; expected text_in"),
        ("tiny", "", [], {}, "INVALID_ARGUMENT", "expects the input exactly one of text_input and token_ids"),
        ("tiny", "", [], {"sequence_id": 4}, "INVALID_ARGUMENT", "no parameter 'sequence_end'"),
        (LAYER_MODEL, "", [], {}, "INVALID_ARGUMENT", "input 'hidden' is missing"),
        (LAYER_MODEL, "", [given("hidden", HIDDEN.astype(np.int64))], {}, "INVALID_ARGUMENT", "datatype 'INT64'"),
        (LAYER_MODEL, "", [given("hidden", HIDDEN[:, :3])], {}, "INVALID_ARGUMENT", "has shape [3, 3]; expected [-1,"),
        (
            LAYER_MODEL,
            "",
            [given("hidden", np.full((3, WIDTH), np.inf, np.float32))],
            {},
            "INVALID_ARGUMENT",
            "expected finite numbers",
        ),
        (f"tiny/{GATELESS}", "", [given("hidden", HIDDEN)], {}, "UNIMPLEMENTED", "give routing (index and weight)"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    client: Any, model: str, version: str, inputs: list[Any], options: dict[str, Any], status: str, said: str
) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client.infer(model, inputs, version, **options)
    assert raised.value.status() == f"StatusCode.{status}"
    assert said in raised.value.message()


def test_shared_memory_and_classification_are_refused(client: Any) -> None:
    tensor = triton.InferInput("hidden", [3, WIDTH], "FP32")
    tensor.set_shared_memory("region", 48)
    with pytest.raises(InferenceServerException, match="parameter 'shared_memory_byte_size', which is not supported"):
        client.infer(LAYER_MODEL, [tensor])
    outputs = [triton.InferRequestedOutput("hidden", class_count=2)]
    with pytest.raises(InferenceServerException, match="output 'hidden' has the parameter 'classification'"):
        client.infer(LAYER_MODEL, [given("hidden", HIDDEN)], outputs=outputs)


def test_what_is_not_offered_is_not_implemented(client: Any) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client.load_model("tiny")
    assert raised.value.status() == "StatusCode.UNIMPLEMENTED"


def test_statistics_count_requests_and_their_time(client: Any) -> None:
    client.infer("tiny", [given("text_input", words("x"))], parameters={"max_tokens": 2})
    client.infer(LAYER_MODEL, [given("hidden", HIDDEN)])
    client.infer(LAYER_MODEL, [given("hidden", HIDDEN)])
    with pytest.raises(InferenceServerException):
        client.infer(LAYER_MODEL, [given("hidden", HIDDEN[:, :2])])
    everything = {each.name: each for each in client.get_inference_statistics().model_stats}
    assert list(everything) == ["tiny", *(f"tiny/{layer}" for layer in LAYERS)]
    layer = everything[LAYER_MODEL]
    assert (layer.inference_count, layer.execution_count, layer.version) == (2, 2, "1")
    assert layer.last_inference > 1.6e12
    stats = layer.inference_stats
    assert (stats.success.count, stats.fail.count) == (2, 1)
    phases = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert {phase.count for phase in phases} == {2}
    assert 0 < sum(phase.ns for phase in phases) <= stats.success.ns
    assert everything["tiny"].inference_stats.success.count == 1
    untouched = client.get_inference_statistics(f"tiny/{GATELESS}").model_stats
    assert [(each.inference_count, each.last_inference) for each in untouched] == [(0, 0)]
