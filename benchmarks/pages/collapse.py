"""The page of `benchmarks/collapse.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import report

KEYS = {
    "under-used at first": ("before", ".0%"),
    "under-used (a tenth)": ("tenth", ".1%"),
    "under-used (a quarter)": ("quarter", ".1%"),
    "entropy": ("entropy", ".2f"),
    "loss, nats a byte": ("loss", ".3f"),
    "experts revived": ("revived", ".0f"),
}


def page(data: report.Data) -> str:
    """Made of `results/collapse.json`."""
    s, results = data["settings"], data["runs"]
    cells = {name: [cell(runs, key, form) for key, form in KEYS.values()] for name, runs in results.items()}
    return f"""# Collapse, and the ways out of it

The network of `examples/moe_layer_lm.py` ({s["layers"]} layers of {s["experts"]} experts, top {s["top_k"]}, width {s["width"]}) after
{data["steps"]} steps of {s["batch"]} windows of {s["window"]} bytes of the standard library, {len(results["nothing"])} seeds. Before
the first step the gates' rows of two experts were pulled along the mean hidden state, so that all tokens go to these
two. Under-used: an expert with less than a tenth (a quarter) of 1/{s["experts"]} of the slots. All but the last column are
of files kept apart: mean over the seeds, least and greatest.

`auxiliary loss`: `load_balancing` 0.01; `usage loss`: `usage` 0.01; `loss-free bias`: rate {s["bias_rate"]};
`revival`: every {s["revive_every"]} steps, of experts with less than a quarter, in the first {s["revive_until"]:.0%} of the
steps.

{report.table(list(KEYS), cells)}"""  # noqa: E501


def cell(runs: Sequence[Mapping[str, float]], key: str, form: str) -> str:
    values = [each[key] for each in runs]
    mean, least, most = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least}–{most})"
