"""`GET /metrics`: what Prometheus reads of a fake service and of a small engine, and who may read it."""

from __future__ import annotations

import asyncio
import re
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from ray_moe.client.aio import AsyncClient
from ray_moe.errors import NotFound, Unauthenticated, Unavailable
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.engine import Engine
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.measures import Measures, measure
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.service import metrics
from ray_moe.service.admission import Admission
from ray_moe.service.openai.app import make_app
from ray_moe.transport.local import LocalTransport
from ray_moe.types import GenerateRequest, RouterStatus, RoutingTable, ServiceStatus
from tests.tiny_models import save
from tests.unit.service.fake_backend import LAYERS, STATUS, FakeBackend
from tests.unit.service.openai.http_door import until
from tests.unit.service.test_auth import add
from tests.unit.service.test_doors import add_key, doors

README = Path(__file__).parents[3] / "README.md"


class Scraped:
    """The samples of a page."""

    def __init__(self, text: str, families: Any = parse) -> None:
        self.families = list(families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        (value,) = self.values(name, **labels).values()
        return value

    def values(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """By the labels that are not in `labels`, in the order of their names."""
        found = [
            sample
            for sample in self.samples
            if sample.name == f"ray_moe_{name}" and labels.items() <= sample.labels.items()
        ]
        assert all(sample.labels["model"] == "tiny" for sample in found)
        return {
            tuple(value for key, value in sorted(one.labels.items()) if key not in {"model", *labels}): one.value
            for one in found
        }


async def scrape(backend: Any, max_experts: int = 32, accept: str = "") -> httpx.Response:
    app = make_app(backend, Admission(backend), None, max_experts)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.get("/metrics", headers={"accept": accept})


async def scraped(backend: Any, max_experts: int = 32) -> Scraped:
    response = await scrape(backend, max_experts)
    assert (response.status_code, response.headers["content-type"].split(";")[0]) == (200, "text/plain")
    return Scraped(response.text)


async def test_the_router_and_the_cluster_are_told_as_the_status_says():
    page = await scraped(FakeBackend())
    router = STATUS.router
    for name, value in {
        "requests_active": router.active_requests,
        "requests_queued": router.queued_requests,
        "generated_tokens_total": router.generated_tokens,
        "failovers_total": router.retried_calls,
        "hedges_total": router.hedged_calls,
        "hedges_won_total": 2,
        "router_rows_total": router.own_rows,
        "router_expert_bytes": router.own_bytes,
        "lifeboat_loads_total": router.lifeboat_loads,
        "balancedness_ratio": router.balancedness,
        "kv_cache_used_bytes": 2**20,
        "kv_cache_max_bytes": 2**30,
        "routing_epoch": 7,
        "replicas": 2,  # expert-1 is not there
        "replicas_wanted": 1,
        "experts_without_replica": 1,
        "experts_on_last_replica": 2,
        "lossless_probability": STATUS.p_lossless,
    }.items():
        assert page.value(name) == value, name
    assert page.values("service_state") == {("starting",): 0, ("ready",): 0, ("degraded",): 1, ("failed",): 0}
    assert page.value("hosts", state="ready") == page.value("hosts", state="lost") == 1
    assert page.values("host_state") == {("expert-0", "node", "ready"): 1, ("expert-1", "", "lost"): 1}
    assert page.values("host_queued_rows") == {("expert-0",): 9, ("expert-1",): 0}
    assert page.value("host_utilisation_ratio", host="expert-0") == 0.75
    assert page.value("host_replicas", host="expert-0") == STATUS.hosts[0].num_experts
    assert page.value("host_rows_total", host="expert-0") == STATUS.hosts[0].num_rows


async def test_the_hottest_experts_are_told_by_number_and_the_others_together():
    page = await scraped(FakeBackend(), max_experts=2)
    assert page.values("expert_tokens_total") == {
        ("2", LAYERS[1]): 2**40,
        ("other", LAYERS[1]): 1,
        ("2", LAYERS[0]): 5,
        ("other", LAYERS[0]): 7,
    }


@pytest.mark.parametrize("how", ["late", "away"])
async def test_without_the_controller_the_router_tells_of_itself(monkeypatch: pytest.MonkeyPatch, how: str):
    class Alone(FakeBackend):
        asked = 0

        async def status(self) -> ServiceStatus:
            self.asked += 1
            if how == "late":
                await asyncio.Event().wait()
            raise Unavailable("the controller is not there")

    monkeypatch.setattr(metrics, "STATUS_TIMEOUT_S", 0.01)
    backend = Alone()
    page = await scraped(backend)
    assert backend.asked == 1
    assert page.value("generated_tokens_total") == STATUS.router.generated_tokens
    assert page.value("service_state", state="degraded") == 1
    assert not any(sample.name.startswith("ray_moe_host") for sample in page.samples)


async def test_a_router_that_is_starting_tells_what_there_is():
    class Starting(FakeBackend):
        def measures(self) -> Measures:
            return measure(RouterStatus(1, 2, 0), None, None)

    backend = Starting()
    backend.ready = False
    page = await scraped(backend)
    assert page.value("router_memory_bytes") == 2
    assert page.values("expert_tokens_total") == page.values("routing_epoch") == {}


async def test_scrapers_get_the_format_they_ask_for():
    response = await scrape(FakeBackend(), accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert Scraped(response.text, parse_open).value("failovers_total") == STATUS.router.retried_calls


async def test_requests_are_told_by_their_end_and_times_as_distributions():
    backend = FakeBackend()
    vitals = backend.vitals
    vitals.ended("generate", "stop", 0.3)
    vitals.ended("generate", "overloaded")
    vitals.ended("forward", "done", 0.02)
    vitals.first_token(0.05, 10, 4)
    for pause_s in (0.001, 0.0011, 60.0):
        vitals.paused(pause_s)
    vitals.stepped(3, 130, 0.004)
    page = await scraped(backend)
    assert page.values("requests_total") == {
        ("forward", "done"): 1,
        ("generate", "overloaded"): 1,
        ("generate", "stop"): 1,
    }
    assert page.value("request_duration_seconds_count", kind="generate") == 1
    assert page.value("request_duration_seconds_sum", kind="forward") == 0.02
    assert (page.value("prompt_tokens_total"), page.value("prompt_cached_tokens_total")) == (10, 4)
    gaps = page.values("inter_token_latency_seconds_bucket")
    assert (gaps["0.001",], gaps["0.0025",], gaps["30.0",], gaps["+Inf",]) == (1, 2, 2, 3)
    assert page.value("inter_token_latency_seconds_sum") == pytest.approx(60.0021)
    assert page.value("time_to_first_token_seconds_bucket", le="0.05") == 1
    assert page.value("step_tokens_bucket", le="128.0") == 0
    assert page.value("step_tokens_bucket", le="256.0") == page.value("step_sequences_bucket", le="4.0") == 1


async def test_a_run_of_a_small_engine_is_told_as_it_was(tmp_path: Path):
    save("qwen3_moe", tmp_path, vocab_size=259)
    checkpoint = Checkpoint.open(tmp_path)
    plan = {path: list(range(spec.num_experts)) for path, spec in checkpoint.layers.items()}
    host = ExpertHost("expert-0")
    for path, module in checkpoint.load_experts(plan).items():
        host.hold(path, plan[path], StackedExperts(module))
    with closing(LocalTransport({"expert-0": host})) as transport:
        dispatcher = ExpertDispatcher(transport)
        placement = place_by_index({path: len(experts) for path, experts in plan.items()}, ["expert-0"])
        dispatcher.update(RoutingTable(1, placement, {"expert-0": transport.address("expert-0")}))
        model: Any = checkpoint.load_backbone()
        engine = Engine(model, None, checkpoint.layers, dispatcher)

        class Real(FakeBackend):
            def measures(self) -> Measures:
                return measure(RouterStatus(1, 2, 3), engine, dispatcher)

        request = GenerateRequest(token_ids=tuple(range(40)), max_new_tokens=5, ignore_eos=True)
        for _ in range(2):  # the second begins like the first: only the last token of its prompt is computed
            assert len([chunk async for chunk in engine.generate(request)]) == 5
        await engine.forward(next(iter(plan)), np.zeros((3, model.config.hidden_size), np.float32), None)
        with pytest.raises(NotFound):
            await engine.forward("none", np.zeros((1, 1), np.float32), None)
        await until(lambda: engine.vitals.outcomes["generate", "length"] == 2)
        page = await scraped(Real())
        await engine.close()
    assert page.values("requests_total") == {
        ("forward", "done"): 1,
        ("forward", "invalid"): 1,
        ("generate", "length"): 2,
    }
    assert (page.value("prompt_tokens_total"), page.value("prompt_cached_tokens_total")) == (80, 39)
    counts = {
        "time_to_first_token_seconds": 2,
        "queue_time_seconds": 2,
        "inter_token_latency_seconds": 2 * 4,
        "step_duration_seconds": 2 * 5,
        "step_sequences": 2 * 5,
    }
    assert {name: page.value(f"{name}_count") for name in counts} == counts
    assert page.value("step_tokens_sum") == (40 + 4) + (1 + 4)
    assert page.value("request_duration_seconds_count", kind="generate") == 2
    assert page.value("time_to_first_token_seconds_sum") < page.value("request_duration_seconds_sum", kind="generate")
    top_k, first = model.config.num_experts_per_tok, next(iter(plan))
    for layer in plan:
        tokens = sum(page.values("expert_tokens_total", layer=layer).values())
        assert tokens == top_k * (49 + 3 * (layer == first))
    assert 0 < page.value("kv_cache_used_bytes") <= page.value("kv_cache_max_bytes") == 2**30
    assert page.value("replicas") == sum(map(len, plan.values()))
    assert page.value("experts_without_replica") == 0


async def test_a_key_needs_the_role_and_a_scrape_costs_no_tokens(tmp_path: Path):
    file = tmp_path / "keys.json"
    ana, prometheus = add_key(file, "ana", "infer", "admin"), add_key(file, "prometheus", "metrics")
    async with doors(FakeBackend(), keys_file=str(file)) as (_, target), httpx.AsyncClient() as client:
        answers = [
            await client.get(f"http://{target}/metrics", headers=headers)
            for headers in ({}, {"authorization": f"Bearer {ana}"}, {"authorization": f"Bearer {prometheus}"})
        ]
        models = await client.get(f"http://{target}/v1/models", headers={"authorization": f"Bearer {prometheus}"})
        refused = await client.post(
            f"http://{target}/v1/completions",
            json={"model": "tiny", "prompt": "hi"},
            headers={"authorization": f"Bearer {prometheus}"},
        )
    assert [answer.status_code for answer in answers] == [401, 403, 200]
    assert "role metrics" in answers[1].text
    assert (models.status_code, refused.status_code) == (403, 403)


async def test_who_is_refused_is_counted_by_door_and_reason(tmp_path: Path):
    file = tmp_path / "keys.json"
    ana, scraper = add_key(file, "ana", "infer"), add_key(file, "prometheus", "metrics")
    old = add(file, "old", expires_at=1)
    ask = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
    async with doors(FakeBackend(), keys_file=str(file)) as (grpc_target, target), httpx.AsyncClient() as http:

        async def refused() -> dict[tuple[str, ...], float]:
            answer = await http.get(f"http://{target}/metrics", headers={"authorization": f"Bearer {scraper}"})
            return Scraped(answer.text).values("refused_requests_total")

        assert set((await refused()).values()) == {0}  # the first one is a rise
        for key in (ana, "wrong", "wrong", old, scraper):
            await http.post(f"http://{target}/v1/completions", json=ask, headers={"authorization": f"Bearer {key}"})
        await http.get(f"http://{target}/v1/models")
        for given in (ana, None, "wrong"):
            async with AsyncClient(grpc_target, api_key=given, discover=False, max_attempts=1) as client:
                with suppress(Unauthenticated):
                    await client.status()
        assert {labels: count for labels, count in (await refused()).items() if count} == {
            ("openai", "unknown_key"): 2,
            ("openai", "expired_key"): 1,
            ("openai", "role"): 1,
            ("openai", "no_key"): 1,
            ("grpc", "no_key"): 1,
            ("grpc", "unknown_key"): 1,
        }


async def test_pages_of_others_are_counted_where_no_keys_are_asked_for():
    backend, page = FakeBackend(), {"origin": "http://evil.example"}
    app = make_app(backend, Admission(backend))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        await client.get("/v1/models", headers={"host": "evil.example"})
        await client.post("/dashboard/api/plan", json={"dry_run": True}, headers=page)
        counts = Scraped((await client.get("/metrics")).text).values("refused_requests_total")
    assert {labels: count for labels, count in counts.items() if count} == {
        ("openai", "host"): 1,
        ("openai", "page"): 1,
    }


async def test_the_readme_lists_the_metrics_that_there_are():
    page = await scraped(FakeBackend())
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in page.families}
    assert set(re.findall(r"`(ray_moe_\w+)`", README.read_text(encoding="utf-8"))) == names
