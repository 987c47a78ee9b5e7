"""The page of metrics: what a router would give Prometheus if it had one of everything. Called by `hooks.py`."""

from __future__ import annotations

from ray_moe.runtime.measures import Measures
from ray_moe.runtime.vitals import Vitals
from ray_moe.service.metrics_experts import Row
from ray_moe.service.metrics_page import Page
from ray_moe.service.refusals import Refusals
from ray_moe.types import HostStatus, Placement, RouterStatus, RoutingTable, ServiceStatus
from tools.docs.tables import cell, table

HEAD = """# Metrics

What each router answers at `GET /metrics` of its HTTP port, made of the code that answers. All metrics have the label
`model`. Where keys are asked for, it needs one with the role `metrics` (`authorization: {credentials_file: ...}` in
Prometheus' `scrape_configs`); it is not counted against limits. If the controller does not answer within two seconds,
what only it knows is left out.
"""
TAIL = """`ray_moe_expert_tokens_total` has a series for each of the hottest experts
([`server.max_metric_experts`](settings.md#server), 32 in all layers together) and one for each layer with
`expert="other"`. A token counts for the series in which its expert is at that time, so that none ever falls and
`sum by (layer) (rate(...))` is right; an expert stays named for ten minutes at least.

The `outcome` of a request is `stop`, `length` or `done`, `cancelled`, `deadline`, `overloaded`, `invalid` or `failed`.
Only the last one is the service's fault. The `reason` of a refusal is `no_key`, `unknown_key`, `expired_key` or `role`;
without keys it is `host`, a name that could be rebound, or `page`, another web page that wanted something changed.
"""


def page() -> str:
    """Markdown."""
    rows = []
    for family in Page("", _measures(), [Row("layer", 0, 0)], _status(), Refusals().counts).collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"model", "le"}
        rows.append(
            (f"`{name}`", family.type, ", ".join(f"`{each}`" for each in sorted(labels)), cell(family.documentation))
        )
    return f"{HEAD}\n{table(('metric', 'type', 'labels', 'what it is'), sorted(rows))}\n\n{TAIL}"


def _measures() -> Measures:
    vitals = Vitals()
    vitals.outcomes["generate", "stop"] = 0
    return Measures(RouterStatus(0, 0, 0), table=RoutingTable(1, Placement({})), vitals=vitals, version=0)


def _status() -> ServiceStatus:
    hosts = (HostStatus("expert-0", "ready"),)
    return ServiceStatus("", "", "", "ready", 0.0, 1, RouterStatus(0, 0, 0), hosts, {})
