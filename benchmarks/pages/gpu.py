"""The page of `benchmarks/gpu.py`."""

from __future__ import annotations

from benchmarks import report

ONE = "one process, `transformers` grouped_mm"
SHARING = {
    "mps": "Side by side on the card, under NVIDIA's MPS (`nvidia-cuda-mps-control -d`)",
    "turns": "In turns, as processes share a card by themselves",
}


def page(data: report.Data) -> str:
    """Made of `results/gpu.json`."""
    text = (
        "# One GPU\n\n"
        f"One MoE layer in bfloat16 on one {data['gpu']}: speed relative to one process with all "
        "experts (`transformers` grouped_mm); above 1 is faster. The hosts are processes of their own that share the "
        "card; hidden states start and end on it. Median of the rounds (least–greatest).\n"
    )
    for sharing, layer_s in data["layer_s"].items():
        names = next(iter(layer_s.values()))
        rows = {name: [report.cell(each[ONE], each[name]) for each in layer_s.values()] for name in names}
        text += f"\n## {SHARING[sharing]}\n\n{report.table(list(layer_s), rows)}\n"
        text += f"\nOne process takes {', '.join(_one(name, each) for name, each in layer_s.items())}.\n"
    for sharing, why in data["left_out"].items():
        text += f"\n## {SHARING[sharing]}\n\nNot run: {why}.\n"
    return text.rstrip("\n")


def _one(name: str, times: report.Data) -> str:
    return f"{report.spread([1000 * second for second in times[ONE]])} ms ({name})"
