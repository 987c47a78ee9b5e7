"""`ray-moe compare-dense`: what sparse weights buy on this machine, beside a dense model."""

from __future__ import annotations

import statistics

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_moe.cli.terminal import ProgressView
from ray_moe.cli.upcycle import format_count
from ray_moe.models.compare import CompareSettings, Comparison, Spread, compare

COLUMNS = ("", "weights", "active", "trains (tokens/s)", "without update", "first token (ms)", "token (ms)")


def run(settings: CompareSettings) -> None:
    """Train and ask the models, showing how far it is, and print what was measured."""
    with ProgressView(Console(stderr=True)) as view:
        view.update("making", 0, 0, "a dense model, a small one and an MoE model")
        made = compare(settings, lambda what, done, total: view.update(what, done, total, f"turn {done} of {total}"))
    console = Console()
    console.print(table(made, settings.batch * settings.window))
    console.print("Each / dense: median of the turns (least-most). Trains: how many times as fast.", highlight=False)
    losses = made.losses_after_the_same_time()
    if losses is not None:
        texts = (f"{each.name} {loss:.3f}" for each, loss in zip(made.models, losses, strict=True))
        console.print(f"loss after the same time: {', '.join(texts)} nats per byte", highlight=False)


def table(made: Comparison, tokens: int) -> Table:
    """One row for each model, and one for each beside the dense one; `tokens` of a step."""
    out = Table(header_style="bold", box=SIMPLE_HEAD)
    for name in COLUMNS:
        out.add_column(name, justify="right" if name else "left")
    for each in made.models:
        rates = (_median([tokens / step_s for step_s in taken], 0) for taken in (each.step_s, each.gradient_s))
        times = (_median([1000 * taken_s for taken_s in taken], 2) for taken in (each.prompt_s, each.token_s))
        out.add_row(each.name, format_count(each.total), format_count(each.active), *rates, *times)
    for each in (made.small, made.moe):
        sizes = (f"{each.total / made.dense.total:.2f}", f"{each.active / made.dense.active:.2f}")
        speedups = (made.speedup(each), made.speedup(each, with_update=False))
        out.add_row(
            f"{each.name} / dense", *sizes, *map(_cell, (*speedups, made.first_token(each), made.latency(each)))
        )
    return out


def _median(numbers: list[float], digits: int) -> str:
    return f"{statistics.median(numbers):.{digits}f}" if numbers else "-"


def _cell(ratio: Spread | None) -> str:
    return "-" if ratio is None else str(ratio)
