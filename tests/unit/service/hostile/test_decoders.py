"""Fuzzing of the messages of both protocols of gRPC: an error of ours, or a sound value. See `fuzzing.py`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidRequest, RayMoEError, WireError
from ray_moe.service.grpc import training
from ray_moe.service.kserve import catalog, generation, layers
from ray_moe.service.kserve.parameters import read_options
from ray_moe.service.validation import chaos, check_generate, check_hidden, check_routing, find_layer, num_actors
from ray_moe.wire import arrays, messages
from ray_moe.wire.kserve import grpc_service_pb2 as kserve
from ray_moe.wire.status import CODES, from_status
from ray_moe.wire.v1 import admin_pb2, training_pb2
from ray_moe.wire.v1 import inference_pb2 as pb
from tests.unit.service.fake_backend import LAYER, NUM_EXPERTS, WIDTH
from tests.unit.service.hostile.fuzzing import BACKEND, FLOATS, INT64, REFUSED, assert_sound, encoded, fuzz
from tests.unit.service.hostile.kserve_corpus import ask, tokens

GOOD_GENERATE = pb.GenerateRequest(prompt="hello", max_new_tokens=3, temperature=1, top_p=0.5, stop=["x"], seed=1)
GOOD_MICRO = training_pb2.MicroBatch(id="a", input_ids=arrays.encode(np.array([[1, 2, 3]])), weight=0.5)
GOOD_STEP = training_pb2.StepOptions(id="a", step=3, lr=0.1, clip_norm=1.0)
GOOD_INFER = ask(tokens(5, 6), parameters={"max_tokens": 2, "temperature": 0.5, "timeout": 1000})
HIDDEN = ("hidden", "FP32", [2, WIDTH], np.ones((2, WIDTH), np.float32).tobytes())
ROUTING = (("index", "INT64", [2, 1], bytes(16)), ("weight", "FP32", [2, 1], bytes(8)))
GOOD_LAYER = ask(HIDDEN, *ROUTING, model=f"tiny/{LAYER}")


# --- ray_moe.v1 ----------------------------------------------------------------------------------------------
@fuzz
@given(encoded(pb.GenerateRequest, GOOD_GENERATE))
def test_a_generate_request_is_refused_or_sound(data: bytes) -> None:
    try:
        request = messages.generate_request_from_proto(messages.parse(pb.GenerateRequest, data))
        check_generate(BACKEND, request, 1000)
    except REFUSED as error:
        assert error.message
    else:
        assert_sound(request)


@fuzz
@given(encoded(pb.ForwardRequest))
def test_a_forward_request_is_refused_or_sound(data: bytes) -> None:
    try:
        message = messages.parse(pb.ForwardRequest, data)
        which = message.WhichOneof("layer")
        spec = find_layer(BACKEND, None if which is None else getattr(message, which))
        hidden = arrays.decode(message.hidden, name="hidden")
        check_hidden(spec, hidden, 100)
        index, weight = (arrays.decode(part) for part in (message.routing.index, message.routing.weight))
        check_routing(spec, len(hidden), index, weight)
    except REFUSED as error:
        assert error.message
    else:
        assert hidden.shape[1] == WIDTH and np.isfinite(hidden).all()
        assert index.shape == weight.shape and 0 <= index.min(initial=0) <= index.max(initial=0) <= NUM_EXPERTS


@st.composite
def plausible_forwards(draw: st.DrawFn) -> pb.ForwardRequest:
    """With tensors of the right kind, so that what is wrong is wrong in their numbers."""
    num_tokens, top_k = draw(st.integers(0, 3)), draw(st.integers(0, NUM_EXPERTS + 1))
    numbers = FLOATS if draw(st.booleans()) else st.floats(-1, 1)
    hidden = np.array(draw(st.lists(numbers, min_size=num_tokens * WIDTH, max_size=num_tokens * WIDTH)))
    index = draw(
        st.lists(st.integers(-1, NUM_EXPERTS + 1) | INT64, min_size=num_tokens * top_k, max_size=num_tokens * top_k)
    )
    weight = draw(st.lists(FLOATS, min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    with np.errstate(over="ignore"):
        return pb.ForwardRequest(
            layer_path=LAYER,
            hidden=arrays.encode(hidden.reshape(num_tokens, WIDTH), draw(st.sampled_from([1, 2, 3, 4]))),  # type: ignore[arg-type]
            routing=pb.Routing(
                index=arrays.encode(np.array(index, np.int64).reshape(num_tokens, top_k)),
                weight=arrays.encode(np.array(weight, float).reshape(num_tokens, top_k)),
            ),
        )


@fuzz
@given(plausible_forwards())
def test_numbers_are_refused_or_in_range(message: pb.ForwardRequest) -> None:
    test_a_forward_request_is_refused_or_sound.hypothesis.inner_test(message.SerializeToString())  # type: ignore[attr-defined]


@fuzz
@given(encoded(admin_pb2.ChaosRequest), encoded(admin_pb2.ResizeRequest))
def test_wishes_are_refused_or_sound(of_chaos: bytes, of_size: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        request = chaos(messages.chaos_request_from_proto(messages.parse(admin_pb2.ChaosRequest, of_chaos)))
        assert 0 <= request.at_s <= 3600 and 0 < request.duration_s <= 3600 and 1 <= request.factor < math.inf
    with contextlib.suppress(InvalidRequest):
        assert 0 <= num_actors(messages.parse(admin_pb2.ResizeRequest, of_size).num_actors) <= 100_000


@fuzz
@given(encoded(training_pb2.MicroBatch, GOOD_MICRO), encoded(training_pb2.StepOptions, GOOD_STEP))
def test_a_micro_batch_and_a_step_are_refused_or_sound(of_micro: bytes, of_step: bytes) -> None:
    with contextlib.suppress(*REFUSED):
        micro = training.read_micro_batch(BACKEND, messages.parse(training_pb2.MicroBatch, of_micro), 100)
        ids, labels = micro.input_ids, micro.labels
        assert ids.ndim == 2 and ids.shape == labels.shape and ids.size <= 100 and math.isfinite(micro.weight)
        assert 0 <= ids.min() <= ids.max() < BACKEND.vocab_size
        assert ((labels == -100) | ((labels >= 0) & (labels < BACKEND.vocab_size))).all()
    with contextlib.suppress(*REFUSED):
        options = training.read_options(messages.parse(training_pb2.StepOptions, of_step))
        assert 0 < len(options.op_id) <= 64 and (options.step or 0) >= 0
        assert 0 <= (options.lr or 0.0) < math.inf and (options.clip_norm is None or options.clip_norm > 0)


RESPONSES: list[tuple[type[Message], Callable[[Any], object]]] = [
    (pb.GenerateResponse, messages.chunk_from_proto),
    (admin_pb2.StatusResponse, messages.status_from_proto),
    (admin_pb2.PlacementResponse, messages.table_from_proto),
    (admin_pb2.PlanResponse, messages.plan_from_proto),
    (admin_pb2.ChaosResponse, messages.chaos_report_from_proto),
    (training_pb2.ForwardBackwardResponse, messages.micro_batch_report_from_proto),
    (training_pb2.OptimStepResponse, messages.step_result_from_proto),
    (training_pb2.SaveStateResponse, messages.saved_state_from_proto),
    (training_pb2.GetStateResponse, messages.training_state_from_proto),
]


@pytest.mark.parametrize(("kind", "convert"), RESPONSES, ids=lambda each: getattr(each, "__name__", ""))
def test_what_a_service_answers_is_refused_or_read(kind: type[Message], convert: Callable[[Any], object]) -> None:
    """The client reads it, and the service may be another one than it thinks."""

    @fuzz
    @given(encoded(kind))
    def check(data: bytes) -> None:
        with contextlib.suppress(WireError):
            assert convert(messages.parse(kind, data)) is not None

    check()


@fuzz
@given(st.sampled_from(sorted({code for code, _ in CODES.values()}, key=str)), st.text(), st.text(), st.text())
def test_any_status_is_an_error_of_ours(code: Any, details: str, name: str, retry_after_s: str) -> None:
    error = from_status(code, details, name, retry_after_s)
    assert isinstance(error, RayMoEError)
    assert error.retry_after_s is None or 0 <= error.retry_after_s < math.inf


# --- the Open Inference Protocol -----------------------------------------------------------------------------
@fuzz
@given(
    encoded(kserve.ModelInferRequest, GOOD_INFER) | encoded(kserve.ModelInferRequest, GOOD_LAYER),
    st.sampled_from(["", "tiny", f"tiny/{LAYER}"]),
)
def test_an_inference_request_is_refused_or_sound(data: bytes, model_name: str) -> None:
    try:
        request = messages.parse(kserve.ModelInferRequest, data)
        request.model_name = model_name or request.model_name
        request.model_version = "" if model_name else request.model_version
        model = catalog.find_model(BACKEND, request.model_name, request.model_version)
        options = read_options(request)
        if model.layer is not None:
            asked = layers.read(BACKEND, request, model, model.layer, max_forward_tokens=100)
            assert asked.hidden.shape[1] == WIDTH and np.isfinite(asked.hidden).all()
        else:
            wanted = generation.read(BACKEND, request, model, max_prompt_bytes=1000, on_stream=True)
            assert_sound(wanted.request)
    except REFUSED as error:
        assert error.message
    else:
        assert options.timeout_s is None or options.timeout_s > 0
