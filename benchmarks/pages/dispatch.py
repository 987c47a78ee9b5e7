"""The page of `benchmarks/dispatch.py`."""

from __future__ import annotations

from benchmarks import report
from benchmarks.pages.floors import layer_floor, with_goals

ONE, FLOOR = "one process", "shared memory + eventfd, two cores"
OURS = "socket, shared memory"
"""What a service on one node does."""
LAYER_GOALS, WAY_GOALS = {"4096": "≥ 0.95"}, {"1": "≤ 8", "512": "≤ 1.5"}


def page(data: report.Data) -> str:
    """Made of `results/dispatch.json`."""
    p, layer_s, way_s = data["problem"], data["layer_s"], data["way_s"]
    columns = [f"{size} tokens" if size != "1" else "1 token" for size in layer_s]
    layer = {
        name: with_goals(
            {size: report.cell(each[ONE], each[name]) for size, each in layer_s.items()},
            LAYER_GOALS if name == OURS else {},
        )
        for name in layer_s["1"]
    }
    way = {
        name: with_goals(
            {size: report.cell(each[name], each[FLOOR]) for size, each in way_s.items()},
            WAY_GOALS if name == OURS else {},
        )
        for name in way_s["1"]
    }
    floor = "\n\n" + layer_floor(data, layer_s, (ONE, OURS), train=False) if "rates" in data else ""
    return (
        "# Dispatch\n\n"
        f"MoE layer, {p['experts']} experts of {p['width']}-{p['inner']}-{p['width']} float32, top-{p['top_k']}, on "
        f"{p['hosts']} actors of one thread: speed relative "
        "to one process of two threads (`transformers` grouped_mm); above 1 is faster. Median of the rounds "
        "(least–greatest).\n\n"
        + report.table(columns, layer)
        + floor
        + f"\n\nThe way alone: identity experts on one host, tokens of {p['width']} float32 there and back, through "
        "the whole dispatcher, as a multiple of the time for the same bytes through shared memory and an eventfd "
        "between two processes on a core each.\n\n" + report.table(columns, way)
    )
