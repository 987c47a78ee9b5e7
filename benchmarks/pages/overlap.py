"""The page of `benchmarks/overlap.py`."""

from __future__ import annotations

from benchmarks import report


def page(data: report.Data) -> str:
    """Made of `results/overlap.json`."""
    model, speeds = data["model"], data["tokens_per_s"]
    first = next(iter(speeds.values()))
    rows = {
        f"`in_flight: {in_flight}`": [report.spread(values, 0), report.cell(values, first)]
        for in_flight, values in speeds.items()
    }
    return (
        "# Micro-batches in flight\n\n"
        f"A model over bytes ({model['num_layers']} layers, width {model['hidden_size']}, {model['num_experts']} "
        f"experts of {model['expert_width']}, top-{model['top_k']}) is trained by a worker and an expert actor of one "
        f"thread each, {data['micro_batches']} micro-batches of {data['windows']}×{data['window']} tokens a step. Runs "
        "take turns, and have the same losses to within 1e-5. Tokens per second of the median step, and as a multiple "
        f"of one at a time: median of {len(first)} rounds (least–greatest).\n\n"
        f"{report.table(['tokens/s', 'ratio'], rows)}"
    )
