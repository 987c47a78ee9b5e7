"""The page of `benchmarks/decode.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import report
from benchmarks.pages.floors import serving_floor
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
        serving_floor(figures, data),
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
