"""The page of `benchmarks/elastic.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks import report


def page(data: report.Data) -> str:
    """Made of `results/elastic.json`."""
    skew, stalls, s = data["skew"], data["stall_s"], data["settings"]
    rows = {
        name: [report.cell(skew[f"skewed, {key}"], skew[f"even, {key}"])]
        for name, key in (("fixed placement", "fixed"), ("with replication", "elastic"))
    }

    def spread(values: Sequence[float]) -> str:
        """Seconds; infinite is what did not happen while it was looked for."""
        least, median, most = (
            f"{value:.2f}" if math.isfinite(value) else f"over {s['settle_s']:.0f}"
            for value in (min(values), statistics.median(values), max(values))
        )
        return f"{median} s ({least}–{most})"

    parts = [
        "# Elasticity",
        f"Median of {len(skew['routed_s'])} rounds (least–greatest).",
        "## Skewed traffic",
        f"One layer of {s['experts']} experts of {s['width']}-{s['inner']}-{s['width']} float32 on two actors of one "
        f"thread; batches of {s['tokens']:,} tokens, {s['askers']} under way. Throughput with {s['hot_share']:.0%} of "
        "the tokens for one expert, relative to the same number spread evenly, in turns on the same services.",
        report.table(["skewed / even"], rows),
        f"From the first skewed batch until the routers name two hosts for the hot expert {spread(skew['routed_s'])}, "
        f"until both have worked {spread(skew['served_s'])} (the load is looked at every 0.25 s, half-life 0.5 s).",
        "## Stalls",
        f"{s['streams']} clients generate {s['stream_tokens']} tokens each from a tiny Mixtral on three actors. "
        "Longest pause between two tokens of any stream. Every stream ended, and every token was the one that "
        "`transformers` generates.",
        report.table(["longest stall"], {name: [spread(values)] for name, values in stalls.items()}),
    ]
    return "\n\n".join(parts)
