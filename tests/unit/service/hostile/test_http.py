"""Malformed requests over HTTP: each ends in time with the status and the error object that say what is wrong."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.service.hostile.http_corpus import CORPUS
from tests.unit.service.hostile.raw_corpus import HTTP, LATE, Raw
from tests.unit.service.hostile.service import TIMEOUT_S, WITNESS, Service
from tests.unit.service.hostile.sockets import exchange


@pytest.mark.parametrize("name", CORPUS)
def test_a_malformed_request_is_told_what_is_wrong(service: Service, name: str) -> None:
    asked = CORPUS[name]
    reply = service.http.request(asked.method, asked.path, content=asked.body, headers=dict(asked.headers))
    assert reply.status_code == asked.status, reply.text[:500]
    assert asked.says in reply.text
    if asked.status >= 400:
        assert list(reply.json()) == ["error"]
        assert reply.json()["error"]["message"]
    assert WITNESS not in reply.text
    service.check("http")


def test_a_request_that_does_not_come_is_not_waited_for(service: Service) -> None:
    with ThreadPoolExecutor(len(LATE)) as threads:
        asked = {name: threads.submit(exchange, service.http_port, [sent], TIMEOUT_S) for name, sent in LATE.items()}
        service.check("http")
    for name, answer in asked.items():
        assert b"HTTP/1.1 408 Request Timeout" in answer.result(), name
        assert b"connection: close" in answer.result().lower()


@pytest.mark.parametrize("name", HTTP)
def test_bytes_that_are_no_request_are_refused_and_nothing_is_hidden_in_them(service: Service, name: str) -> None:
    raw: Raw = HTTP[name]
    answer = exchange(service.http_port, raw.sent, TIMEOUT_S)
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
    assert statuses == list(raw.statuses), answer[:2000]
    assert WITNESS.encode() not in answer
    service.check("http")
