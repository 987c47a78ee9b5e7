"""`ray-moe compare-dense`: what sparse weights buy on this machine, beside a dense model."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_moe.cli.terminal import ProgressView
from ray_moe.cli.upcycle import format_count
from ray_moe.models.compare import CompareSettings, Comparison, compare


def run(settings: CompareSettings) -> None:
    """Train and ask both models, showing how far it is, and print what was measured."""
    with ProgressView(Console(stderr=True)) as view:
        view.update("training", 0, 0, "a dense and an MoE model in turns")
        made = compare(settings, lambda done, total: view.update("training", done, total, f"step {done} of {total}"))
    console = Console()
    console.print(table(made, settings.batch * settings.window))
    dense, moe = made.losses_after_the_same_time()
    console.print(f"loss after the same time: dense {dense:.2f}, moe {moe:.2f} nats per byte", highlight=False)


def table(made: Comparison, tokens: int) -> Table:
    """One row for each model and one for their ratio; `tokens` of a step."""
    out = Table(header_style="bold", box=SIMPLE_HEAD)
    for name in ("", "weights", "active", "trains (tokens/s)", "answers (ms/token)"):
        out.add_column(name, justify="right" if name else "left")
    for each in (made.dense, made.moe):
        numbers = (f"{tokens / each.step_s:.0f}", f"{1000 * each.token_s:.2f}")
        out.add_row(each.name, format_count(each.total), format_count(each.active), *numbers)
    ratios = (made.moe.total / made.dense.total, made.moe.active / made.dense.active, made.speedup, made.latency)
    out.add_row("moe / dense", *(f"{ratio:.2f}" for ratio in ratios))
    return out
