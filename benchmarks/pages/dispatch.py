"""The page of `benchmarks/dispatch.py`."""

from __future__ import annotations

from benchmarks import report

ONE, FLOOR = "one process", "shared memory + eventfd, two cores"


def page(data: report.Data) -> str:
    """Made of `results/dispatch.json`."""
    p, layer_s, way_s = data["problem"], data["layer_s"], data["way_s"]
    columns = [f"{size} tokens" if size != "1" else "1 token" for size in layer_s]
    layer = {name: [report.cell(each[ONE], each[name]) for each in layer_s.values()] for name in layer_s["1"]}
    way = {name: [report.cell(each[name], each[FLOOR]) for each in way_s.values()] for name in way_s["1"]}
    return (
        "# Dispatch\n\n"
        f"MoE layer, {p['experts']} experts of {p['width']}-{p['inner']}-{p['width']} float32, top-{p['top_k']}, on "
        f"{p['hosts']} actors of one thread: speed relative "
        "to one process of two threads (`transformers` grouped_mm); above 1 is faster. Median of the rounds "
        "(least–greatest).\n\n"
        + report.table(columns, layer)
        + f"\n\nThe way alone: identity experts on one host, tokens of {p['width']} float32 there and back, through "
        "the whole dispatcher, as a multiple of the time for the same bytes through shared memory and an eventfd "
        "between two processes on a core each.\n\n" + report.table(columns, way)
    )
