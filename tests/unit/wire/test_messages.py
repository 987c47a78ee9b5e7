"""Values to messages and back, without loss."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from google.protobuf.message import Message

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.types import (
    ChaosReport,
    ChaosRequest,
    ClusterEvent,
    GenerateChunk,
    GenerateRequest,
    HostAddress,
    HostStatus,
    PlannedMove,
    PlanSummary,
    RouterAddress,
    RouterStatus,
    ServiceStatus,
    TokenLogprob,
)
from ray_moe.wire import messages
from ray_moe.wire.v1 import admin_pb2, inference_pb2
from tests.unit.service.fake_backend import PLAN, REPORT, STATUS, TABLE

NOT_SENT = {"timeout_s", "caller"}
"""Of a request: its call has a deadline, and the service knows who asks."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (GenerateRequest, inference_pb2.GenerateRequest),
        (GenerateChunk, inference_pb2.GenerateResponse),
        (TokenLogprob, inference_pb2.TokenLogprob),
        (RouterAddress, inference_pb2.RouterAddress),
        (ServiceStatus, admin_pb2.StatusResponse),
        (RouterStatus, admin_pb2.RouterStatus),
        (HostStatus, admin_pb2.HostStatus),
        (HostAddress, admin_pb2.HostAddress),
        (ClusterEvent, admin_pb2.ClusterEvent),
        (PlannedMove, admin_pb2.PlannedMove),
        (PlanSummary, admin_pb2.PlanResponse),
        (ChaosRequest, admin_pb2.ChaosRequest),
        (ChaosReport, admin_pb2.ChaosResponse),
    ],
)
def test_values_and_messages_have_the_same_fields(value: Any, message: type[Message]) -> None:
    names = [field.name for field in fields(value) if field.name not in NOT_SENT]
    assert names == [field.name for field in message.DESCRIPTOR.fields]


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(prompt="Grüße"),
        GenerateRequest(prompt=""),
        GenerateRequest(token_ids=()),
        GenerateRequest(None, (1, 2), 3, 0.7, 0.9, 2**64 - 1, True),
        GenerateRequest(None, (1, 2), 3, 0.7, 0.9, 1, True, 40, 0.1, 1.2, 0.5, 0.25, ("a", "b"), (7, 8), 5),
    ],
)
def test_generate_requests_come_back(request_: GenerateRequest) -> None:
    assert messages.generate_request_from_proto(messages.generate_request_to_proto(request_)) == request_


def test_an_empty_generate_request_has_the_defaults() -> None:
    assert messages.generate_request_from_proto(inference_pb2.GenerateRequest()) == GenerateRequest()


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(),
        GenerateRequest("x", (1,)),
        GenerateRequest("\ud800"),
        GenerateRequest("x", max_new_tokens=2**31),
        GenerateRequest("x", seed=-1),
        GenerateRequest(token_ids=(2**63,)),
        GenerateRequest(token_ids=(1.5,)),  # type: ignore[arg-type]
    ],
)
def test_what_no_message_can_hold_is_refused(request_: GenerateRequest) -> None:
    with pytest.raises(InvalidRequest):
        messages.generate_request_to_proto(request_)


def test_chunks_status_and_table_come_back() -> None:
    chunk = GenerateChunk(
        (1,), "é", "stop", 9, 4, (TokenLogprob(1, -0.5, (TokenLogprob(1, -0.5), TokenLogprob(7, -1.0))),)
    )
    assert messages.chunk_from_proto(messages.chunk_to_proto(chunk)) == chunk
    assert messages.status_from_proto(messages.status_to_proto(STATUS)) == STATUS
    table = messages.table_from_proto(messages.table_to_proto(TABLE))
    assert table == TABLE
    assert list(table.placement.hosts_of) == list(TABLE.placement.hosts_of)  # the order of the model


def test_plans_and_chaos_come_back() -> None:
    assert messages.plan_from_proto(messages.plan_to_proto(PLAN)) == PLAN
    request = ChaosRequest("slow", "node:ab", 1.5, 2.5, 30.0, 7)
    assert messages.chaos_request_from_proto(messages.chaos_request_to_proto(request)) == request
    assert messages.chaos_report_from_proto(messages.chaos_report_to_proto(REPORT)) == REPORT
    with pytest.raises(InvalidRequest):
        messages.chaos_request_to_proto(ChaosRequest("kill", seed="x"))  # type: ignore[arg-type]


def test_bytes_that_are_no_message() -> None:
    with pytest.raises(WireError, match="not a GenerateRequest"):
        messages.parse(inference_pb2.GenerateRequest, b"\x0a\x02\xff\xff")  # a prompt that is not UTF-8
