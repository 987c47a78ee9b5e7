"""Calls without leave: no key, a wrong one, one of another role, one that is used up; each is told so, by its code."""

from __future__ import annotations

import grpc
import httpx
import pytest

from tests.unit.service.hostile.grpc_corpus import (
    ADMIN,
    FORWARD_STREAM,
    GOOD_FORWARD,
    GOOD_MICRO,
    TRAINING,
    C,
    Call,
    canary,
    chaos,
    drain,
    generate,
    micro,
    optim_step,
    publish,
    resize,
    train_step,
)
from tests.unit.service.hostile.http_corpus import CHAT, COMPLETIONS, HELLO, JSON, body, chat
from tests.unit.service.hostile.kserve_corpus import GOOD, KSERVE, STREAM, setting
from tests.unit.service.hostile.service import FORWARD, GENERATE, INFER, TIMEOUT_S, Service, calling
from tests.unit.service.hostile.test_grpc import assert_refused

GENERATION = generate().SerializeToString()
INFERS = {
    "Generate": (GENERATE, GENERATION),
    "Forward": (FORWARD, GOOD_FORWARD),
    "ForwardStream": (FORWARD_STREAM, GOOD_FORWARD),
    "ModelInfer": (INFER, GOOD),
    "ModelInfer of the whole model": (INFER, setting().SerializeToString()),
}
ADMINS = {
    "Resize": (f"{ADMIN}Resize", resize(3)),
    "Drain": (f"{ADMIN}Drain", drain("expert-0")),
    "Chaos": (f"{ADMIN}Chaos", chaos()),
    "Plan": (f"{ADMIN}Plan", b""),
    "Publish": (f"{ADMIN}Publish", publish("/models/better")),
    "Rollback": (f"{ADMIN}Rollback", b""),
    "BeginCanary": (f"{ADMIN}BeginCanary", canary()),
    "EndCanary": (f"{ADMIN}EndCanary", b""),
    "PublishTrained": (f"{TRAINING}PublishTrained", b""),
}
TRAINS = {
    "ForwardBackward": (f"{TRAINING}ForwardBackward", GOOD_MICRO),
    "OptimStep": (f"{TRAINING}OptimStep", optim_step()),
    "TrainStep": (f"{TRAINING}TrainStep", train_step(micro())),
    "Discard": (f"{TRAINING}Discard", b""),
    "Sample": (f"{TRAINING}Sample", GENERATION),
    "SaveState": (f"{TRAINING}SaveState", b""),
    "LoadState": (f"{TRAINING}LoadState", b""),
    "GetState": (f"{TRAINING}GetState", b""),
}
KNOWN = {
    "Status": (f"{ADMIN}Status", b""),
    "Placement": (f"{ADMIN}Placement", b""),
    "ListVersions": (f"{ADMIN}ListVersions", b""),
    "ModelMetadata": (f"{KSERVE}/ModelMetadata", b"\x0a\x04tiny"),
    "RepositoryIndex": (f"{KSERVE}/RepositoryIndex", b""),
}

WITHOUT: dict[str, list[tuple[str, str | bytes]]] = {
    "nothing": [],
    "an empty key": [("authorization", "Bearer ")],
    "a scheme alone": [("authorization", "Bearer")],
    "another scheme": [("authorization", "Basic YWRtaW46YWRtaW4=")],
    "a wrong key": [("authorization", "Bearer rm_" + "A" * 43)],
    "a wrong key in the other header": [("x-api-key", "rm_" + "A" * 43)],
    "a key of 4 KB": [("authorization", "Bearer " + "A" * 4000)],
    "two words": [("authorization", "Bearer rm_a rm_b")],
    "a list of keys": [("authorization", "Bearer rm_a, Bearer rm_b")],
    "a quoted key": [("authorization", 'Bearer "rm_a"')],
    "a JSON token": [("authorization", "Bearer eyJhbGciOiJub25lIn0.eyJyb2xlIjoiYWRtaW4ifQ.")],
    "a key in binary": [("authorization-bin", b"Bearer rm_a")],
    "SQL": [("x-api-key", "' OR 1=1 --")],
}


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("method", ["Generate", "ModelInfer", "Resize", "Status"])
def test_nobody_calls_without_a_key(service: Service, method: str, without: str) -> None:
    path, data = (INFERS | ADMINS | KNOWN)[method]
    assert_refused(service.keyed_channel, Call(path, [data], C.UNAUTHENTICATED, "API key", WITHOUT[without]))
    service.check("grpc")


@pytest.mark.parametrize("method", [*INFERS, *ADMINS, *TRAINS, *KNOWN])
def test_a_key_that_has_expired_opens_nothing(service: Service, method: str) -> None:
    path, data = (INFERS | ADMINS | TRAINS | KNOWN)[method]
    key = service.keys.metadata("late")
    assert_refused(service.keyed_channel, Call(path, [data], C.UNAUTHENTICATED, "has expired", key))
    service.check("grpc")


@pytest.mark.parametrize(
    ("name", "method", "role"),
    [(name, method, "infer") for name in ("trainer", "chief") for method in INFERS]
    + [(name, method, "admin") for name in ("ana", "trainer") for method in ADMINS]
    + [(name, method, "train") for name in ("ana", "chief") for method in TRAINS],
)
def test_a_key_opens_what_is_its_role_s_and_nothing_else(service: Service, name: str, method: str, role: str) -> None:
    path, data = (INFERS | ADMINS | TRAINS)[method]
    key = [("x-api-key", service.keys.secrets[name])]
    assert_refused(service.keyed_channel, Call(path, [data], C.PERMISSION_DENIED, f"the role {role}", key))
    service.check("grpc")


@pytest.mark.parametrize("method", KNOWN)
def test_a_key_for_metrics_reads_nothing_else(service: Service, method: str) -> None:
    path, data = KNOWN[method]
    key = service.keys.metadata("scraper")
    assert_refused(service.keyed_channel, Call(path, [data], C.PERMISSION_DENIED, "a role besides metrics", key))
    assert keyed(service, "/v1/models", b"", service.keys.secrets["scraper"], "GET").status_code == 403
    service.check("grpc")


@pytest.mark.parametrize("name", ["spent", "thirsty"])
def test_a_key_that_is_used_up_is_told_so_over_every_door(service: Service, name: str) -> None:
    key = service.keys.metadata(name)
    first = Call(GENERATE, [GENERATION], C.OK, "", key, num_answers=2)
    assert_refused(service.keyed_channel, first)
    for path, data in INFERS.values():
        assert_refused(
            service.keyed_channel, Call(path, [data], C.RESOURCE_EXHAUSTED, "the limit of this API key", key)
        )
    reply = keyed(service, COMPLETIONS, body(), service.keys.secrets[name])
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(reply.headers["retry-after"]) >= 1
    service.check("grpc")


def test_a_bad_request_counts_like_a_good_one_and_is_not_told_more(service: Service) -> None:
    """A key of another role is refused before its request is read."""
    key = [("x-api-key", service.keys.secrets["trainer"])]
    for path in (GENERATE, FORWARD, INFER):
        refused = Call(path, [b"\xff"], C.PERMISSION_DENIED, "", key)
        assert_refused(service.keyed_channel, refused)
    assert_refused(service.keyed_channel, Call(GENERATE, [b"\xff"], C.UNAUTHENTICATED))
    service.check("grpc")


def test_each_request_of_a_stream_asks_for_the_role(service: Service) -> None:
    for name, answer in (("trainer", b"the role infer"), ("ana", b"tiny/model.layers.0")):
        key = service.keys.metadata(name)
        answers = list(calling(service.keyed_channel, STREAM, [GOOD] * 3, metadata=key))
        assert [answer in each for each in answers] == [True] * 3
    with pytest.raises(grpc.RpcError):
        list(calling(service.keyed_channel, STREAM, [GOOD]))
    service.check("kserve")


def keyed(service: Service, path: str, content: bytes, key: str | None, method: str = "POST") -> httpx.Response:
    headers = [(name.encode(), value.encode()) for name, value in JSON.items()]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    address = f"http://127.0.0.1:{service.keyed_http_port}{path}"
    return httpx.request(method, address, content=content, headers=headers, timeout=TIMEOUT_S)


HTTP = {
    "completions": (COMPLETIONS, body(), "POST"),
    "chats": (CHAT, chat(HELLO), "POST"),
    "no JSON": (COMPLETIONS, b"{", "POST"),
    "models": ("/v1/models", b"", "GET"),
    "a model": ("/v1/models/tiny", b"", "GET"),
    "an unknown model": ("/v1/models/gpt", b"", "GET"),
    "the dashboard's figures": ("/dashboard/api/state", b"", "GET"),
    "a plan by the dashboard": ("/dashboard/api/plan", b'{"confirm": true}', "POST"),
    "a wish that is no JSON": ("/dashboard/api/chaos", b"{", "POST"),
}


@pytest.mark.parametrize("what", HTTP)
@pytest.mark.parametrize("key", [None, "rm_wrong", "ключ", "late"], ids=["none", "wrong", "no ASCII", "expired"])
def test_nobody_is_let_in_over_http_without_a_key(service: Service, key: str | None, what: str) -> None:
    path, content, method = HTTP[what]
    reply = keyed(service, path, content, service.keys.secrets.get(key or "", key), method)
    assert reply.status_code == 401, reply.text
    assert reply.json()["error"]["type"] == "authentication_error"
    assert reply.headers["www-authenticate"] == "Bearer"
    service.check("http")


@pytest.mark.parametrize("name", ["trainer", "ana"])
def test_the_dashboard_asks_for_the_role(service: Service, name: str) -> None:
    for path, content, method in (call for call in HTTP.values() if call[0].startswith("/dashboard/")):
        reply = keyed(service, path, content, service.keys.secrets[name], method)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "permission_denied")
    service.check("http")


@pytest.mark.parametrize("name", ["trainer", "chief"])
def test_http_asks_for_the_role(service: Service, name: str) -> None:
    for path, content in ((COMPLETIONS, body()), (CHAT, chat(HELLO)), (COMPLETIONS, b"{")):
        reply = keyed(service, path, content, service.keys.secrets[name])
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "permission_denied")
    service.check("http")
