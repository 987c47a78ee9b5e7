"""The page of `benchmarks/quantization.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import report

Runs = Sequence[Mapping[str, float]]


def page(data: report.Data) -> str:
    """Made of `results/quantization.json`."""
    s, steps = data["settings"], data["steps"]
    between = "\n\n"  # no backslash within an f-string before Python 3.12
    return f"""# Experts in 8 bits

The network of `examples/moe_layer_lm.py` (width {s["width"]}, {s["layers"]} layers, {s["experts"]} experts), trained for {steps}
steps; means of {len(data["forms"]["none"])} seeds. Experts held in each form of `experts.quantization`: KiB of their weights,
how far logits are from those of float32 (norm over norm), how often the most probable byte is the same, and nats a byte
of files that were kept apart.

{forms_table(data["forms"])}

## Time

One expert, one thread, as a multiple of float32 weights (median, least and greatest of the rounds).

{between.join(times_table(shape, by_rows) for shape, by_rows in data["times"].items())}

## Training in 8 bits

The same training with the experts' weights as int8 codes (`ops/quantized_training.py`): KiB of weights and
compensations between steps, without gradients and optimizer state, and the loss as above, of the codes alone.

{learned_table(data["training"])}

The float32 network of each seed trained on for {steps // 2} steps with a learning rate of {s["tune_lr"]:g}, where
updates are small beside the steps of the codes:

{learned_table(data["tuning"])}"""  # noqa: E501


def forms_table(forms: Mapping[str, Runs]) -> str:
    whole = mean(forms["none"], "bytes")
    cells = {}
    for kind, runs in forms.items():
        worse = beside(runs, forms["none"])
        cells[f"`{kind}`"] = [
            f"{mean(runs, 'bytes') / 1024:,.0f} ({whole / mean(runs, 'bytes'):.2f}×)",
            f"{100 * mean(runs, 'error'):.2f} %",
            f"{100 * mean(runs, 'agree'):.1f} %",
            f"{mean(runs, 'loss'):.4f}",
            f"{statistics.mean(worse):+.3f} %",
        ]
    return report.table(["KiB", "error of logits", "same byte", "loss", "beside `none`"], cells)


def times_table(shape: str, by_rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    names = [name for name in next(iter(by_rows.values())) if name != "none"]
    lines = {f"`{name}`": [report.cell(each[name], each["none"]) for each in by_rows.values()] for name in names}
    micros = ", ".join(f"{rows}: {1e6 * statistics.median(each['none']):,.0f}" for rows, each in by_rows.items())
    columns = [f"{rows} row{'s' if rows != '1' else ''}" for rows in by_rows]
    return f"D and F {shape} (microseconds of `none` by rows: {micros}):\n\n{report.table(columns, lines)}"


def learned_table(results: Mapping[str, Runs]) -> str:
    lines, exact = {}, results["float32"]
    for name, runs in results.items():
        worse = beside(runs, exact)
        spread = f"{statistics.mean(worse):+.2f} % ({min(worse):+.2f} to {max(worse):+.2f})"
        title = "float32" if name == "float32" else f"int8, compensation `{name}`"
        cells = [f"{mean(runs, 'bytes') / 1024:,.0f}", f"{mean(runs, 'loss'):.4f}"]
        lines[title] = [*cells, "" if name == "float32" else spread]
    return report.table(["KiB", "loss", "beside float32"], lines)


def mean(runs: Runs, key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def beside(runs: Runs, exact: Runs) -> list[float]:
    """By how many per cent the loss of each run is greater."""
    return [100 * (run["loss"] / other["loss"] - 1) for run, other in zip(runs, exact, strict=True)]
