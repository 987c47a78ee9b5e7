"""The floor beside what one MoE layer takes: shared by the pages of `dispatch.py`, `layer.py` and `train_step.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.floor import Rates, Work, layer_work


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
