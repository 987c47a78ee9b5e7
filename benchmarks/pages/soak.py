"""The page of `benchmarks/soak.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks import report

SETTLED = 0.2
"""The first part of the time, in which caches fill, is left out of the slopes of memory."""


def page(data: report.Data) -> str:
    """Made of `results/soak.json`."""
    memory, minutes = data["memory_mib"], data["minutes"]
    rows = {kind: [f"{count:,}"] for kind, count in sorted(data["counts"].items())}
    slopes = ", ".join(f"{slope(samples):+.2f}" for samples in memory.values())
    sizes = ", ".join(f"{samples[0][1]:.0f} → {samples[-1][1]:.0f}" for samples in memory.values() if samples)
    problems = "\n".join(f"- {problem}" for problem in data["problems"][:20]) or "None."
    return (
        f"# A service at saturation for {minutes:g} minutes\n\n"
        f"`python benchmarks/soak.py --minutes {minutes:g}`. Two routers, three expert actors, of which "
        f"{data['killed']} were killed; {data['tokens']:,} tokens were compared with those of `transformers`.\n\n"
        f"{report.table(['requests'], rows)}\n\n"
        f"Wrong answers, failed valid requests, and malformed ones that were not refused as they should: "
        f"**{len(data['problems'])}**.\n\n{problems}\n\n"
        f"Memory of the routers, MiB: {sizes}; slope after the first fifth of the time: **{slopes} MiB per minute**. "
        f"Longest pause of a stream in the last minute: {data['longest_pause_s']:.2f} s."
    )


def slope(samples: Sequence[Sequence[float]]) -> float:
    """MiB per minute, by least squares over what comes after the settling. Args: samples: seconds and MiB."""
    settled = samples[int(SETTLED * len(samples)) :]
    if len(settled) < 2:
        return 0.0
    return float(np.polyfit([at_s / 60 for at_s, _ in settled], [mib for _, mib in settled], 1)[0])
