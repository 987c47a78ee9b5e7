"""The page of `benchmarks/gpu.py`."""

from __future__ import annotations

from benchmarks import report

ONE = "one process, `transformers` grouped_mm"


def page(data: report.Data) -> str:
    """Made of `results/gpu.json`."""
    layer_s = data["layer_s"]
    names = next(iter(layer_s.values()))
    rows = {name: [report.cell(each[ONE], each[name]) for each in layer_s.values()] for name in names}
    return (
        "# One GPU\n\n"
        f"One MoE layer in bfloat16 on one {data['gpu']}: speed relative to one process with all "
        "experts (`transformers` grouped_mm); above 1 is faster. The hosts are processes of their own that share the "
        "card; hidden states start and end on it. Median of the rounds (least–greatest).\n\n"
        + report.table(list(layer_s), rows)
    )
