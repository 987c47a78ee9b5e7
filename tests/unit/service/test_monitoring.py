"""The dashboard and the alerts of `cluster/` ask for metrics and labels that a service exports.

What the alerts do is tested by Prometheus' own `promtool` (`make alerts`). The parser of PromQL is that of the
`promql-parser` package, so that a query is understood here as Prometheus does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from tests.unit.service.fake_backend import FakeBackend
from tests.unit.service.test_metrics import scraped

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "cluster/grafana/ray_moe.json"
ALERTS = ROOT / "cluster/prometheus/alerts.yaml"
ADDED = {"job", "instance"}
"""Labels that Prometheus gives to everything that it scrapes."""

Exported = Mapping[str, Mapping[str, set[str]]]
"""Name of a series -> its labels -> the values that were seen."""


@dataclass(frozen=True)
class Query:
    where: str
    text: str
    legend: str = ""


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Query]:
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "5m")
            yield Query(panel["title"], text, target["legendFormat"])
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        yield Query(rule["alert"], rule["expr"], " ".join(re.findall(r"\$labels\.\w+", str(rule["annotations"]))))


async def exported() -> Exported:
    backend = FakeBackend()
    backend.vitals.ended("generate", "stop", 0.3)
    backend.vitals.ended("forward", "failed", 0.3)
    found: dict[str, dict[str, set[str]]] = {}
    for sample in (await scraped(backend)).samples:
        labels = found.setdefault(sample.name, {})
        for name, value in sample.labels.items():
            labels.setdefault(name, set()).add(value)
    return found


def inside(expression: Any) -> list[Any]:
    """What an expression is directly made of."""
    found: list[Any] = []
    for name in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
        inner = getattr(expression, name, None)
        found += inner if isinstance(inner, list) else [inner]
    return [each for each in found if each is not None]


def parts(expression: Any) -> Iterator[Any]:
    """The expression and all that it is made of."""
    yield expression
    for each in inside(expression):
        yield from parts(each)


def complaints(query: Query, exported: Exported) -> list[str]:
    """What a query, or the words that are filled from its result, asks for that is not exported."""
    whole = promql.parse(query.text)
    said: list[str] = []
    for part in parts(whole):
        if isinstance(part, promql.VectorSelector):
            said += _unknown(part, exported)
        if isinstance(part, promql.AggregateExpr):
            asked = set(part.modifier.labels) if part.modifier else set()
            selectors = [inner for inner in parts(part.expr) if isinstance(inner, promql.VectorSelector)]
            for selector in selectors:
                missing = asked - set(exported.get(selector.name or "", {})) - ADDED
                said += [f"{selector.name} has no label {label}" for label in sorted(missing)]
    shown = set(re.findall(r"(?:\{\{|\$labels\.)(\w+)", query.legend))
    return said + [f"the result has no label {label}" for label in sorted(shown - _labels(whole, exported))]


def _unknown(selector: Any, exported: Exported) -> Iterator[str]:
    if selector.name not in exported:
        yield f"no metric {selector.name}"
        return
    for matcher in selector.matchers.matchers:
        if matcher.name in ADDED or matcher.value.startswith("$"):
            continue
        values = exported[selector.name].get(matcher.name)
        if values is None:
            yield f"{selector.name} has no label {matcher.name}"
        elif not any(re.fullmatch(matcher.value, value) for value in values):
            yield f"no {selector.name} has {matcher.name}={matcher.value}"


def _labels(expression: Any, exported: Exported) -> set[str]:
    """Of the result."""
    if isinstance(expression, promql.VectorSelector):
        return set(exported.get(expression.name or "", {})) | ADDED
    if isinstance(expression, promql.AggregateExpr) and "topk" not in str(expression.op):
        return set(expression.modifier.labels) if expression.modifier else set()
    vectors = [part for part in inside(expression) if not isinstance(part, promql.NumberLiteral | promql.StringLiteral)]
    return set.intersection(*(_labels(part, exported) for part in vectors))


async def test_every_query_asks_for_what_is_exported() -> None:
    there = await exported()
    asked = list(queries())
    assert {query.where: said for query in asked if (said := complaints(query, there))} == {}
    assert len(asked) > 50


@pytest.mark.parametrize(
    ("text", "legend", "said"),
    [
        ("rate(ray_moe_failover_total[5m])", "", "no metric ray_moe_failover_total"),
        ("ray_moe_failovers", "", "no metric ray_moe_failovers"),
        ('ray_moe_requests_total{result="x"}', "", "ray_moe_requests_total has no label result"),
        ('ray_moe_service_state{state="down"}', "", "no ray_moe_service_state has state=down"),
        ("sum by (node) (ray_moe_hosts)", "", "ray_moe_hosts has no label node"),
        ("max by (job) (ray_moe_hosts)", "{{state}}", "the result has no label state"),
        ("max by (job) (ray_moe_hosts) > 1", "$labels.model", "the result has no label model"),
    ],
)
async def test_a_query_that_asks_for_something_else_is_found(text: str, legend: str, said: str) -> None:
    assert complaints(Query("", text, legend), await exported()) == [said]


async def test_everything_exported_is_on_the_dashboard() -> None:
    asked = " ".join(query.text for query in queries())
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in await exported()}
    assert sorted(name for name in families if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", asked)) == []


def test_the_dashboard_is_what_its_tool_writes(tmp_path: Path) -> None:
    out = tmp_path / "made.json"
    subprocess.run([sys.executable, ROOT / "tools/grafana.py", "--out", out], check=True)
    assert out.read_text() == DASHBOARD.read_text(), "run `make dashboard` and commit what it writes"


def test_panels_lie_beside_each_other_and_have_numbers_of_their_own() -> None:
    every = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in every)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def test_every_alert_is_explained_and_tested() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    names = [rule["alert"] for rule in rules]
    tests = (ROOT / "tests/prometheus/alerts_test.yaml").read_text()
    explained = (ROOT / "docs/monitoring.md").read_text()
    assert all(f"alertname: {name}\n" in tests for name in names)
    assert all(f"`{name}`" in explained for name in names)
    assert all({"summary", "description"} == rule["annotations"].keys() for rule in rules)
