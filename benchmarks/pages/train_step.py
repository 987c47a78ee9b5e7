"""The page of `benchmarks/train_step.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import report
from benchmarks.pages.floors import layer_floor, with_goals

GOALS = {"4096 tokens": "≥ 1"}
ONE, OURS = "one process", "ray_moe"


def page(data: report.Data) -> str:
    """Made of `results/train_step.json`."""
    contestants, problem, results = data["contestants"], data["problem"], data["seconds"]
    cores = data["cores"]
    equals = [name for name, each in contestants.items() if each["same_math"] and name != OURS]
    columns = [f"{tokens} tokens{what}" for tokens in results for what in ("", ", with the update")]
    pairs = [part for result in results.values() for part in (result["train"], result["whole"])]
    best = [
        report.cell([min(each) for each in zip(*(part[n] for n in equals), strict=True)], part[OURS]) for part in pairs
    ]
    speeds = {name: [report.cell(part[ONE], part[name]) for part in pairs] for name in contestants}
    times = {name: [report.spread(part[name], 3) for part in pairs] for name in contestants}
    num_rounds = len(pairs[0][ONE])
    kind = "SwiGLU" if problem["gated"] else "FFN"
    width, inner = problem["width"], problem["inner"]
    train_s = {tokens: result["train"] for tokens, result in results.items()}
    floor = [layer_floor(data, train_s, (ONE, OURS), train=True)] if "rates" in data else []
    parts = [
        "# A training step",
        f"Forward and backward of one MoE layer: {problem['experts']} experts, top-{problem['top_k']}, {kind} "
        f"{width}-{inner}-{width} in float32; *with the update*: and a step of AdamW (fused). "
        f"All use {cores} cores, and take turns in rotating order. Median of {num_rounds} "
        f"{'round' if num_rounds == 1 else 'rounds'} (least–greatest).",
        f"## Speed, as a multiple of {ONE}",
        report.table(columns, speeds),
        f"And {OURS} as a multiple of whoever else was the quickest in each round, of those that compute the same:",
        report.table(columns, {OURS: with_goals(dict(zip(columns, best, strict=True)), GOALS)}),
        "## Seconds of a step",
        report.table(columns, times),
        *floor,
        "## Share of communication",
        "Of ray_moe's forward and backward, the part in which the slowest host did not compute. So this is all of "
        "communication, and the gate, the sorting and the weighing of rows as well: "
        + "; ".join(f"{tokens} tokens **{share(result['between'])}**" for tokens, result in results.items())
        + ".",
        "## Contestants",
        "\n".join(f"- *{name}*: {each['about']}" for name, each in contestants.items()),
        "Before the rounds those that drop nothing gave the same outputs and gradients.",
    ]
    if not any(name.startswith("DeepSpeed") for name in contestants):
        parts.append("DeepSpeed was left out: no `--deepspeed-python`.")
    return "\n\n".join(parts)


def share(parts: Sequence[float]) -> str:
    return f"{statistics.median(parts):.0%} ({min(parts):.0%}–{max(parts):.0%})"
