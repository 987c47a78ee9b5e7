"""Pages of results are made of their JSON, and of nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.floor import Rates, Work, layer_work
from benchmarks.pages.layer import CACHED, HIVEMIND, ONE, OURS

RATES = {"copy_bytes_per_s": 1e9, "read_bytes_per_s": 2e9, "flops_per_s": 1e11}


@pytest.mark.parametrize("name", sorted(file.stem for file in report.RESULTS.glob("*.json")))
def test_a_page_of_the_repository_is_what_its_json_gives(name: str) -> None:
    data = json.loads((report.RESULTS / f"{name}.json").read_text())
    assert (report.RESULTS / f"{name}.md").read_text() == report.page(name, data)


def test_every_page_has_its_json() -> None:
    assert {file.stem for file in report.RESULTS.glob("*.md")} == {file.stem for file in report.RESULTS.glob("*.json")}


def test_a_typed_figure_and_a_missing_page_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    overlap = overlap_data()
    (tmp_path / "overlap.json").write_text(json.dumps(overlap))
    text = report.page("overlap", overlap)
    assert report.stale_pages() == {tmp_path / "overlap.md": text}
    (tmp_path / "overlap.md").write_text(text)
    assert report.stale_pages() == {}
    (tmp_path / "overlap.md").write_text(text.replace("110", "990"))
    assert list(report.stale_pages()) == [tmp_path / "overlap.md"]


@pytest.mark.parametrize("quick", [False, True])
def test_a_run_leaves_json_and_page_but_a_quick_one_only_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: bool
) -> None:
    results, asked = tmp_path / "results", tmp_path / "asked.json"
    monkeypatch.setattr(report, "RESULTS", results)
    given = report.options("", rounds=3).parse_args(["--json", str(asked), *(["--quick"] if quick else [])])
    assert isinstance(given, argparse.Namespace) and given.rounds == 3
    report.finish("overlap", {**overlap_data(), "machine": {"cores": 2}}, given)
    data = json.loads(asked.read_text())
    assert data["tokens_per_s"] == {"1": [100.0, 100.0, 100.0], "2": [110.0, 120.0, 130.0]}  # as JSON has it: text keys
    assert "| `in_flight: 2` | 120 (110–130) | 1.20 (1.10–1.30) |" in capsys.readouterr().out
    if quick:
        assert not results.exists()
    else:
        assert json.loads((results / "overlap.json").read_text()) == data
        assert (results / "overlap.md").read_text() == report.page("overlap", data)


def overlap_data() -> dict[str, Any]:
    return {
        "machine": {"cores": 2},
        "model": {"num_layers": 4, "hidden_size": 256, "num_experts": 8, "expert_width": 512, "top_k": 2},
        "micro_batches": 4,
        "windows": 4,
        "window": 128,
        "tokens_per_s": {"1": [100.0, 100.0, 100.0], "2": [110.0, 120.0, 130.0]},
        "loads": {
            "prompts": {"requests": 32, "prompt": 128, "answer": 1},
            "answers": {"requests": 32, "prompt": 8, "answer": 128},
        },
        "overlap_min_tokens": 16,
        "max_step_tokens": 2048,
        "serving_tokens_per_s": {kind: {"off": [50.0] * 3, "on": [60.0] * 3} for kind in ("prompts", "answers")},
    }


# --- Floors and goals ----------------------------------------------------------------------------------------
def test_the_floor_of_a_layer_is_reading_or_multiplying_and_the_copy() -> None:
    forward = layer_work(4, 8, 16, 2, 3, gated=False, train=False)
    assert forward == Work(moved_bytes=2 * 4 * 8 * 4, read_bytes=3 * 2 * 8 * 16 * 4, flops=2 * 4 * 2 * 2 * 8 * 16)
    gated = layer_work(4, 8, 16, 2, 3, gated=True, train=True)
    assert (gated.moved_bytes, gated.read_bytes) == (2 * forward.moved_bytes, 4.5 * forward.read_bytes)
    assert gated.flops == 4.5 * forward.flops
    rates = Rates(copy_bytes_per_s=10, read_bytes_per_s=20, flops_per_s=50)
    assert Work(moved_bytes=30, read_bytes=40, flops=50).least_s(rates) == 3 + 2
    assert Work(moved_bytes=30, read_bytes=40, flops=500).least_s(rates) == 3 + 10
    assert rates.best(Rates(20, 10, 60)) == Rates(20, 20, 60)


def layer_data(names: tuple[str, ...]) -> dict[str, Any]:
    speeds = {ONE: 1.0, OURS: 2.0, CACHED: 1.0, HIVEMIND: 10.0}
    seconds = {tokens: {name: [0.01 * speeds[name]] * 3 for name in names} for tokens in ("1", "64", "4096")}
    return {
        "problem": {"width": 1024, "inner": 4096, "experts": 8, "top_k": 2, "gated": False},
        "cores": 2,
        "contestants": dict.fromkeys(names, "about"),
        "touched": {"1": 2, "64": 8, "4096": 8},
        "rates": RATES,
        "others_cores": [0.1],
        "seconds": {
            "forward": seconds,
            "train": {t: {n: v for n, v in s.items() if n != CACHED} for t, s in seconds.items()},
        },
    }


def rows(text: str, first: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for line in text.splitlines()
        if line.startswith(f"| {first} |")
    ]


def test_the_layers_page_puts_goals_and_the_floor_beside_each_figure() -> None:
    data = layer_data((ONE, OURS, CACHED, HIVEMIND))
    text = report.page("layer", {"machine": {}, **data})
    forward, train = rows(text, f"{OURS} / {HIVEMIND}")
    assert forward == ["5.00 (5.00–5.00), goal ≥ 4", "5.00 (5.00–5.00), goal ≥ 4", "5.00 (5.00–5.00)"] == train
    assert rows(text, f"{CACHED} / {ONE}") == [["1.00 (1.00–1.00)"] * 2 + ["1.00 (1.00–1.00), goal ≥ 0.99"]]
    least = rows(text, "least, ms")[0]  # by hand: 2 experts of 33.6 MB at 2 GB/s, and 8 KB at 1 GB/s
    assert least[0] == f"{1000 * (2 * 2 * 1024 * 4096 * 4 / 2e9 + 2 * 1024 * 4 / 1e9):.2f}"
    assert least[2] == f"{1000 * (2 * 4096 * 2 * 2 * 1024 * 4096 / 1e11 + 2 * 4096 * 1024 * 4 / 1e9):.2f}"
    assert rows(text, f"{OURS} / least")[0][0] == f"{20 / float(least[0]):.2f}"
    assert "left out" not in text


def test_the_layers_page_says_who_was_left_out() -> None:
    data = layer_data((ONE, OURS))
    text = report.page("layer", {"machine": {}, **data})
    assert "hivemind was left out: it is not installed here" in text
    assert rows(text, HIVEMIND) == []


def figures(tokens_per_s: float) -> list[dict[str, float]]:
    keys = ("total_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "cpu_s_per_token")
    once = {"output_tokens_per_s": tokens_per_s, **dict.fromkeys(keys, 1.0)}
    return [{**once, "total_tokens_per_s": 1.25 * tokens_per_s}] * 2


def test_the_page_of_decoding_has_the_cache_s_goal_under_zipf_only() -> None:
    from benchmarks.pages.decode import CACHED as DECODE_CACHED
    from benchmarks.pages.floors import prompt_work, step_work
    from benchmarks.pages.serving import IN_PROCESS

    settings = {
        "clients": 16, "requests": 32, "min_prompt": 8, "max_prompt": 16, "min_output": 96, "max_output": 128,
        "layers": 8, "experts": 32, "hidden": 256, "expert_width": 256, "top_k": 4, "vocabulary": 4096, "cores": 2,
    }  # fmt: skip
    law = {"hot_share": {"prompts": 0.3, "answers": 0.4}, "same_answers": {"ray_moe": [1.0]}}
    data = {
        "settings": settings,
        "contestants": {"ray_moe": "a", IN_PROCESS: "b", DECODE_CACHED: "c"},
        "goals": {"ray_moe": 0.7, DECODE_CACHED: 0.85},
        "cached_part": 0.25,
        "rates": RATES,
        "laws": {
            "random": {**law, "figures": {"ray_moe": figures(80.0), IN_PROCESS: figures(100.0)}},
            "zipf": {
                **law,
                "figures": {"ray_moe": figures(80.0), DECODE_CACHED: figures(90.0), IN_PROCESS: figures(100.0)},
            },
        },
    }
    text = report.page("decode", {"machine": {}, **data})
    assert rows(text, f"ray_moe / {IN_PROCESS}") == [["0.80 (0.80–0.80)", "≥ 0.7"], ["0.80 (0.80–0.80)", ""]]
    assert rows(text, f"{DECODE_CACHED} / {IN_PROCESS}") == [["0.90 (0.90–0.90)", "≥ 0.85"]]
    step = step_work(settings)  # 8 layers of 32 experts of 3 matrices, attention's four, and the words
    weights = 8 * (32 * 3 * 256 * 256 + 256 * 64 * (2 * 4 + 2 * 2)) + 256 * 4096
    assert step.read_bytes == 4 * weights
    least_s = step.least_s(Rates(**RATES)) / 16 + 0.25 * prompt_work(settings).least_s(Rates(**RATES))
    assert prompt_work(settings).flops == 2 * 8 * (4 * 3 * 256 * 256 + 256 * 64 * (2 * 4 + 2 * 2))
    assert f"takes {1000 * least_s:.2f} ms at least. It took ray_moe 12.50 ms ({0.0125 / least_s:.1f}×)" in text


def test_the_page_of_starting_adds_up_its_floor() -> None:
    data = {
        "size": {"num_hidden_layers": 8, "num_local_experts": 8, "hidden_size": 8, "intermediate_size": 9, "actors": 8},
        "checkpoint_bytes": 1_500_000_000,
        "goals": {"start": 2.0, "added_s": 1.0, "rss": 1.3},
        "figures": {
            "floor": {"import_s": [2.0, 2.0], "read_s": [1.0, 2.0], "torch_rss_bytes": [2**28, 2**28]},
            "warm": {
                "ready_s": [6.0, 6.0], "added_s": [0.5, 0.7], "standby_again_s": [1.0, 1.0],
                "beyond_weights_bytes": [2**29, 2**29], "own_bytes": [2**27, 2**27],
            },
            "cold": {
                "ready_s": [12.0, 12.0], "added_s": [0.5, 0.7], "standby_again_s": [8.0, 8.0],
                "beyond_weights_bytes": [2**29, 2**29], "own_bytes": [2**28, 2**28],
            },
        },
    }  # fmt: skip
    text = report.page("start", {"machine": {}, **data})
    assert "together 3.50 (3.00–4.00) s." in text
    assert rows(text, "beside the floor") == [["1.75 (1.50–2.00)", "3.50 (3.00–4.00)", "≤ 2"]]
    assert rows(text, "beside a process with torch") == [["2.00 (2.00–2.00)", "2.00 (2.00–2.00)", "≤ 1.3"]]
    assert rows(text, "that beside a process with torch") == [["0.50 (0.50–0.50)", "1.00 (1.00–1.00)", ""]]
