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
    loads, serving = data["loads"], data["serving_tokens_per_s"]
    served = {
        f"{load['requests']} {_what(load)}": [
            report.spread(serving[kind]["off"], 0),
            report.spread(serving[kind]["on"], 0),
            report.cell(serving[kind]["on"], serving[kind]["off"]),
        ]
        for kind, load in loads.items()
    }
    return (
        "# Two batches at once\n\n"
        "While the rows of one batch are with the experts, the backbone computes another one. A model over bytes "
        f"({model['num_layers']} layers, width {model['hidden_size']}, {model['num_experts']} experts of "
        f"{model['expert_width']}, top-{model['top_k']}); one thread for each process, so that what one waits for, the "
        f"other computes on a core of its own. Median of {len(first)} rounds (least–greatest).\n\n"
        "## Training: micro-batches in flight\n\n"
        f"A worker and an expert actor, {data['micro_batches']} micro-batches of {data['windows']}×{data['window']} "
        "tokens a step. Runs take turns, and have the same losses to within 1e-5. Tokens per second of the median "
        f"step, and as a multiple of one at a time.\n\n{report.table(['tokens/s', 'ratio'], rows)}\n\n"
        "## Serving: halves of a step\n\n"
        f"A router and an expert actor, steps of up to {data['max_step_tokens']:,} tokens, those of "
        f"{data['overlap_min_tokens']} and more in two halves (`router.overlap_min_tokens`) or not. Requests that come "
        "together take turns, and have the same answers. All tokens computed, per second. A half of a step reads the "
        "weights of almost as many experts as the whole does, so nothing is gained where few tokens share "
        f"them.\n\n{report.table(['off, tokens/s', 'on, tokens/s', 'ratio'], served)}"
    )


def _what(load: report.Data) -> str:
    return f"prompts of {load['prompt']} tokens" if load["answer"] == 1 else f"answers of {load['answer']} tokens"
