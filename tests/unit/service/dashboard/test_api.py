"""What the dashboard is told and can have done: who may ask, what is refused, and what reaches the backend."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ray_moe.errors import InvalidRequest, NotFound, Unavailable
from ray_moe.runtime.measures import Measures
from ray_moe.service.admission import Admission
from ray_moe.service.auth import KeyRing
from ray_moe.service.dashboard import files
from ray_moe.service.dashboard.picture import SHARED_S, Pictures
from ray_moe.service.limits import Limits
from ray_moe.service.openai.app import make_app
from ray_moe.types import ChaosRequest, HostAddress, Placement, RoutingTable, ServiceStatus
from tests.unit.service.dashboard.busy_backend import BusyBackend
from tests.unit.service.fake_backend import PLAN, STATUS, TABLE, FakeBackend
from tests.unit.service.test_auth import add

STATE = "/dashboard/api/state"
ACTIONS = {
    "plan": {"dry_run": True},
    "drain": {"target": "expert-1", "confirm": True},
    "chaos": {"kind": "kill", "confirm": True},
}


def client_of(backend: FakeBackend, host: str = "127.0.0.1:8477", keys: Path | None = None) -> httpx.AsyncClient:
    ring = KeyRing(keys)
    ring.load()
    app = make_app(backend, Admission(backend, keys=ring))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}")


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend) as client:
        yield client


def message(reply: httpx.Response) -> str:
    return str(reply.json()["error"]["message"])


# --- the page ------------------------------------------------------------------------------------------------
async def test_the_page_and_its_files_may_run_nothing_but_themselves(client: httpx.AsyncClient) -> None:
    page = await client.get("/dashboard")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    shipped = sorted(path.name for path in files.FOLDER.iterdir())
    assert {"app.js", "index.html", "style.css"} <= set(shipped)
    for name in shipped:
        reply = await client.get(f"/dashboard/static/{name}")
        assert reply.status_code == 200
        assert reply.content == (files.FOLDER / name).read_bytes()
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in reply.text
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|\s(style|on\w+)=", page.text)


async def test_with_a_slash_at_its_end_the_page_is_found_as_well(client: httpx.AsyncClient) -> None:
    page = await client.get("/dashboard/", follow_redirects=True)
    assert (page.status_code, page.url.path) == (200, "/dashboard")


async def test_files_are_asked_for_again_and_sent_once(client: httpx.AsyncClient) -> None:
    first = await client.get("/dashboard/static/app.js")
    again = await client.get("/dashboard/static/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = await client.get("/dashboard/static/app.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert first.headers["content-encoding"] == "gzip"
    assert plain.content == first.content


@pytest.mark.parametrize("name", ["nothing.js", "..%2Froutes.py", "%2Fetc%2Fpasswd", "__init__.py"])
async def test_nothing_else_is_served(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/dashboard/static/{name}")).status_code == 404


async def test_the_charts_are_plotly_s_or_are_told_how_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_of(FakeBackend()) as client:
        assert "plotly.js v" in (await client.get("/dashboard/static/plotly.min.js")).text[:200]
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    async with client_of(FakeBackend()) as client:
        reply = await client.get("/dashboard/static/plotly.min.js")
    assert reply.status_code == 404
    assert "pip install 'ray-moe[dashboard]'" in message(reply)


# --- the picture ---------------------------------------------------------------------------------------------
async def test_the_picture_says_what_the_service_says(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.vitals.first_tokens_s.observe(0.2)
    reply = await client.get(STATE)
    assert reply.headers["cache-control"] == "no-store"
    told = reply.json()
    assert told["caller"] is None
    assert told["service"]["state"] == "degraded"
    assert told["service"]["changing"] == "resize: 2 to 3 hosts"
    assert told["router"]["generated_tokens"] == STATUS.router.generated_tokens
    assert told["layers"] == list(backend.layers)[:2]  # in the order of the model
    assert told["tokens"] == [[3, 4, 5], [1, 0, 2**40]]
    assert [event["kind"] for event in told["events"]] == ["lost", "repaired"]
    assert told["hosts"][0] | {"speed": 1.0, "host_id": "expert-0", "utilisation": 0.75} == told["hosts"][0]
    assert sum(told["vitals"]["first_tokens_s"]["counts"]) == 1
    assert len(told["vitals"]["first_tokens_s"]["counts"]) == len(told["vitals"]["first_tokens_s"]["bounds"]) + 1
    assert told["epoch"] == TABLE.epoch


async def test_the_placement_names_only_what_is_there_and_comes_once(client: httpx.AsyncClient) -> None:
    told = (await client.get(STATE)).json()
    assert told["placement"] == {
        "hosts": ["expert-0"],
        "holders": [[[], [], []], [[0], [0], []]],  # expert-1 has no address
        "replicas": [[0, 0, 0], [1, 1, 0]],
    }
    assert (await client.get(STATE, params={"epoch": TABLE.epoch})).json()["placement"] is None
    for other in ("6", "-1", "x", "9" * 30, ""):
        assert (await client.get(STATE, params={"epoch": other})).json()["placement"] is not None


async def test_a_cut_expert_is_where_all_its_parts_are(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    (path, *_), hosts = backend.layers, ("a", "b", "c")
    parts = (("a", "b"), ("a",), ("c",), ("b", "c"), ("c",), ())  # two parts of three experts
    table = RoutingTable(8, Placement({path: parts}), {h: HostAddress(h, "x", "n", 1, "", "") for h in hosts})
    measures = Measures(STATUS.router, {path: np.zeros(3, np.int64)}, table)
    monkeypatch.setattr(backend, "measures", lambda: measures)
    placement = (await Pictures(backend).take())["placement"]
    assert placement["replicas"] == [[2, 1, 0]]
    assert placement["holders"] == [[[0, 1, 2], [0, 2], [2]]]


async def test_any_number_of_pages_ask_the_controller_once(backend: FakeBackend) -> None:
    asked, now_s = [], [0.0]

    async def status() -> ServiceStatus:
        asked.append(now_s[0])
        await asyncio.sleep(0)
        return STATUS

    backend.status = status  # type: ignore[method-assign]
    pictures = Pictures(backend, lambda: now_s[0])
    await asyncio.gather(*(pictures.take() for _ in range(20)))
    assert asked == [0.0]
    now_s[0] = SHARED_S
    await pictures.take()
    assert asked == [0.0, SHARED_S]


async def test_without_the_controller_the_router_tells_what_it_knows() -> None:
    backend = BusyBackend()
    backend.status_failure = Unavailable("it restarts")
    async with client_of(backend) as client:
        told = (await client.get(STATE)).json()
    assert (told["service"], told["hosts"], told["events"]) == (None, [], [])
    assert len(told["tokens"]) == 4


async def test_a_service_that_starts_tells_what_there_is(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.ready = False
    told = (await client.get(STATE)).json()
    assert told["service"]["model"] == STATUS.model


async def test_numbers_that_json_has_not_are_null(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    drifted = replace(STATUS, versions=(replace(STATUS.versions[0], drift=float("inf")),), p_lossless=float("nan"))

    async def status() -> ServiceStatus:
        return drifted

    backend.status = status  # type: ignore[method-assign]
    told = json.loads((await client.get(STATE)).text, parse_constant=pytest.fail)
    assert told["versions"][0]["drift"] is None
    assert told["service"]["p_lossless"] is None


# --- what is done --------------------------------------------------------------------------------------------
async def test_a_plan_is_looked_at_and_then_carried_out(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    told = (await client.post("/dashboard/api/plan", json={"dry_run": True})).json()
    assert told["num_moves"] == 2
    assert told["moves"][0] == {"layer": PLAN.moves[0].layer, "expert": 2, "added": ["expert-0"], "removed": []}
    assert told["balancedness_after"] == 0.875
    await client.post("/dashboard/api/plan", json={"confirm": True})
    assert backend.wishes == [("plan", True), ("plan", False)]


async def test_a_large_plan_is_told_in_part(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.service.fake_backend.PLAN", replace(PLAN, moves=PLAN.moves[:1] * 5000))
    told = (await client.post("/dashboard/api/plan", json={"dry_run": True})).json()
    assert (told["num_moves"], len(told["moves"])) == (5000, 100)


async def test_hosts_are_drained_and_hurt(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    drained = await client.post("/dashboard/api/drain", json={"target": "expert-1", "replace": True, "confirm": True})
    assert drained.json() == {"host_ids": ["expert-1", "expert-9"]}
    wish = {"kind": "slow", "target": "expert-0", "duration_s": 2, "factor": 3.5, "seed": 7, "confirm": True}
    report = await client.post("/dashboard/api/chaos", json=wish)
    assert report.json()["stall_s"] == 0.25
    hurt = ChaosRequest("slow", "expert-0", duration_s=2.0, factor=3.5, seed=7)
    assert backend.wishes == [("drain", "expert-1", True), ("chaos", hurt)]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("plan", {}, "confirm"),
        ("plan", {"confirm": False}, "confirm"),
        ("plan", {"confirm": 1}, "confirm is 1; expected true or false"),
        ("plan", {"dryrun": True}, "'dryrun' is not known here"),
        ("drain", {"target": "expert-1"}, "confirm"),
        ("drain", {"confirm": True}, "expected the name"),
        ("drain", {"target": 7, "confirm": True}, "target is 7; expected a text"),
        ("chaos", {"kind": "kill"}, "confirm"),
        ("chaos", {"kind": "burn", "confirm": True}, "kind is 'burn'"),
        ("chaos", {"kind": "kill", "duration_s": 1e9, "confirm": True}, "duration_s is"),
        ("chaos", {"kind": "kill", "duration_s": 10**400, "confirm": True}, "expected a number"),
        ("chaos", {"kind": "kill", "seed": 1.5, "confirm": True}, "seed is 1.5; expected a whole number"),
        ("chaos", [], "no JSON object"),
    ],
)
async def test_what_is_not_meant_or_not_understood_is_not_done(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, body: Any, said: str
) -> None:
    reply = await client.post(f"/dashboard/api/{path}", json=body)
    assert reply.status_code == 400
    assert said in message(reply)
    assert backend.wishes == []


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"confirm": true}', "text/plain", 415),  # what a form of another page could send unasked
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 10_000, "application/json", 400),
        (b" " * 20_000, "application/json", 413),
        (b'{"confirm": NaN}', "application/json", 400),
    ],
)
async def test_bad_bodies_are_refused(
    client: httpx.AsyncClient, backend: FakeBackend, content: bytes, kind: str, status: int
) -> None:
    reply = await client.post("/dashboard/api/plan", content=content, headers={"content-type": kind})
    assert reply.status_code == status
    assert backend.wishes == []


@pytest.mark.parametrize(
    ("failure", "status"),
    [(NotFound("no such host"), 404), (Unavailable("another change"), 503), (InvalidRequest("no"), 400)],
)
async def test_refusals_have_the_codes_of_every_door(
    client: httpx.AsyncClient, backend: FakeBackend, failure: Exception, status: int
) -> None:
    backend.failure = failure
    for name, body in ACTIONS.items():
        reply = await client.post(f"/dashboard/api/{name}", json=body)
        assert (reply.status_code, message(reply)) == (status, str(failure))


# --- who may -------------------------------------------------------------------------------------------------
async def test_with_keys_everything_but_the_page_wants_the_role_admin(tmp_path: Path, backend: FakeBackend) -> None:
    path = tmp_path / "keys.json"
    admin, others = add(path, "chief", ("admin",)), [add(path, "ana", ("infer",)), add(path, "prom", ("metrics",))]
    async with client_of(backend, "moe.example.org", path) as client:
        assert (await client.get("/dashboard")).status_code == 200

        async def statuses(key: str | None) -> set[int]:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            replies = [await client.get(STATE, headers=headers)]
            for name, body in ACTIONS.items():
                replies.append(await client.post(f"/dashboard/api/{name}", json=body, headers=headers))
            return {reply.status_code for reply in replies}

        assert await statuses(None) == {401}
        assert await statuses("rm_wrong") == {401}
        for key in others:
            assert await statuses(key) == {403}
        assert backend.wishes == []
        assert await statuses(admin) == {200}
        assert len(backend.wishes) == 3
        assert (await client.get(STATE, headers={"x-api-key": admin})).json()["caller"] == "chief"


async def test_what_is_done_counts_against_the_key_s_limits_and_looking_does_not(
    tmp_path: Path, backend: FakeBackend
) -> None:
    path = tmp_path / "keys.json"
    key = {"authorization": f"Bearer {add(path, 'chief', ('admin',), limits=Limits(requests_per_minute=1))}"}
    async with client_of(backend, keys=path) as client:
        for _ in range(5):
            assert (await client.get(STATE, headers=key)).status_code == 200
        replies = [await client.post("/dashboard/api/plan", json={"dry_run": True}, headers=key) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [200, 429]
        assert int(replies[1].headers["retry-after"]) > 0


@pytest.mark.parametrize("host", ["127.0.0.1:8477", "localhost", "[::1]:8477", "10.1.2.3:80", "moe.localhost:1"])
async def test_without_keys_it_is_reached_by_address(backend: FakeBackend, host: str) -> None:
    async with client_of(backend) as client:
        assert (await client.get(STATE, headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8477", "", "localhost.evil", "[x]:1", "a@b"])
async def test_without_keys_no_name_that_could_be_rebound_reaches_it(backend: FakeBackend, host: str) -> None:
    async with client_of(backend) as client:
        looked = await client.get(STATE, headers={"host": host})
        done = await client.post("/dashboard/api/plan", json={"confirm": True}, headers={"host": host})
    assert [looked.status_code, done.status_code] == [403, 403]
    assert "keys_file" in message(looked)
    assert backend.wishes == []


OWN: Mapping[str, str] = {"origin": "http://127.0.0.1:8477", "sec-fetch-site": "same-origin"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        (OWN, 200),
        ({**OWN, "origin": "https://127.0.0.1:8477"}, 200),  # a proxy that ends TLS
        ({**OWN, "origin": "http://evil.example"}, 403),
        ({**OWN, "origin": "http://127.0.0.1:9999"}, 403),
        ({**OWN, "origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
async def test_without_keys_no_other_page_changes_anything(
    client: httpx.AsyncClient, backend: FakeBackend, headers: Mapping[str, str], status: int
) -> None:
    for name, body in ACTIONS.items():
        assert (await client.post(f"/dashboard/api/{name}", json=body, headers=headers)).status_code == status
    assert len(backend.wishes) == (3 if status == 200 else 0)
