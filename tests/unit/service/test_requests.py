"""Ids of requests and lines of the log, through the doors of a router."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.config import RayConfig, ServerConfig
from ray_moe.service.cluster import join
from ray_moe.service.doors import Doors
from ray_moe.service.keys import ApiKey, digest_of, editing, new_key
from ray_moe.service.requests import handling
from ray_moe.wire.kserve import grpc_service_pb2 as kserve_pb
from ray_moe.wire.status import REQUEST_ID_KEY, from_status
from ray_moe.wire.v1 import admin_pb2, inference_pb2
from tests.unit.service.fake_backend import FakeBackend

GENERATE = "/ray_moe.v1.Inference/Generate"
COMPLETION = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@asynccontextmanager
async def doors(backend: FakeBackend, **settings: Any) -> AsyncIterator[tuple[grpc.aio.Channel, httpx.AsyncClient]]:
    """Clients of both doors of a router."""
    opened = Doors(backend, ServerConfig(port=0, http_port=0, **settings))
    ports = await opened.start()
    try:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.http}") as http,
        ):
            yield channel, http
    finally:
        await opened.stop(0.0)


def generate(channel: grpc.aio.Channel, prompt: str, metadata: dict[str, str] | None = None) -> Any:
    data = inference_pb2.GenerateRequest(prompt=prompt, max_new_tokens=2).SerializeToString()
    return channel.unary_stream(GENERATE, None, None)(data, metadata=tuple((metadata or {}).items()))


async def id_told(call: Any) -> str:
    """By the server's metadata, once the call has ended, however it did."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass
    (told,) = (value for name, value in await call.trailing_metadata() if name == REQUEST_ID_KEY)
    return str(told)


# --- Ids -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("sent", "is_kept"), [("abc-1 2", True), ("x" * 128, True), ("x" * 129, False), ("", False)])
async def test_both_doors_keep_an_id_that_is_sane_and_make_one_otherwise(backend, log, sent, is_kept):
    async with doors(backend) as (channel, http):
        by_grpc = await id_told(generate(channel, "hi", {REQUEST_ID_KEY: sent}))
        answer = await http.post("/v1/completions", json=COMPLETION, headers={REQUEST_ID_KEY: sent})
    by_http = answer.headers[REQUEST_ID_KEY]
    assert [line["request_id"] for line in log.requests] == [by_grpc, by_http]
    assert (by_grpc == by_http == sent) is is_kept
    if not is_kept:
        assert answer.json()["id"] == by_http.replace("req-", "cmpl-")


@given(st.text() | st.text(st.characters(max_codepoint=127)))
def test_an_id_always_fits_into_a_header_and_a_line(sent):
    with handling("grpc", "Generate", {REQUEST_ID_KEY: sent}) as request:
        assert request.id.isascii()
        assert request.id.isprintable()
        assert 0 < len(request.id.strip()) == len(request.id) <= 128


async def test_errors_come_with_the_id_by_every_door(backend, log):
    async with doors(backend) as (channel, http):
        refused = await id_told(generate(channel, ""))
        unknown = await http.get("/nowhere", headers={REQUEST_ID_KEY: "mine"})
        wrong = await http.post("/v1/completions", json={"model": "tiny"})
    assert unknown.headers[REQUEST_ID_KEY] == "mine"
    told = [(line["request_id"], line["status"]) for line in log.requests]
    assert told == [(refused, "INVALID_ARGUMENT"), ("mine", "404"), (wrong.headers[REQUEST_ID_KEY], "400")]


def test_the_errors_of_a_client_have_the_id():
    error = from_status(grpc.StatusCode.INTERNAL, "broken", "RayMoEError", request_id="req-1")
    assert (error.message, error.request_id) == ("broken", "req-1")
    assert from_status(grpc.StatusCode.INTERNAL, "broken", None).request_id == ""


async def test_requests_at_the_same_time_do_not_mix_their_ids(backend, log):
    backend.hold_after = 1
    logger = logging.getLogger("ray_moe.test")
    inner = backend.generate

    async def telling(request):
        async for chunk in inner(request):
            logger.info("piece", extra={"prompt_length": len(request.prompt)})
            yield chunk

    backend.generate = telling
    async with doors(backend) as (channel, _):
        calls = [generate(channel, "x" * number, {REQUEST_ID_KEY: f"id-{number}"}) for number in (1, 2)]
        told = [asyncio.create_task(id_told(call)) for call in calls]
        await asyncio.wait_for(backend.both_open.wait(), 5)
        backend.released.set()
        assert await asyncio.gather(*told) == ["id-1", "id-2"]
    pieces = [line for line in log.lines if line["message"] == "piece"]
    assert {(line["request_id"], line["prompt_length"]) for line in pieces} == {("id-1", 1), ("id-2", 2)}
    assert len(pieces) == 4


# --- Lines ---------------------------------------------------------------------------------------------------
async def test_each_request_has_one_line_with_what_it_was(backend, log):
    async with doors(backend) as (channel, http):
        await id_told(generate(channel, "hi"))
        await http.post("/v1/completions?secret=1", json=COMPLETION)
        await channel.unary_unary("/ray_moe.v1.Admin/Status", None, None)(admin_pb2.StatusRequest().SerializeToString())
    told = [
        (line["door"], line["method"], line["status"], line.get("tokens_in"), line.get("tokens_out"))
        for line in log.requests
    ]
    assert told == [
        ("grpc", "Generate", "OK", 1, 2),
        ("openai", "POST /v1/completions", "200", 2, 2),
        ("grpc", "Status", "OK", None, None),
    ]
    assert {(line["level"], line["actor"], line["caller"]) for line in log.requests} == {
        ("info", "router-0", "anonymous")
    }
    assert all(line["ts"].endswith("Z") and line["pid"] and line["duration_s"] >= 0 for line in log.requests)


async def test_what_is_asked_all_the_time_is_told_at_the_level_of_debugging(backend, log):
    async def probe() -> None:
        async with doors(backend) as (channel, http):
            await http.get("/health")
            data = kserve_pb.ServerLiveRequest().SerializeToString()
            await channel.unary_unary("/inference.GRPCInferenceService/ServerLive", None, None)(data)

    await probe()
    assert log.lines == []
    log.configure(format="json", level="debug")
    await probe()
    assert [(line["door"], line["status"]) for line in log.requests] == [("openai", "200"), ("kserve", "OK")]


async def test_each_request_on_a_stream_of_many_has_a_line_of_its_own(backend, log):
    def request(name: str, **others: Any) -> bytes:
        message = kserve_pb.ModelInferRequest(model_name=name, **others)
        prompt = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        prompt.contents.bytes_contents.append(b"hi")
        message.parameters["max_tokens"].int64_param = 2
        return message.SerializeToString()

    async with doors(backend) as (channel, _):
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", None, None)
        call = stream(iter([request("nobody"), request("tiny", id="7")]), metadata=((REQUEST_ID_KEY, "whole"),))
        assert await id_told(call) == "whole"
    told = {line["request_id"]: (line["status"], line.get("error"), line["caller"]) for line in log.requests}
    assert told == {
        "whole/1": ("NOT_FOUND", "NotFound", "anonymous"),
        "whole/2": ("OK", None, "anonymous"),
        "whole": ("OK", None, "anonymous"),
    }


async def test_an_unexpected_error_is_told_with_its_traceback_and_the_id(backend, log):
    async with doors(backend) as (channel, http):
        backend.failure = KeyError("inside")
        by_grpc = await id_told(generate(channel, "hi"))
        answer = await http.post("/v1/completions", json=COMPLETION)
    faults = [line for line in log.lines if line["level"] == "error"]
    assert [line["request_id"] for line in faults] == [by_grpc, answer.headers[REQUEST_ID_KEY]]
    assert all("KeyError: 'inside'" in line["exception"] and "Traceback" in line["exception"] for line in faults)
    told = [(line["status"], line["error"]) for line in log.requests]
    assert told == [("INTERNAL", "KeyError"), ("500", "KeyError")]


async def test_a_fault_of_a_plain_route_is_answered_with_the_id_too(backend, log):
    async with doors(backend) as (_, http):
        backend.model_name = property()  # no name can be made of it
        answer = await http.get("/v1/models")
    assert answer.status_code == 500
    assert "fault" in answer.json()["error"]["message"]
    fault, request = log.lines
    assert fault["request_id"] == request["request_id"] == answer.headers[REQUEST_ID_KEY]


async def test_a_client_that_leaves_is_told_of(backend, log):
    backend.hold_after = 0
    async with doors(backend) as (channel, http):
        call = generate(channel, "hi")
        await asyncio.wait_for(backend.reached.wait(), 5)
        call.cancel()
        await asyncio.wait_for(backend.closed.wait(), 5)
        backend.closed.clear()
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/completions", json=COMPLETION, timeout=0.2)
        await asyncio.wait_for(backend.closed.wait(), 5)
    assert [line["status"] for line in log.requests] == ["CANCELLED", "499"]


async def test_keys_prompts_and_outputs_are_nowhere(backend, log, tmp_path: Path):
    file, secret = tmp_path / "keys.json", new_key()
    with editing(file) as entries:
        entries.append(ApiKey("ana", digest_of(secret), frozenset({"infer"})))
    log.configure(format="json", level="debug")
    async with doors(backend, keys_file=str(file)) as (channel, http):
        for key in (secret, "rm-wrong-key"):
            bearer = {"authorization": f"Bearer {key}"}
            await id_told(generate(channel, "a private matter", bearer))
            await http.post("/v1/completions", json={**COMPLETION, "prompt": "a private matter"}, headers=bearer)
    written = log.stream.getvalue()
    assert all(word not in written for word in (secret, digest_of(secret).hex(), "wrong-key", "private"))
    assert [(line.get("caller"), line["status"]) for line in log.requests] == [
        ("ana", "OK"),
        ("ana", "200"),
        (None, "UNAUTHENTICATED"),
        (None, "401"),
    ]


# --- How they look -------------------------------------------------------------------------------------------
async def test_lines_for_people_say_the_same(backend, log):
    log.configure()
    async with doors(backend) as (_, http):
        await http.get("/v1/models/a%0Ab%1b[31m", headers={REQUEST_ID_KEY: "mine"})
    (line,) = log.stream.getvalue().splitlines()
    assert " INFO    router-0 ray_moe.service.requests: request door=openai " in line
    assert r'method="GET /v1/models/a\nb\u001b[31m" status=404 ' in line
    assert line.endswith(" request_id=mine")


def test_a_message_stays_on_its_line_and_a_traceback_follows(log):
    log.configure("expert-3")
    try:
        raise ValueError("what")
    except ValueError:
        logging.getLogger("ray_moe.x").exception("first\nsecond %s", "a\tb", extra={"host": "expert-1"})
    first, *rest = log.stream.getvalue().splitlines()
    assert first.endswith(r"ERROR   expert-3 ray_moe.x: first\nsecond a\tb host=expert-1")
    assert (rest[0], rest[-1]) == ("Traceback (most recent call last):", "ValueError: what")


def test_a_line_keeps_its_own_fields_where_an_extra_one_has_the_same_name(log):
    logging.getLogger("ray_moe.x").warning("w", extra={"level": "fake", "actor": "fake", "odd": {1, 2}})
    (line,) = log.lines
    assert (line["level"], line["actor"], line["odd"]) == ("warning", "router-0", "{1, 2}")


def test_libraries_are_heard_from_warnings_on(log):
    log.configure(format="json", level="debug")
    for name in ("ray_moe.x", "somebody"):
        logging.getLogger(name).debug("d")
        logging.getLogger(name).warning("w")
    assert [(line["logger"], line["message"]) for line in log.lines] == [
        ("ray_moe.x", "d"),
        ("ray_moe.x", "w"),
        ("somebody", "w"),
    ]


def test_the_level_leaves_out_what_is_below_it(log):
    log.configure(format="json", level="error")
    logging.getLogger("ray_moe.x").warning("w")
    logging.getLogger("ray_moe.x").error("e")
    assert [line["message"] for line in log.lines] == ["e"]


# --- Where they come from ------------------------------------------------------------------------------------
ACTORS = """
import logging
from types import SimpleNamespace
from ray_moe.actors.expert import ExpertActor
from ray_moe.actors.launcher import Launcher
from ray_moe.actors.router import Router
from ray_moe.config import Config
spec = SimpleNamespace(config=Config.model_validate({"logs": {"format": "json"}}))
for make in (lambda: Launcher(spec), lambda: ExpertActor("expert-3", spec), lambda: Router("router-1", spec)):
    make()
    logging.getLogger("ray_moe.x").info("here")
"""


def test_every_actor_writes_under_its_name():
    out = subprocess.run([sys.executable, "-c", ACTORS], capture_output=True, text=True, check=True, timeout=120)
    lines = [json.loads(line) for line in out.stderr.splitlines()]
    assert [(line["message"], line["actor"]) for line in lines] == [
        ("here", "launcher"),
        ("here", "expert-3"),
        ("here", "router-1"),
    ]


@pytest.mark.parametrize("to_driver", [True, False])
@pytest.mark.parametrize("address", ["local", "127.0.0.1:6379"])
def test_what_actors_write_comes_to_the_driver_if_that_is_wanted(monkeypatch, address, to_driver):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    join(RayConfig(address=address), log_to_driver=to_driver)
    assert [options["log_to_driver"] for options in asked] == [to_driver]
