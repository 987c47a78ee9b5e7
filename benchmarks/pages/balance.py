"""The page of `benchmarks/balance.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import report

TITLES = {
    "window": "Planned and scored on the same window",
    "drift": "Planned on one window, scored on later batches: each expert's load times exp(0.3 normal)",
    "topics": "The same, batches being mixtures of {num_topics} topics that come and go",
}


def page(data: report.Data) -> str:
    """Made of `results/balance.json`."""
    times, loads = data["time_s"], data["loads"]
    parts = [
        "# Balance",
        "Balancedness, mean / max of tokens per host (1 is perfect), mean (least–greatest) over "
        f"{len(loads)} laws of load ({', '.join(f'{kind} {shape}' for kind, shape in loads)}) and {data['seeds']} "
        "seeds. Rows: experts, hosts, slots beyond one for each expert. A batch has 4,096 tokens, top-8. "
        "*Equal split*: an expert's rows over its replicas; *best split*: the linear program.",
    ]
    for name, title in TITLES.items():
        rows = data["balancedness"][name]
        columns = sorted(next(iter(rows.values())), key=lambda column: column.startswith("ours"))
        cells = {setting: [cell(values[column]) for column in columns] for setting, values in rows.items()}
        parts += [f"## {title.format(num_topics=data['num_topics'])}", report.table(columns, cells)]
    parts += [f"Not compared: {line}" for line in data["missing"]]
    first, later, split, _ = (statistics.median(seconds) for seconds in times.values())
    parts += [
        "## Cost",
        f"A planning pass over {data['layers']} layers of 256 experts on 64 hosts with 5 slots, one core: {first:.2f} "
        f"s the first time, {later:.2f} s on a placement that is there. Splitting a batch of 4,096 tokens, top-8, for "
        f"one such layer: {split * 1e6:.0f} µs, {report.cell(times['split'], times['dispatch'])} of the time that "
        "`ops/dispatch.split_by_host` takes to group the same batch.",
    ]
    return "\n\n".join(parts)


def cell(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.2f}–{max(values):.2f})"
