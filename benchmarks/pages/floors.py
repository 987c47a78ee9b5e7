"""The floor beside what was measured: of one MoE layer, and of a served model. Used by the other pages."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.floor import FLOAT_BYTES, Rates, Work, layer_work


def rates_text(rates: Rates, cores: int) -> str:
    return (
        f"with {cores} threads this machine copies {rates.copy_bytes_per_s / 1e9:.1f} GB/s, reads weights at "
        f"{rates.read_bytes_per_s / 1e9:.1f} GB/s and multiplies matrices at {rates.flops_per_s / 1e9:.0f} GFLOP/s"
    )


def layer_floor(
    data: report.Data, seconds: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str], *, train: bool
) -> str:
    """Text and table. Args: seconds: by tokens and contestant; names: of contestants to put beside the floor."""
    p, rates = data["problem"], Rates(**data["rates"])
    rows: dict[str, list[str]] = {"weights read, MB": [], "GFLOP": [], "rows moved, MB": [], "least, ms": []}
    rows |= {f"{name} / least": [] for name in names}
    for tokens, each in seconds.items():
        work = work_of(p, int(tokens), data["touched"][tokens], train)
        least_s = work.least_s(rates)
        rows["weights read, MB"].append(f"{work.read_bytes / 1e6:.0f}")
        rows["GFLOP"].append(f"{work.flops / 1e9:.2f}")
        rows["rows moved, MB"].append(f"{work.moved_bytes / 1e6:.2f}")
        rows["least, ms"].append(f"{1000 * least_s:.2f}")
        for name in names:
            rows[f"{name} / least"].append(f"{statistics.median(each[name]) / least_s:.2f}")
    columns = [f"{tokens} tokens" if tokens != "1" else "1 token" for tokens in seconds]
    return (
        f"The floor: {rates_text(rates, data['cores'])}. *Least*: the weights of the experts that are touched are read "
        "while the matrices are multiplied, and the rows are copied to the hosts and back, once each.\n\n"
        + report.table(columns, rows)
    )


def work_of(problem: Mapping[str, Any], tokens: int, touched: int, train: bool) -> Work:
    return layer_work(
        tokens,
        problem["width"],
        problem["inner"],
        problem["top_k"],
        touched,
        gated=problem.get("gated", False),
        train=train,
    )


def with_goals(cells: Mapping[str, str], goals: Mapping[str, str]) -> list[str]:
    """Cells of a row, by their column, each with what it should be."""
    return [f"{cell}, goal {goals[key]}" if cell and key in goals else cell for key, cell in cells.items()]


# --- A served model ------------------------------------------------------------------------------------------
def serving_floor(figures: Mapping[str, Sequence[Mapping[str, float]]], data: report.Data) -> str:
    """Text. Args: figures: of each server, round by round."""
    s, rates = data["settings"], Rates(**data["rates"])
    step, prompt = step_work(s), prompt_work(s)
    least_s = {}
    for name, rounds in figures.items():
        before = statistics.median(each["total_tokens_per_s"] / each["output_tokens_per_s"] - 1 for each in rounds)
        least_s[name] = step.least_s(rates) / s["clients"] + before * prompt.least_s(rates)
    taken_s = {name: 1 / statistics.median(each["output_tokens_per_s"] for each in figures[name]) for name in figures}
    ours = next(iter(figures))
    beside = ", ".join(f"{name} {1000 * t:.2f} ms ({t / least_s[name]:.1f}×)" for name, t in taken_s.items())
    return (
        f"The floor: {rates_text(rates, s['cores'])}. A step in which all {s['clients']} get a token reads "
        f"{step.read_bytes / 1e6:.0f} MB of weights, computes {step.flops / 1e9:.2f} GFLOP and moves "
        f"{step.moved_bytes / 1e3:.0f} KB to the experts and back; a token of a prompt computes "
        f"{prompt.flops / 1e6:.1f} MFLOP. So an answer's token, with its part of the prompts, takes "
        f"{1000 * least_s[ours]:.2f} ms at least. It took {beside}."
    )


def prompt_work(s: Mapping[str, int]) -> Work:
    """Of a token of a long prompt, whose weights are read for many: products, and the way to the experts and back."""
    return Work(
        moved_bytes=2 * s["layers"] * s["hidden"] * FLOAT_BYTES,
        read_bytes=0,
        flops=2 * s["layers"] * (s["top_k"] * _expert(s) + _attention(s)),
    )


def step_work(s: Mapping[str, int]) -> Work:
    """Of one token of each client: experts (all that they can touch), attention's matrices, and the words'."""
    tokens, head = s["clients"], s["hidden"] * s["vocabulary"]
    touched = min(s["experts"], tokens * s["top_k"])
    return Work(
        moved_bytes=2 * s["layers"] * tokens * s["hidden"] * FLOAT_BYTES,
        read_bytes=FLOAT_BYTES * (s["layers"] * (touched * _expert(s) + _attention(s)) + head),
        flops=2 * tokens * (s["layers"] * (s["top_k"] * _expert(s) + _attention(s)) + head),
    )


def _expert(s: Mapping[str, int]) -> int:
    return 3 * s["hidden"] * s["expert_width"]


def _attention(s: Mapping[str, int]) -> int:
    """Weights of its matrices, as `serving_work.write_model` makes them: heads of 64."""
    heads, kv_heads = s["hidden"] // 64, max(1, s["hidden"] // 128)
    return s["hidden"] * 64 * (2 * heads + 2 * kv_heads)
