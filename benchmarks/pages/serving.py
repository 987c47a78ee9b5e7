"""The page of `benchmarks/serving.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import report
from benchmarks.pages.floors import serving_floor

OURS, IN_PROCESS = "ray_moe", "same engine, experts in process"
SEQUENTIAL, CONTINUOUS = "transformers serve", "transformers serve, continuous batching"
COLUMNS = {
    "output tokens/s": ("output_tokens_per_s", 1),
    "all tokens/s": ("total_tokens_per_s", 1),
    "first token p50, ms": ("ttft_p50_s", 1000),
    "first token p99, ms": ("ttft_p99_s", 1000),
    "between tokens p50, ms": ("itl_p50_s", 1000),
    "between tokens p99, ms": ("itl_p99_s", 1000),
    "CPU, ms/output token": ("cpu_s_per_token", 1000),
}

Figures = Mapping[str, Sequence[Mapping[str, float]]]
"""Of each contestant, round by round."""


def page(data: report.Data) -> str:
    """Made of `results/serving.json`."""
    figures, s = data["figures"], data["settings"]
    num_rounds = len(figures[OURS])
    rows = figure_rows(figures)
    others = [each["others_cores"] for name, rounds in figures.items() if name != OURS for each in rounds]
    clients = [each["client_cores"] for each in figures[OURS]]
    parts = [
        "# Serving",
        f"{s['clients']} concurrent clients, each with one streamed completion after the other (OpenAI's "
        f"interface, greedy), {s['requests']} requests in a round: prompts of {s['min_prompt']} to "
        f"{s['max_prompt']} tokens, outputs of {s['min_output']} to {s['max_output']}. All servers serve "
        f"the same random Qwen3-MoE in float32 ({s['layers']} layers of {s['experts']} experts of "
        f"{s['hidden']}-{s['expert_width']}-{s['hidden']}, top-{s['top_k']}, {s['vocabulary']:,} "
        f"words), which never ends by itself, and share the same {s['cores']} cores with the clients. They take "
        "turns in rotating order, and every round has new prompts, the same for all. Median of "
        f"{num_rounds} {'round' if num_rounds == 1 else 'rounds'} (least–greatest).",
        "## Ratios",
        "Output tokens/s, round by round.",
        report.table(["ratio", "goal"], ratio_rows(data)),
        "## Figures",
        "*First token*: from sending a request. *Between tokens*: of a stream, as its client sees them. *CPU*: of all "
        "processes of the server.",
        report.table(list(COLUMNS), rows),
        *([serving_floor(figures, data)] if "rates" in data else []),
        "## Contestants",
        "\n".join(f"- *{name}*: {what}" for name, what in data["contestants"].items() if name in figures),
    ]
    if better_of_transformers(figures) is None:
        parts.append("`transformers serve` was left out: no `--transformers-python`.")
    parts.append(
        f"Before the rounds all gave the same texts. {same_answers(data)} The other "
        f"servers are suspended (SIGSTOP) during a turn, but for {OURS}, whose processes watch each other: it took "
        f"{report.spread(others)} cores of the others' turns. The clients took {report.spread(clients)} cores of its "
        f"own. Idle threads sleep in all servers (OMP_WAIT_POLICY={data['wait_policy']})."
    )
    return "\n\n".join(parts)


def figure_rows(figures: Figures) -> dict[str, list[str]]:
    return {
        name: [report.spread([scale * each[key] for each in rounds]) for key, scale in COLUMNS.values()]
        for name, rounds in figures.items()
    }


def rates(figures: Figures, name: str) -> list[float]:
    return [each["output_tokens_per_s"] for each in figures[name]]


def better_of_transformers(figures: Figures) -> str | None:
    """The way of `transformers serve` with the higher throughput; None when it was left out."""
    ways = [name for name in (CONTINUOUS, SEQUENTIAL) if name in figures]
    return max(ways, key=lambda name: statistics.median(rates(figures, name)), default=None)


def ratio_rows(data: report.Data) -> dict[str, list[str]]:
    figures, goals = data["figures"], data["goals"]
    limits = {IN_PROCESS: goals["in process"]}
    better = better_of_transformers(figures)
    if better is not None:
        limits[better] = goals["transformers"]
    ours = rates(figures, OURS)
    return {
        f"{OURS} / {name}": [
            report.cell(ours, rates(figures, name)),
            f"≥ {limits[name]}" if name in limits else "",
        ]
        for name in figures
        if name != OURS
    }


def same_answers(data: report.Data) -> str:
    same = {name: statistics.mean(shares) for name, shares in data["same_answers"].items() if name != IN_PROCESS}
    return (
        "Answers of the rounds that were, word for word, those of the engine in one process: "
        f"{', '.join(f'{name} {share:.1%}' for name, share in same.items())}."
    )
