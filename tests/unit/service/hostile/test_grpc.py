"""Malformed calls over gRPC: each ends in time with the status that says what is wrong, and harms nobody."""

from __future__ import annotations

import grpc
import pytest

from tests.unit.service.hostile.grpc_corpus import CORPUS as GRPC
from tests.unit.service.hostile.grpc_corpus import Call
from tests.unit.service.hostile.kserve_corpus import CORPUS as KSERVE
from tests.unit.service.hostile.service import WITNESS, Service, calling


def assert_refused(channel: grpc.Channel, call: Call) -> None:
    answers: list[bytes] = []
    going = calling(channel, call.path, call.sent, metadata=tuple(call.metadata), compression=call.compression)
    try:
        answers.extend(going)
    except grpc.RpcError as error:
        assert error is going
    details = going.details() or ""
    assert going.code() is call.code, details
    assert call.says in details
    assert len(answers) == call.num_answers
    assert not [said for said in (details.encode(), *answers) if WITNESS.encode() in said]


@pytest.mark.parametrize("name", GRPC)
def test_a_malformed_call_is_told_what_is_wrong(service: Service, name: str) -> None:
    assert_refused(service.channel, GRPC[name])
    service.check("grpc")


@pytest.mark.parametrize("name", KSERVE)
def test_a_malformed_call_of_the_open_inference_protocol_is_told_what_is_wrong(service: Service, name: str) -> None:
    assert_refused(service.channel, KSERVE[name])
    service.check("kserve")
