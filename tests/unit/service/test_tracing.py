"""Traces of requests: from a front door over the engine and its lines to the hosts of the experts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ray_moe.actors.otel import OtelTracer
from ray_moe.actors.tracing import close_tracer, make_tracer, traces_url
from ray_moe.client.aio import AsyncClient
from ray_moe.config import Config, ServerConfig, TraceDetail, TracingConfig
from ray_moe.errors import InvalidConfig
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts
from ray_moe.runtime.decoder_only import DecoderStepper
from ray_moe.runtime.engine import Engine
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.host_loop import INLINE_FLOPS, HostLoop
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.service.composition import Service
from ray_moe.service.doors import Doors
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress, Placement, RoutingTable
from tests.tiny_models import save, save_tokenizer
from tests.unit.service.fake_backend import FakeBackend

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
HOSTS = ("expert-0", "expert-1")


class EngineBackend(FakeBackend):
    """The engine's work, and its layers, behind the doors."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.generate, self.forward, self.layers = engine.generate, engine.forward, engine.layers  # type: ignore[method-assign]
        self.layers_with_gate, self.vocab_size, self.max_positions = engine.layers_with_gate, 259, 256


class Cluster:
    """A router's doors and engine, and hosts behind real servers that each hold all experts."""

    def __init__(self, checkpoint: Checkpoint, detail: TraceDetail, sample_ratio: float) -> None:
        self.exporter = InMemorySpanExporter()
        self.layers = list(checkpoint.layers)
        self.on_call: Callable[[str, ExpertCall], None] = lambda host_id, call: None
        self.servers: dict[str, HostServer] = {}
        self.hung = ""
        """A host that answers nothing before `released`."""
        self.released = asyncio.Event()
        self._checkpoint = checkpoint
        self._detail: TraceDetail = detail
        self._sample_ratio = sample_ratio

    def tracer(self, actor: str, sample_ratio: float | None) -> OtelTracer:
        processor = SimpleSpanProcessor(self.exporter)
        return OtelTracer(processor, "svc", actor, sample_ratio=sample_ratio, detail=self._detail)

    async def start_host(self, host_id: str) -> HostAddress:
        plan = {path: list(range(spec.num_experts)) for path, spec in self._checkpoint.layers.items()}
        host = ExpertHost(host_id)
        for path, module in self._checkpoint.load_experts(plan).items():
            host.hold(path, plan[path], StackedExperts(module))
        inline_flops = INLINE_FLOPS if host_id == HOSTS[0] else -1  # the other one computes all in its thread
        loop = HostLoop(host, inline_flops, self.tracer(host_id, None))

        async def submit(call: ExpertCall) -> ExpertReply:
            self.on_call(host_id, call)
            if host_id == self.hung:
                await self.released.wait()
            if host_id not in self.servers:  # it has just been killed
                await asyncio.Event().wait()
            return await loop.submit(call)

        server = self.servers[host_id] = HostServer(submit, "token", incarnation="1")
        tcp, unix = await server.start()
        return HostAddress(host_id, "1", "this node", 0, tcp, unix)

    def kill(self, host_id: str) -> None:
        """While calls are on their way."""
        self.killing = asyncio.ensure_future(self.servers.pop(host_id).stop())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[AsyncClient, httpx.AsyncClient]]:
        """Clients of the two doors."""
        threads = set(threading.enumerate())
        async with AsyncExitStack() as stack:
            addresses = {host_id: await self.start_host(host_id) for host_id in HOSTS}
            placement = Placement(
                {path: (HOSTS, HOSTS[::-1]) * (spec.num_experts // 2) for path, spec in self._checkpoint.layers.items()}
            )
            transport = StreamTransport("token", node_id="this node")
            # A host of which nothing is known is late after a tenth of the time-out.
            dispatcher = ExpertDispatcher(transport, DispatchSettings(call_timeout_s=5.0))
            dispatcher.update(RoutingTable(1, placement, addresses))
            checkpoint = self._checkpoint
            engine = Engine(
                checkpoint.load_backbone(),
                checkpoint.load_tokenizer(),
                checkpoint.layers,
                dispatcher,
                max_positions=256,
            )
            doors = Doors(
                EngineBackend(engine), ServerConfig(port=0, http_port=0), self.tracer("router-0", self._sample_ratio)
            )
            ports = await doors.start()
            stack.push_async_callback(self._stop, doors, engine, dispatcher, transport)
            client = await stack.enter_async_context(AsyncClient(f"127.0.0.1:{ports.grpc}"))
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.http}/v1"))
            yield client, http
        for thread in set(threading.enumerate()) - threads:
            if thread.name == "generation":
                await asyncio.to_thread(thread.join)  # it ends its spans

    async def _stop(
        self, doors: Doors, engine: Engine, dispatcher: ExpertDispatcher, transport: StreamTransport
    ) -> None:
        await doors.stop(0.0)
        await engine.close()
        await asyncio.to_thread(dispatcher.close)
        await asyncio.to_thread(transport.close)
        for server in self.servers.values():
            await server.stop()

    async def complete(self, http: httpx.AsyncClient, num_tokens: int = 3, **headers: str) -> httpx.Response:
        asked = {"model": "tiny", "prompt": "ab", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        answer = await http.post("/completions", json=asked, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    @property
    def spans(self) -> list[ReadableSpan]:
        """All of them, after it has run."""
        return list(self.exporter.get_finished_spans())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("qwen3")
    save("qwen3_moe", folder, vocab_size=259)
    save_tokenizer(folder)
    return Checkpoint.open(folder)


@pytest.fixture
def make(checkpoint: Checkpoint) -> Callable[..., Cluster]:
    def make(detail: TraceDetail = "experts", sample_ratio: float = 0.0) -> Cluster:
        return Cluster(checkpoint, detail, sample_ratio)

    return make


def named(spans: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def ids(span: Any) -> tuple[str, str]:
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def parts(spans: list[ReadableSpan], whole: ReadableSpan) -> list[ReadableSpan]:
    return [span for span in spans if span.parent is not None and span.parent.span_id == whole.context.span_id]


def actor(span: ReadableSpan) -> Any:
    return span.resource.attributes["ray_moe.actor"]


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# --- The tree of a request -----------------------------------------------------------------------------------
async def test_a_request_is_one_tree_from_the_door_to_the_hosts(make):
    cluster = make()
    async with cluster.running() as (_, http):
        answer = await cluster.complete(http, 3, **SAMPLED)
    spans = cluster.spans
    assert {ids(span)[0] for span in spans} == {TRACE}

    (request,) = named(spans, "POST /v1/completions")
    assert (request.kind, actor(request), request.status.status_code) == (SpanKind.SERVER, "router-0", StatusCode.UNSET)
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == CLIENT
    said = about(request)
    assert said.pop("gen_ai.response.time_to_first_chunk") > 0
    assert said == {
        "ray_moe.door": "openai",
        "ray_moe.request_id": answer.headers["x-request-id"],
        "ray_moe.caller": "anonymous",
        "ray_moe.status": "200",
        "gen_ai.provider.name": "ray_moe",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
    }
    assert [event.name for event in request.events] == ["first token"]

    phases = {span.name: span for span in parts(spans, request)}
    assert list(phases) == ["queue", "prefill", "decode"]
    assert parts(spans, phases["queue"]) == []
    steps = [parts(spans, phases[name]) for name in ("prefill", "decode")]
    assert [len(each) for each in steps] == [1, 2]
    assert [about(span) for each in steps for span in each] == [
        {"batch.tokens": number, "batch.sequences": 1} for number in (2, 1, 1)
    ]
    for each in (*steps[0], *steps[1]):
        exchanges = parts(spans, each)
        assert [(span.name, about(span)["layer"]) for span in exchanges] == [
            ("experts.exchange", layer) for layer in cluster.layers
        ]
        for exchange in exchanges:
            computed = parts(spans, exchange)
            assert {span.name for span in computed} == {"experts.compute"}
            assert {span.kind for span in computed} == {SpanKind.SERVER}
            assert tuple(sorted({actor(span) for span in computed})) == about(exchange)["hosts"]
            assert sum(about(span)["rows"] for span in computed) == about(exchange)["rows"]
            assert all(about(span)["queue_wait_s"] >= 0 for span in computed)
    assert len(spans) == 4 + 3 + 3 * len(cluster.layers) + len(named(spans, "experts.compute"))


async def test_rows_of_a_lost_host_are_seen_to_go_to_another(make):
    cluster = make()
    num_calls = 0

    def on_call(host_id: str, call: ExpertCall) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            cluster.kill(host_id)

    cluster.on_call = on_call
    async with cluster.running() as (_, http):
        await cluster.complete(http, 3, **SAMPLED)
        await cluster.killing
    spans = cluster.spans
    ((exchange, event),) = [
        (span, event) for span in named(spans, "experts.exchange") for event in span.events if event.name == "failover"
    ]
    (survivor,) = cluster.servers
    assert event.attributes is not None
    assert event.attributes["host"] != survivor
    assert event.attributes["error"] == "HostLost"
    assert set(about(exchange)["hosts"]) == set(HOSTS)
    computed = parts(spans, exchange)
    assert event.attributes["rows"] in [about(span)["rows"] for span in computed if actor(span) == survivor]
    assert sum(about(span)["rows"] for span in computed) == about(exchange)["rows"]
    assert exchange.status.status_code is StatusCode.UNSET


async def test_rows_that_are_late_are_seen_to_be_hedged(make):
    cluster = make()
    cluster.hung = HOSTS[0]
    async with cluster.running() as (_, http):
        await cluster.complete(http, 1, **SAMPLED)
        cluster.released.set()
    events: list[tuple[str, dict[str, Any]]] = [
        (event.name, dict(event.attributes or {}))
        for span in named(cluster.spans, "experts.exchange")
        for event in span.events
    ]
    (hedge, how), (won, whose) = events[:2]
    assert (hedge, won) == ("hedge", "hedge won")
    assert how.pop("late_s") > 0
    assert how == whose == {"host": HOSTS[0], "rows": how["rows"]}


async def test_what_the_engine_logs_of_a_request_has_its_ids(make, log, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("of the model")

    cluster = make()
    async with cluster.running() as (_, http):
        monkeypatch.setattr(DecoderStepper, "compute", fail)
        asked = {"model": "tiny", "prompt": "ab"}
        answer = await http.post("/completions", json=asked, headers={**SAMPLED, "x-request-id": "mine"})
    assert answer.status_code == 500
    failed, request = log.lines
    assert (failed["message"], failed["level"]) == ("a generation failed", "error")
    assert "RuntimeError: of the model" in failed["exception"]
    assert (request["message"], request["status"]) == ("request", "500")
    assert {(line["request_id"], line["trace_id"]) for line in (failed, request)} == {("mine", TRACE)}
    assert [span.status.status_code for span in named(cluster.spans, "prefill")] == [StatusCode.ERROR]


async def test_a_single_layer_is_traced_like_a_step(make):
    cluster = make(sample_ratio=1.0)
    async with cluster.running() as (client, _):
        await client.forward(cluster.layers[0], np.ones((5, 32), np.float32))
    spans = cluster.spans
    (request,) = named(spans, "ray_moe.v1.Inference/Forward")
    (exchange,) = parts(spans, request)
    assert (exchange.name, about(exchange)["rows"]) == ("experts.exchange", 15)
    assert {span.name for span in parts(spans, exchange)} == {"experts.compute"}
    assert request.parent is None


async def test_a_step_of_several_requests_is_linked_to_all_of_them(make):
    cluster = make(detail="steps", sample_ratio=1.0)
    async with cluster.running() as (client, _):
        first = client.stream(token_ids=(5, 6), max_new_tokens=150, ignore_eos=True)
        await anext(first)
        await client.generate(token_ids=(7, 8), max_new_tokens=3, ignore_eos=True)
        async for _ in first:
            pass
    spans = cluster.spans
    requests = named(spans, "ray_moe.v1.Inference/Generate")
    assert len(requests) == 2
    phases = {span.context.span_id: request for request in requests for span in parts(spans, request)}
    linked = [[phases[link.context.span_id] for link in step.links] for step in named(spans, "step")]
    assert sum(len(each) == 2 for each in linked) == 3
    for step, each in zip(named(spans, "step"), linked, strict=True):
        assert len(set(map(id, each))) == len(each) == about(step)["batch.sequences"]
        assert step.parent is not None
        assert step.parent.span_id == step.links[0].context.span_id


@pytest.mark.parametrize(
    ("detail", "names"),
    [("requests", {"queue", "prefill", "decode"}), ("steps", {"queue", "prefill", "decode", "step"})],
)
async def test_how_deep_traces_go_is_a_setting(make, detail, names):
    cluster = make(detail=detail)
    async with cluster.running() as (_, http):
        await cluster.complete(http, 3, **SAMPLED)
    assert {span.name for span in cluster.spans} == names | {"POST /v1/completions"}


@pytest.mark.parametrize(
    "headers",
    [{}, {"traceparent": f"00-{TRACE}-{CLIENT}-00"}, {"traceparent": "nonsense"}, {"traceparent": "00-0-0-01"}],
)
async def test_what_is_not_sampled_makes_no_spans_and_says_nothing_to_hosts(make, headers):
    cluster = make()
    told: set[str] = set()
    cluster.on_call = lambda host_id, call: told.add(call.trace)
    async with cluster.running() as (_, http):
        await cluster.complete(http, 3, **headers)
    assert cluster.spans == []
    assert told == {""}


async def test_a_request_that_fails_is_told_of_and_so_is_a_refused_one(make):
    cluster = make(sample_ratio=1.0)
    async with cluster.running() as (_, http):
        refused = await http.post("/completions", json={"model": "tiny", "max_tokens": 3})
        missing = await http.get("/secret-path")
    spans = cluster.spans
    assert (refused.status_code, missing.status_code) == (400, 404)
    assert [(span.name, span.status.status_code) for span in spans] == [
        ("POST /v1/completions", StatusCode.UNSET),
        ("GET", StatusCode.UNSET),
    ]


async def test_a_fault_of_the_service_fails_the_span():
    exporter = InMemorySpanExporter()
    tracer = OtelTracer(SimpleSpanProcessor(exporter), "svc", "router-0", sample_ratio=1.0, detail="experts")
    backend = FakeBackend()
    backend.failure = KeyError("inside")
    doors = Doors(backend, ServerConfig(port=0, http_port=0), tracer)
    ports = await doors.start()
    async with httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{ports.http}/v1/completions"
        assert (await http.post(url, json={"model": "tiny", "prompt": "hi"})).status_code == 500
    await doors.stop(0.0)
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code, about(span)["error.type"]) == (StatusCode.ERROR, "KeyError")


# --- Hosts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{TRACE}-{CLIENT}-00", f"00-{'0' * 32}-{CLIENT}-01"])
def test_a_host_begins_no_traces_of_its_own(traceparent):
    exporter = InMemorySpanExporter()
    tracer = OtelTracer(SimpleSpanProcessor(exporter), "svc", "expert-0", sample_ratio=None, detail="experts")
    assert tracer.start("experts.compute", {"traceparent": traceparent}) is None
    assert exporter.get_finished_spans() == ()


# --- Exporting -----------------------------------------------------------------------------------------------
class Collector(HTTPServer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        received: list[tuple[str, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.received = received


async def test_spans_are_sent_to_the_configured_collector():
    with Collector() as collector:
        serving = threading.Thread(target=collector.serve_forever)
        serving.start()
        config = TracingConfig(endpoint=f"http://127.0.0.1:{collector.server_port}", sample_ratio=1.0)
        tracer = make_tracer(config, "my-service", "router-0", begins=True)
        assert tracer is not None
        span = tracer.start("one", {})
        assert span is not None
        span.end()
        await close_tracer(tracer)
        collector.shutdown()
        serving.join()
    ((path, body),) = collector.received
    assert path == "/v1/traces"
    (sent,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert [span.name for span in sent.scope_spans[0].spans] == ["one"]
    resource = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert (resource["service.name"], resource["ray_moe.actor"]) == ("my-service", "router-0")


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("http://h:4318/", "http://h:4318/v1/traces"),
        ("https://h/otlp/v1/traces", "https://h/otlp/v1/traces"),
    ],
)
def test_a_bare_address_stands_for_all_signals(endpoint, url):
    assert traces_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://h:4317", "http://", "http://a b"])
def test_an_endpoint_is_an_http_address(endpoint):
    with pytest.raises(ValueError, match="OTLP collector"):
        TracingConfig(endpoint=endpoint)


# --- Off, and not installed ----------------------------------------------------------------------------------
def test_nothing_is_made_where_nothing_is_recorded():
    assert make_tracer(TracingConfig(), "s", "router-0", begins=True) is None
    shallow = TracingConfig(endpoint="http://h:4318", detail="steps")
    assert make_tracer(shallow, "s", "expert-0", begins=False) is None


def test_a_service_that_cannot_trace_as_configured_does_not_start(monkeypatch):
    monkeypatch.delitem(sys.modules, "ray_moe.actors.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    config = Config(model="/nowhere", tracing=TracingConfig(endpoint="http://127.0.0.1:4318"))
    with pytest.raises(InvalidConfig, match=r"pip install 'ray-moe\[otel\]' on every node"):
        Service(config).start()


def test_opentelemetry_is_not_loaded_when_it_is_not_wanted():
    code = (
        "import sys, ray_moe.actors.router, ray_moe.actors.expert, ray_moe.service.doors, ray_moe.runtime.tracing\n"
        "from ray_moe.actors.tracing import make_tracer\nfrom ray_moe.config import TracingConfig\n"
        "make_tracer(TracingConfig(), 's', 'router-0', begins=True)\n"
        "print(*[name for name in sys.modules if name.startswith(('ray_moe.actors.otel', 'opentelemetry.exporter'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == []
