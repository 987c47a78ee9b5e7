"""Bytes that are no HTTP/2 or no gRPC: the connection is hung up on or goes on, and nobody else notices."""

from __future__ import annotations

import pytest

from tests.unit.service.hostile.raw_corpus import EITHER, GRPC
from tests.unit.service.hostile.service import TIMEOUT_S, Service
from tests.unit.service.hostile.sockets import speak


@pytest.mark.parametrize("name", GRPC)
def test_bytes_that_are_no_call_harm_nobody(service: Service, name: str) -> None:
    sent, ending = GRPC[name]
    frames, has_hung_up = speak(service.grpc_port, sent, TIMEOUT_S)
    assert ending in (EITHER, has_hung_up), frames
    service.check("grpc")
