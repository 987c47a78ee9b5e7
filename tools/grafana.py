"""Writes the Grafana dashboard `cluster/grafana/ray_moe.json`; ``make dashboard`` runs it.

A dashboard's JSON says everything thirty times; here is what differs from panel to panel: a title, queries, a unit. The
JSON is committed, since that is what Grafana loads. `tests/unit/service/test_monitoring.py` compares it with what this
writes, and its queries with the metrics that there are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "cluster/grafana/ray_moe.json"
COLUMNS = 24
"""Of Grafana's grid."""
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
CHOSEN = 'job=~"$job", model="$model"'
"""What the variables at the top choose, in every selector."""
SELECTOR = re.compile(r"(ray_moe_\w+)\{(.*?)\}")


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    queries: dict[str, str]
    """Name in the legend -> PromQL, in which METRIC{...} is of the chosen service."""
    unit: str = "short"
    text: str = ""
    """What the (i) beside the title tells."""
    kind: str = "timeseries"
    width: int = 8
    top: float | None = None
    """Highest value of the axis."""
    stacked: bool = False


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """Median and 99th percentile of a histogram, over all routers."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return {
        f"p{percent}{legend}": f"histogram_quantile({percent / 100}, {rate(f'{metric}_bucket', labels)})"
        for percent in (50, 99)
    }


def rate(metric: str, by: str = "") -> str:
    """Per second, over all routers; `metric` may choose by labels."""
    selector = metric if "{" in metric else metric + "{}"
    return f"sum{f' by ({by})' if by else ''} (rate({selector}[$__rate_interval]))"


def mean(metric: str) -> str:
    """Of a histogram."""
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


CACHED = "ray_moe_prompt_cached_tokens_total"
NAMED = 'ray_moe_expert_tokens_total{expert!="other"}'

ROWS: dict[str, list[Panel]] = {
    "At a glance": [
        Panel("State", {"{{state}}": "max by (state) (ray_moe_service_state{}) == 1"}, kind="stat", width=4),
        Panel("Hosts ready", {"ready": 'max (ray_moe_hosts{state="ready"})'}, kind="stat", width=4),
        Panel("Experts without a host", {"experts": "max (ray_moe_experts_without_replica{})"}, kind="stat", width=4),
        Panel("Generations now", {"active": "sum (ray_moe_requests_active{})"}, kind="stat", width=4),
        Panel("Tokens a second", {"generated": rate("ray_moe_generated_tokens_total")}, kind="stat", width=4),
        Panel(
            "Balancedness", {"mean": "avg (ray_moe_balancedness_ratio{})"}, "percentunit", kind="stat", width=4, top=1
        ),
    ],
    "Requests": [
        Panel(
            "Requests by their end", {"{{outcome}}": rate("ray_moe_requests_total", "outcome")}, "reqps", stacked=True
        ),
        Panel(
            "Tokens",
            {
                "generated": rate("ray_moe_generated_tokens_total"),
                "prompts, computed": f"{rate('ray_moe_prompt_tokens_total')} - {rate(CACHED)}",
                "prompts, from the cache": rate(CACHED),
            },
            text="A second. Prompts count when their answers begin.",
        ),
        Panel(
            "Queue",
            {"waiting": "sum (ray_moe_requests_queued{})", "computed": "sum (ray_moe_requests_active{})"},
            text="Generations.",
        ),
        Panel("Time to first token", quantiles("ray_moe_time_to_first_token_seconds"), "s"),
        Panel("Time between tokens", quantiles("ray_moe_inter_token_latency_seconds"), "s"),
        Panel(
            "Wait",
            {**quantiles("ray_moe_queue_time_seconds"), "oldest now": "max (ray_moe_queue_age_seconds{})"},
            "s",
            "From coming to the first step, and how long the oldest has waited that has not begun.",
        ),
        Panel("Duration by kind", quantiles("ray_moe_request_duration_seconds", "kind"), "s", width=12),
        Panel(
            "Refused for who asked",
            {"{{door}} {{reason}}": rate("ray_moe_refused_requests_total", "door, reason") + " > 0"},
            "reqps",
            "No key, one that is unknown or expired, one without the role; without keys: pages of others.",
            width=12,
            stacked=True,
        ),
    ],
    "Steps": [
        Panel("Time of a step", quantiles("ray_moe_step_duration_seconds"), "s"),
        Panel(
            "Size of a step, mean",
            {"tokens": mean("ray_moe_step_tokens"), "generations": mean("ray_moe_step_sequences")},
        ),
        Panel(
            "Keys and values",
            {"used": "sum (ray_moe_kv_cache_used_bytes{})", "room": "sum (ray_moe_kv_cache_max_bytes{})"},
            "bytes",
            "Those of ended generations are kept for others that begin alike, so it may well be full.",
        ),
    ],
    "Experts": [
        Panel(
            "Balancedness",
            {"{{instance}}": "ray_moe_balancedness_ratio{}"},
            "percentunit",
            "Mean over highest load of a host in the last batches; 100% is perfect. Small batches cannot reach it.",
            top=1,
        ),
        Panel(
            "Hottest experts",
            {"{{layer}} {{expert}}": f"topk(10, {rate(NAMED, 'layer, expert')})"},
            text="Tokens a second of those that have a series of their own (server.max_metric_experts).",
        ),
        Panel("Tokens by layer", {"{{layer}}": rate("ray_moe_expert_tokens_total", "layer")}, text="Routed a second."),
        Panel(
            "Replicas",
            {
                "replicas": "max (ray_moe_replicas{})",
                "experts on their last": "max (ray_moe_experts_on_last_replica{})",
                "experts without": "max (ray_moe_experts_without_replica{})",
                "wanted of each": "max (ray_moe_replicas_wanted{})",
            },
        ),
        Panel(
            "Chance to survive a lost node",
            {"no expert is lost": "min (ray_moe_lossless_probability{})"},
            "percentunit",
            top=1,
        ),
        Panel(
            "Changes of placement",
            {"tables a minute": "max (deriv(ray_moe_routing_epoch{}[5m])) * 60"},
            text="New routing tables: moves, lost hosts, hosts that came.",
        ),
    ],
    "Hosts": [
        Panel("Hosts by state", {"{{state}}": "max by (state) (ray_moe_hosts{})"}, stacked=True),
        Panel("Utilisation", {"{{host}}": "max by (host) (ray_moe_host_utilisation_ratio{})"}, "percentunit", top=1),
        Panel("Rows that wait", {"{{host}}": "max by (host) (ray_moe_host_queued_rows{})"}),
        Panel(
            "Rows computed",
            {"{{host}}": "max by (host) (rate(ray_moe_host_rows_total{}[$__rate_interval]))"},
            text="(token, expert) pairs a second.",
        ),
        Panel("Memory", {"{{host}}": "max by (host) (ray_moe_host_memory_bytes{})"}, "bytes"),
        Panel("Replicas held", {"{{host}}": "max by (host) (ray_moe_host_replicas{})"}),
        Panel("Lives before this one", {"{{host}}": "max by (host) (ray_moe_host_restarts_total{})"}, width=12),
        Panel(
            "Where they are",
            {"{{host}} {{state}} {{node}}": "max by (host, state, node) (ray_moe_host_state{})"},
            kind="table",
            width=12,
        ),
    ],
    "Faults and the router": [
        Panel(
            "Calls sent again",
            {
                "failovers": rate("ray_moe_failovers_total"),
                "hedges": rate("ray_moe_hedges_total"),
                "hedges that won": rate("ray_moe_hedges_won_total"),
            },
            "cps",
        ),
        Panel(
            "Computed by the router itself",
            {"of all rows": f"{rate('ray_moe_router_rows_total')} / {rate('ray_moe_expert_tokens_total')}"},
            "percentunit",
            "Hits of its cache and of its lifeboat.",
        ),
        Panel(
            "Experts read by the lifeboat",
            {"experts": "sum (increase(ray_moe_lifeboat_loads_total{}[$__rate_interval]))"},
        ),
        Panel("Memory of routers", {"{{instance}}": "ray_moe_router_memory_bytes{}"}, "bytes"),
        Panel("Experts that routers hold", {"{{instance}}": "ray_moe_router_expert_bytes{}"}, "bytes"),
        Panel("Version of the weights", {"{{instance}}": "ray_moe_weights_version{}"}),
    ],
}


def dashboard() -> dict[str, Any]:
    """As Grafana 10 and later import it."""
    return {
        "title": "ray_moe",
        "uid": "ray-moe",
        "description": "A service of ray_moe: requests, steps, experts, hosts, faults. Written by tools/grafana.py.",
        "tags": ["ray_moe", "moe", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # a shared crosshair
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [_source(), *map(_variable, ("job", "model"), ("", '{job=~"$job"}'))]},
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(label: str, selector: str) -> dict[str, Any]:
    several = {"includeAll": True, "multi": True} if label == "job" else {}
    return {
        "name": label,
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": f"label_values(ray_moe_service_state{selector}, {label})",
        "refresh": 2,  # with the time range
        "sort": 1,
        **several,
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for title, panels in ROWS.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
        }
        x, y, height = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            number, height = number + 1, 4 if panel.kind == "stat" else 8
            yield {"id": number, "gridPos": {"x": x, "y": y, "w": panel.width, "h": height}, **_panel(panel)}
            x += panel.width
        y += height


def _panel(panel: Panel) -> dict[str, Any]:
    custom = {"fillOpacity": 30, "stacking": {"mode": "normal"}} if panel.stacked else {"fillOpacity": 5}
    bounds = {"min": 0} if panel.top is None else {"min": 0, "max": panel.top}
    defaults = {"unit": panel.unit, **bounds, "custom": custom if panel.kind == "timeseries" else {}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATA_SOURCE,
        "targets": [
            _target(panel, letter, item) for letter, item in zip("ABCDEF", panel.queries.items(), strict=False)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
    }


def _target(panel: Panel, letter: str, query: tuple[str, str]) -> dict[str, Any]:
    legend, promql = query
    instant = {"instant": True, "format": "table"} if panel.kind == "table" else {}
    chosen = SELECTOR.sub(lambda found: f"{found[1]}{{{', '.join(filter(None, (CHOSEN, found[2])))}}}", promql)
    return {
        "refId": letter,
        "datasource": DATA_SOURCE,
        "expr": chosen,
        "legendFormat": legend,
        **instant,
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        shown = "name" if "{{state}}" in panel.queries else "value"
        return {"textMode": shown, "colorMode": "none", "graphMode": "none" if shown == "name" else "area"}
    if panel.kind == "table":
        return {}
    return {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"displayMode": "list", "placement": "bottom"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FILE, help="where to write it (default: cluster/grafana/)")
    out = parser.parse_args().out
    out.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
