"""Clients that go in the middle: their work ends, what was held for them is given back, and nobody else notices."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import grpc
import pytest

from tests.unit.service.hostile.grpc_corpus import FORWARD_STREAM, GOOD_FORWARD, generate
from tests.unit.service.hostile.http_corpus import body
from tests.unit.service.hostile.kserve_corpus import GOOD, STREAM, setting
from tests.unit.service.hostile.raw_corpus import CALL, LENGTH, begin, post
from tests.unit.service.hostile.service import GENERATE, POSITIONS, TIMEOUT_S, Service, calling
from tests.unit.service.hostile.sockets import DATA, END_STREAM, frame, leave

LONG = POSITIONS - 100
LONG_GENERATION = generate(max_new_tokens=LONG, ignore_eos=True).SerializeToString()
MESSAGE = b"\0" + len(LONG_GENERATION).to_bytes(4, "big") + LONG_GENERATION


def generation_over_grpc(service: Service) -> None:
    call = calling(service.channel, GENERATE, [LONG_GENERATION])
    next(call)
    call.cancel()


def layers_over_grpc(service: Service) -> None:
    call = calling(service.channel, FORWARD_STREAM, itertools.repeat(GOOD_FORWARD))
    for _ in range(5):
        next(call)
    call.cancel()


def generations_over_kserve(service: Service) -> None:
    request = setting(max_tokens=LONG, ignore_eos=True).SerializeToString()
    call = calling(service.channel, STREAM, [request] * 5)
    next(call)
    call.cancel()


def layers_over_kserve(service: Service) -> None:
    call = calling(service.channel, STREAM, itertools.repeat(GOOD))
    for _ in range(5):
        next(call)
    call.cancel()


def generation_in_no_time(service: Service) -> None:
    call = calling(service.channel, GENERATE, [LONG_GENERATION], 0.1)
    with pytest.raises(grpc.RpcError):
        list(call)


def generation_over_http(service: Service) -> None:
    content = body(max_tokens=LONG, stream=True, ignore_eos=True)
    with service.http.stream(
        "POST", "/v1/completions", content=content, headers={"content-type": "application/json"}
    ) as r:
        assert next(r.iter_bytes())


def fifty_answers_over_http(service: Service) -> None:
    leave(service.http_port, _sized(body(max_tokens=LONG, n=50)), reset=False)


def reset_over_http(service: Service) -> None:
    leave(service.http_port, _sized(body(max_tokens=LONG, stream=True)), reset=True)


def half_a_body(service: Service) -> None:
    leave(service.http_port, post(LENGTH, content=b"{"), reset=False)


def reset_over_grpc(service: Service) -> None:
    leave(service.grpc_port, begin(CALL) + frame(DATA, END_STREAM, 1, MESSAGE), reset=True)


def closed_over_grpc(service: Service) -> None:
    leave(service.grpc_port, begin(CALL) + frame(DATA, END_STREAM, 1, MESSAGE), reset=False)


def half_a_message(service: Service) -> None:
    leave(service.grpc_port, begin(CALL) + frame(DATA, 0, 1, MESSAGE[:10]), reset=True)


def a_call_without_a_message(service: Service) -> None:
    leave(service.grpc_port, begin(CALL), reset=True)


def _sized(content: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(content), content=content)


@pytest.mark.parametrize(
    "go",
    [
        generation_over_grpc,
        layers_over_grpc,
        generations_over_kserve,
        layers_over_kserve,
        generation_in_no_time,
        generation_over_http,
        fifty_answers_over_http,
        reset_over_http,
        half_a_body,
        reset_over_grpc,
        closed_over_grpc,
        half_a_message,
        a_call_without_a_message,
    ],
    ids=lambda go: go.__name__,
)
def test_who_leaves_leaves_nothing_behind(service: Service, go: Callable[[Service], None]) -> None:
    for _ in range(3):
        go(service)
        service.check("grpc")
    end_s = time.monotonic() + TIMEOUT_S
    while service.facts()["active"] > 1:  # the witness is one
        assert time.monotonic() < end_s, "what nobody waits for is still being computed"
        time.sleep(0.05)


def test_a_client_that_does_not_read_holds_nobody_up(service: Service) -> None:
    request = generate(max_new_tokens=500, ignore_eos=True, logprobs=20).SerializeToString()
    unread = [calling(service.channel, GENERATE, [request]) for _ in range(8)]
    for _ in range(5):
        service.check("grpc")
    for call in unread:
        call.cancel()
