"""The metrics of a router under the names, labels and help texts that Prometheus gets.

Names follow its conventions: base units, and `_total` (which the library adds) for what only rises. All have the label
`model`. Called by `service/metrics.py`; the README lists the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ray_moe.runtime.histogram import Histogram
from ray_moe.runtime.measures import Measures
from ray_moe.runtime.vitals import Vitals
from ray_moe.service.metrics_experts import Row
from ray_moe.service.refusals import Reason
from ray_moe.types import HostStatus, RoutingTable, ServiceStatus

PREFIX = "ray_moe_"
SERVICE_STATES = ("starting", "ready", "degraded", "failed")
HOST_STATES = ("starting", "loading", "ready", "draining", "standby", "lost")
OTHERS = "other"
"""In place of an expert's number: all of the layer that are not named."""

Texts = Mapping[str, tuple[str, str]]
"""Name of a metric -> the attribute it is, and what that means."""

ROUTER_GAUGES: Texts = {
    "requests_active": ("active_requests", "Generations being computed."),
    "requests_queued": ("queued_requests", "Generations that wait for their turn."),
    "balancedness_ratio": ("balancedness", "Mean over highest load of a host, in the last batches; 1 is perfect."),
    "router_expert_bytes": ("own_bytes", "Experts that the router itself holds: its cache and its lifeboat."),
    "router_memory_bytes": ("rss_bytes", "Resident memory of the router's process."),
}
ROUTER_COUNTERS: Texts = {
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "failovers": ("retried_calls", "Calls sent again because a host was lost or did not hold the expert."),
    "hedges": ("hedged_calls", "Calls that were late and therefore also sent to another host."),
    "router_rows": ("own_rows", "(token, expert) rows that the router computed itself, without a hop."),
    "lifeboat_loads": ("lifeboat_loads", "Experts that the router read because no host held them."),
}
VITALS: Texts = {
    "time_to_first_token_seconds": ("first_tokens_s", "From a generation's coming to its first token."),
    "inter_token_latency_seconds": ("token_gaps_s", "Between two tokens of a generation."),
    "queue_time_seconds": ("queue_times_s", "How long a generation waited for its first step."),
    "step_duration_seconds": ("step_durations_s", "Time to compute a step of the model."),
    "step_tokens": ("step_tokens", "Batch size: tokens computed in a step, those of prompts included."),
    "step_sequences": ("step_sequences", "Batch size: generations that share a step."),
}
HOST_GAUGES: Texts = {
    "host_replicas": ("num_experts", "(layer, expert) pairs that a host is to hold."),
    "host_utilisation_ratio": ("utilisation", "Share of the last seconds in which a host was computing."),
    "host_queued_rows": ("queued_rows", "Rows that wait for a host."),
    "host_memory_bytes": ("rss_bytes", "Resident memory of a host's process."),
}
HOST_COUNTERS: Texts = {
    "host_rows": ("num_rows", "(token, expert) rows that a host computed in this life."),
    "host_restarts": ("restarts", "Lives of a host before this one."),
}

Samples = Iterable[tuple[Sequence[str], float]]


class Page(Collector):
    """All of them at one moment."""

    def __init__(
        self,
        model: str,
        measures: Measures,
        experts: Sequence[Row],
        status: ServiceStatus | None,
        refusals: Mapping[tuple[str, Reason], int],
    ) -> None:
        """Args:
        model: what clients call it.
        measures: the router's own.
        experts: series of tokens per expert.
        status: of the cluster; None where the controller did not tell in time.
        refusals: (door, reason) -> requests refused for who asked.
        """
        self._model = model
        self._measures = measures
        self._experts = experts
        self._status = status
        self._refusals = refusals

    def collect(self) -> Iterator[Metric]:
        measures = self._measures
        for name, (attribute, text) in ROUTER_GAUGES.items():
            yield self._gauge(name, text, getattr(measures.router, attribute))
        for name, (attribute, text) in ROUTER_COUNTERS.items():
            yield self._counter(name, text, getattr(measures.router, attribute))
        yield self._counter("hedges_won", "Hedged calls that the other host answered first.", measures.hedges_won)
        yield self._counters(
            "expert_tokens",
            f"Tokens routed to an expert: the hottest by their numbers, all others of a layer as {OTHERS}.",
            [((row.layer, OTHERS if row.expert is None else str(row.expert)), row.tokens) for row in self._experts],
            ("layer", "expert"),
        )
        yield self._gauge("kv_cache_used_bytes", "Room that keys and values have.", measures.kv_used_bytes)
        yield self._gauge("kv_cache_max_bytes", "Room that they may have.", measures.kv_max_bytes)
        if measures.version is not None:
            text = "Version of the weights that new requests are computed with."
            yield self._gauge("weights_version", text, measures.version)
        yield self._counters(
            "refused_requests",
            "Requests refused for who asked: by their key or its role, or as another web page's.",
            self._refusals.items(),
            ("door", "reason"),
        )
        if measures.vitals is not None:
            yield from self._requests(measures.vitals)
        if measures.table is not None:
            yield from self._placement(measures.table, measures.replicas_wanted)
        state = "degraded" if self._status is None else self._status.state
        yield self._states("service_state", "1 for the state of the service.", SERVICE_STATES, [state])
        if self._status is not None:
            yield from self._cluster(self._status)

    # --- parts -----------------------------------------------------------------------------------------------
    def _requests(self, vitals: Vitals) -> Iterator[Metric]:
        yield self._counters(
            "requests",
            "Requests that have ended, generations and layer calls (forward), by how they did.",
            sorted(vitals.outcomes.copy().items()),
            ("kind", "outcome"),
        )
        yield self._gauge("queue_age_seconds", "How long the oldest waiting generation has waited.", vitals.queue_age_s)
        yield self._counter("prompt_tokens", "Tokens of prompts, once their answers begin.", vitals.num_prompt_tokens)
        yield self._counter(
            "prompt_cached_tokens", "Of those, not computed: another prompt began the same.", vitals.num_cached_tokens
        )
        for name, (attribute, text) in VITALS.items():
            yield self._histograms(name, text, [((), getattr(vitals, attribute))])
        yield self._histograms(
            "request_duration_seconds",
            "From a request's coming to its end, by kind.",
            [((kind,), histogram) for kind, histogram in vitals.durations_s.items()],
            ("kind",),
        )

    def _placement(self, table: RoutingTable, wanted: int) -> Iterator[Metric]:
        is_there = table.addresses.__contains__
        replicas = [sum(map(is_there, hosts)) for experts in table.placement.hosts_of.values() for hosts in experts]
        yield self._gauge("routing_epoch", "Epoch of the routing table in use.", table.epoch)
        yield self._gauge("replicas", "Replicas of experts that tokens can be sent to.", sum(replicas))
        yield self._gauge("replicas_wanted", "Of every expert: balance.min_replicas and survive_nodes.", wanted)
        yield self._gauge("experts_without_replica", "Experts that no host holds.", replicas.count(0))
        yield self._gauge("experts_on_last_replica", "Experts that one host alone holds.", replicas.count(1))

    def _cluster(self, status: ServiceStatus) -> Iterator[Metric]:
        yield self._gauge(
            "lossless_probability", "Chance that every expert survives the loss of a node.", status.p_lossless
        )
        hosts = status.hosts
        yield self._states("hosts", "Expert hosts in each state.", HOST_STATES, [host.state for host in hosts])
        yield self._gauges(
            "host_state",
            "1, with the state and the node of a host.",
            [((host.host_id, host.state, host.node_id), 1) for host in hosts],
            ("host", "state", "node"),
        )
        for name, (attribute, text) in HOST_GAUGES.items():
            yield self._gauges(name, text, _each(hosts, attribute), ("host",))
        for name, (attribute, text) in HOST_COUNTERS.items():
            yield self._counters(name, text, _each(hosts, attribute), ("host",))

    # --- families --------------------------------------------------------------------------------------------
    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return self._gauges(name, text, [((), value)])

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return self._counters(name, text, [((), value)])

    def _states(self, name: str, text: str, states: Sequence[str], found: Sequence[str]) -> Metric:
        """How many of `found` are in each of `states`."""
        return self._gauges(name, text, [((state,), found.count(state)) for state in states], ("state",))

    def _gauges(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        return self._filled(GaugeMetricFamily(PREFIX + name, text, labels=("model", *labels)), samples)

    def _counters(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        return self._filled(CounterMetricFamily(PREFIX + name, text, labels=("model", *labels)), samples)

    def _filled(self, family: Any, samples: Samples) -> Metric:
        for values, value in samples:
            family.add_metric((self._model, *values), value)
        metric: Metric = family
        return metric

    def _histograms(
        self, name: str, text: str, samples: Iterable[tuple[Sequence[str], Histogram]], labels: Sequence[str] = ()
    ) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=("model", *labels))
        for values, histogram in samples:
            reading = histogram.read()
            bounds = [*map(str, map(float, reading.bounds)), "+Inf"]
            buckets = list(zip(bounds, map(float, reading.cumulative), strict=True))
            family.add_metric((self._model, *values), buckets, reading.total)
        return family


def _each(hosts: Sequence[HostStatus], attribute: str) -> Samples:
    return [((host.host_id,), getattr(host, attribute)) for host in hosts]
