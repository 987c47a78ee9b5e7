"""The page of `benchmarks/decode.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import report
from benchmarks.floor import FLOAT_BYTES, Rates, Work
from benchmarks.pages.floors import rates_text
from benchmarks.pages.serving import COLUMNS, CONTINUOUS, IN_PROCESS, OURS, figure_rows, rates, same_answers

CACHED = "ray_moe, a quarter of the experts cached by the router"
TITLES = {"random": "Random gates", "zipf": "Gates that choose by Zipf's law"}

Figures = Mapping[str, Sequence[Mapping[str, float]]]


def page(data: report.Data) -> str:
    """Made of `results/decode.json`."""
    s = data["settings"]
    num_rounds = len(data["laws"]["random"]["figures"][OURS])
    parts = [
        "# Decoding",
        f"{s['clients']} concurrent clients (OpenAI's interface, greedy, streamed), {s['requests']} requests in a "
        f"round: prompts of {s['min_prompt']} to {s['max_prompt']} tokens, answers of {s['min_output']} to "
        f"{s['max_output']}. A random Qwen3-MoE in float32, {s['layers']} layers of {s['experts']} experts of "
        f"{s['hidden']}-{s['expert_width']}-{s['hidden']}, top-{s['top_k']}. All share the same {s['cores']} cores "
        "with the clients and take turns in rotating order. "
        f"Median of {num_rounds} {'round' if num_rounds == 1 else 'rounds'} "
        "(least–greatest).",
    ]
    for law, results in data["laws"].items():
        parts += section(law, results, data)
    parts += ["## Contestants", "\n".join(f"- *{name}*: {what}" for name, what in data["contestants"].items())]
    if CONTINUOUS not in data["contestants"]:
        parts.append("`transformers serve` was left out: no `--transformers-python`.")
    return "\n\n".join(parts)


def section(law: str, results: report.Data, data: report.Data) -> list[str]:
    figures, hot = results["figures"], results["hot_share"]
    return [
        f"## {TITLES[law]}",
        f"The hottest {data['cached_part']:.0%} of a layer's experts get {hot['prompts']:.0%} of the slots of prompts, "
        f"and {hot['answers']:.0%} of those of answers.",
        "Output tokens/s, round by round.",
        report.table(["ratio", "goal"], ratio_rows(law, figures, data["goals"])),
        report.table(list(COLUMNS), figure_rows(figures)),
        floor_text(figures, data),
        f"Before the rounds all gave the same texts. {same_answers(results)}",
    ]


def ratio_rows(law: str, figures: Figures, goals: Mapping[str, float]) -> dict[str, list[str]]:
    """Ours beside the engine with all in process, and beside `transformers`; only the cache has a goal under Zipf."""
    rows = {}
    for name in figures:
        if name != IN_PROCESS:
            ours, other = (OURS, name) if name == CONTINUOUS else (name, IN_PROCESS)
            goal = goals.get(name) if law == "random" or name == CACHED else None
            cell = report.cell(rates(figures, ours), rates(figures, other))
            rows[f"{ours} / {other}"] = [cell, "" if goal is None else f"≥ {goal:g}"]
    return rows


def floor_text(figures: Figures, data: report.Data) -> str:
    """A step of all clients: no layer can do with less than its weights read and its products computed."""
    s, best = data["settings"], Rates(**data["rates"])
    step = step_work(s)
    least_s = step.least_s(best)
    steps_s = {
        name: s["clients"] / statistics.median(rates(figures, name)) for name in (OURS, IN_PROCESS) if name in figures
    }
    return (
        f"The floor: a step of {s['clients']} tokens reads up to {step.read_bytes / 1e6:.0f} MB of weights, computes "
        f"{step.flops / 1e9:.2f} GFLOP, and sends {step.moved_bytes / 1e3:.0f} KB to the experts and back; "
        f"{rates_text(best, s['cores'])}. So it takes {1000 * least_s:.2f} ms at least; it took "
        + ", ".join(f"{name} {1000 * taken:.1f} ms ({taken / least_s:.1f}×)" for name, taken in steps_s.items())
        + "."
    )


def step_work(s: Mapping[str, int]) -> Work:
    """Of one token of each client: experts (all that they can touch), attention's matrices, and the words'."""
    hidden, tokens = s["hidden"], s["clients"]
    expert = 3 * hidden * s["expert_width"]
    touched = min(s["experts"], tokens * s["top_k"])
    heads, kv_heads = hidden // 64, max(1, hidden // 128)
    attention = hidden * 64 * (2 * heads + 2 * kv_heads)
    head = hidden * s["vocabulary"]
    return Work(
        moved_bytes=2 * s["layers"] * tokens * hidden * FLOAT_BYTES,
        read_bytes=FLOAT_BYTES * (s["layers"] * (touched * expert + attention) + head),
        flops=2 * tokens * (s["layers"] * (s["top_k"] * expert + attention) + head),
    )
