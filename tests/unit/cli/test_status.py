"""`ray-moe status`: tables that fit a terminal, for small models and large ones, and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from ray_moe.cli import tables
from ray_moe.cli.commands import commands
from ray_moe.types import ClusterEvent
from tests.unit.cli.fakes import LAYERS, FakeClient, client_that, status, table

run = CliRunner().invoke


def text(part: RenderableType, width: int = 80) -> list[str]:
    """The lines of `part` in a terminal of `width` columns."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(part)
    return [line.rstrip() for line in capture.get().splitlines()]


def row(lines: list[str], name: str) -> list[str]:
    return next(line.split() for line in lines if line.startswith(name))


def test_hosts_in_eighty_columns() -> None:
    lines = text(tables.hosts(status().hosts, table()))
    assert row(lines, "expert-0") == "expert-0 ready 101 0-1 × 2 layers 1.6 MB 300.0 MB 44 62% 0".split()
    assert row(lines, "expert-1") == "expert-1 ready 102 2-3 × 2 layers 1.6 MB 300.0 MB 33 62% 1".split()
    assert max(map(len, lines)) <= 80


def test_a_loading_host_shows_how_far_it_is_and_nodes_show_when_there_are_two() -> None:
    first, second = status().hosts
    second = replace(second, state="loading", loaded_bytes=400_000, node_id="m" * 56, pid=0)
    lines = text(tables.hosts((first, second)), width=100)
    assert row(lines, "expert-1") == "expert-1 loading mmmmmmmm 4 25% 300.0 MB 33 62% 1".split()
    assert row(lines, "expert-0")[2] == "nnnnnnnn"


def test_summary_says_how_the_service_is() -> None:
    lines = text(tables.summary(status(model="models/[tiny]")))
    assert lines[0] == "models/[tiny] (qwen3_moe)  ready for 1 h 2 min"
    assert lines[-2] == "requests: 1 active, 2 queued, 5 failed; 64 tokens generated"
    assert lines[-1] == "experts: balancedness 0.50, 75% to survive a lost node; 3 calls again, 9 hedged"
    assert max(map(len, lines)) <= 80


def test_summary_says_what_the_router_computes_itself_and_what_is_changing() -> None:
    changed = status(changing="resize: 2 to 3 hosts")
    lines = text(tables.summary(replace(changed, router=replace(changed.router, own_rows=7, lifeboat_loads=2))))
    assert lines[-2] == "router's own experts: 0 B, 7 rows computed, 2 read by the lifeboat"
    assert lines[-1] == "changing: resize: 2 to 3 hosts"


def test_the_last_events_are_shown() -> None:
    happened = tuple(ClusterEvent(float(second), "moved", f"expert {second}") for second in range(20))
    lines = text(tables.events(happened))
    assert len(lines) == tables.MAX_EVENTS + 3
    assert lines[-1].split()[1:] == ["moved", "expert", "19"]


def test_heat_is_scaled_to_the_row_and_never_hides_a_used_expert() -> None:
    assert tables.heat([0, 1, 500, 1000], 80).plain == "·▁▄█"
    assert tables.heat([0, 0], 80).plain == "··"
    assert len(tables.heat(list(range(1, 257)), 64).plain) == 64


def test_tokens_per_expert_of_a_small_model() -> None:
    lines = text(tables.tokens_per_expert(status().tokens_per_expert, 80))
    assert row(lines, "layers.0.mlp") == ["layers.0.mlp", "·▄█▄", "2", "(50%)", "40", "0.50"]
    assert row(lines, "layers.1.mlp") == ["layers.1.mlp", "█▂▂▂", "0", "(62%)", "40", "0.40"]


def test_tokens_per_expert_of_a_large_model_stay_on_one_screen() -> None:
    counts = {f"model.layers.{i}.mlp.experts": tuple(range(256)) for i in range(61)}
    lines = text(tables.tokens_per_expert(counts, 120), width=120)
    assert len(lines) <= tables.MAX_LAYER_ROWS + 4
    assert max(map(len, lines)) <= 120
    assert row(lines, "layers.60.mlp")[-2] == str(sum(range(256)))
    assert row(lines, "layers.0.mlp")[:3] == ["layers.0.mlp", "…", "layers.2.mlp"]


def test_layers_without_tokens_or_without_experts() -> None:
    lines = text(tables.tokens_per_expert({"a": (0, 0), "b": (1, 0), "c": ()}, 80))
    assert row(lines, "a") == ["a", "··", "0"]
    assert row(lines, "b") == ["b", "█·", "0", "(100%)", "1", "0.50"]
    text(tables.tokens_per_expert({}, 80))


def test_ranges() -> None:
    assert tables._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


@pytest.mark.parametrize("starting", [False, True])
def test_the_command_prints_all_parts(monkeypatch: pytest.MonkeyPatch, starting: bool) -> None:
    monkeypatch.setattr("ray_moe.cli.status.Client", client_that(starting=starting))
    result = run(commands, ["status"])
    assert result.exit_code == 0
    assert all(part in result.stdout for part in ("qwen3_moe", "expert hosts", "tokens per expert", "layers.1.mlp"))


@pytest.mark.parametrize("starting", [False, True])
def test_json_has_everything(monkeypatch: pytest.MonkeyPatch, starting: bool) -> None:
    monkeypatch.setattr("ray_moe.cli.status.Client", client_that(starting=starting))
    told = json.loads(run(commands, ["status", "--json"]).stdout)
    assert told["router"]["rss_bytes"] == 450_000_000
    assert told["hosts"][1]["restarts"] == 1
    assert told["tokens_per_expert"][LAYERS[0]] == [0, 10, 20, 10]
    if starting:
        assert told["placement"] is None
    else:
        assert told["placement"]["hosts_of"][LAYERS[1]][3] == ["expert-1"]
        assert told["placement"]["addresses"]["expert-0"]["tcp"] == "127.0.0.1:1"


def test_a_service_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_moe.cli.status.Client", client_that(status=FakeClient.placement, starting=True))
    result = run(commands, ["status"])
    assert (result.exit_code, result.stderr) == (1, "error: it is starting\n")
