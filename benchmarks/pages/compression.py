"""The page of `benchmarks/compression.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks import report

KEYS = ("replicas", "workers", "rows")


def page(data: report.Data) -> str:
    """Made of `results/compression.json`."""
    return f"{sent_page(data)}\n\n{stdlib_page(data)}"


def sent_page(data: report.Data) -> str:
    results = data["runs"]
    exact = results["as they are"]
    cells = {}
    for name, figures in results.items():
        sizes = [f"{figures[key] / 1024:,.1f} ({exact[key] / figures[key]:.1f}×)" for key in KEYS]
        half, last = (
            f"{figures[key]:.4f} ({100 * (figures[key] / exact[key] - 1):+.2f} %)" for key in ("half", "loss")
        )
        cells[name] = [*sizes, half, last]
    columns = ["gradients to owners", "gradients of a worker", "calls and replies", "loss half-way", "loss at the end"]
    return f"""# What training sends

{data["steps"]} steps of a Mixtral of width {data["width"]}, two workers, two hosts, every expert on both; AdamW with a cosine
schedule. KiB of a step, and how many times fewer than without the option; mean loss of the last tenth of the steps. Of
every call the numbers of its tokens are counted too. With `1bit` a fifth of the steps goes before gradients are
compressed (`compression_warmup_steps`), and counts.

{report.table(columns, cells)}"""  # noqa: E501


def stdlib_page(data: report.Data) -> str:
    runs, steps = data["stdlib"], data["stdlib_steps"]
    exact = runs["none"]
    cells = {}
    for seed, whole, small in zip(data["stdlib_seeds"], exact, runs["1bit"], strict=True):
        ratio = 100 * (small["loss"] / whole["loss"] - 1)
        cells[f"seed {seed}"] = [
            f"{whole['loss']:.4f}",
            f"{small['loss']:.4f} ({ratio:+.2f} %)",
            *(f"{fewer(whole, small, key, True):.1f}×" for key in ("replicas", "workers", "all")),
            f"{fewer(whole, small, 'all', False):.1f}×",
        ]
    of_all = [100 * (b["loss"] / a["loss"] - 1) for a, b in zip(exact, runs["1bit"], strict=True)]
    columns = ["loss", "with `1bit`", "fewer bytes to owners", "of a worker", "of all", "of all, the whole run"]
    return f"""## Gradients in one bit, learning the standard library

The model, data and settings of `examples/train_stdlib_lm.py` for {steps} steps, by two workers on two hosts, every
expert on both; the loss (nats a byte) is that of files that were kept apart, and a run with `1bit` has the same seed,
first weights and batches as the one without. The first {steps // data["warmup"]} steps send whole gradients; bytes are
those of the steps after them, and of the whole run. Those of experts (to owners) have one bit a number, those of the
rest of the model (of a worker) four.

{report.table(columns, cells)}

The loss with `1bit` is {statistics.mean(of_all):+.2f} % (from {min(of_all):+.2f} to {max(of_all):+.2f} %) beside that
without."""


def fewer(whole: Mapping[str, float], small: Mapping[str, float], key: str, is_after: bool) -> float:
    """How many times fewer bytes, after the warm-up or of the whole run."""
    before = f"{key}, warm-up"
    return (whole[key] - is_after * whole[before]) / (small[key] - is_after * small[before])
