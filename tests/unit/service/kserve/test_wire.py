"""Our messages are those of the official protocol: every name, number and type of ours is there too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from ray_moe.wire.kserve import grpc_service_pb2 as pb


def official(full_name: str) -> Any:
    pool = service_pb2.DESCRIPTOR.pool
    assert pool is model_config_pb2.DESCRIPTOR.pool
    return pool.FindMessageTypeByName(full_name)


def with_nested(messages: Any) -> Iterator[Any]:
    for message in messages:
        yield message
        yield from with_nested(message.nested_types)


MESSAGES = list(with_nested(pb.DESCRIPTOR.message_types_by_name.values()))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.full_name)
def test_a_message_is_compatible(message: Any) -> None:
    theirs = official(message.full_name)
    for field in message.fields:
        other = theirs.fields_by_name[field.name]
        for fact in ("number", "type", "is_repeated"):
            assert getattr(field, fact) == getattr(other, fact), (field.full_name, fact)
        assert (field.message_type and field.message_type.full_name) == (
            other.message_type and other.message_type.full_name
        )
        assert (field.containing_oneof and field.containing_oneof.name) == (
            other.containing_oneof and other.containing_oneof.name
        )


def test_datatypes_are_numbered_alike() -> None:
    assert dict(pb.DataType.items()) == dict(model_config_pb2.DataType.items())


def test_methods_take_and_give_the_same_messages() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for name, method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name.items():
        other = theirs[name]
        assert method.input_type.full_name == other.input_type.full_name
        assert method.output_type.full_name == other.output_type.full_name
        assert (method.client_streaming, method.server_streaming) == (other.client_streaming, other.server_streaming)


def test_both_live_in_one_process_without_knowing_each_other() -> None:
    assert pb.DESCRIPTOR.pool is not service_pb2.DESCRIPTOR.pool
    ours = pb.ModelInferRequest(model_name="m", parameters={"a": pb.InferParameter(uint64_param=2**64 - 1)})
    theirs = service_pb2.ModelInferRequest.FromString(ours.SerializeToString())
    assert theirs.parameters["a"].uint64_param == 2**64 - 1
    assert pb.ModelInferRequest.FromString(theirs.SerializeToString()) == ours
