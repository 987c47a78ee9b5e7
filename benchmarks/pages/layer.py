"""The page of `benchmarks/layer.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import report
from benchmarks.floor import Rates, layer_work

ONE, OURS, CACHED = "one process", "ray_moe", "ray_moe, all experts cached by the router"
SERVE, ACTORS = "Ray Serve", "Ray actors"
GROUPED, HIVEMIND = "hivemind, grouped calls", "hivemind, its MoE layer"
TITLES = {"forward": "Forward", "train": "Forward and backward"}

GOALS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("forward", ONE): {"4096": 0.95},
    ("train", ONE): {"4096": 0.92},
    ("forward", SERVE): {"1": 10, "64": 3},
    ("forward", HIVEMIND): {"1": 4, "64": 4, "256": 10},
    ("train", HIVEMIND): {"1": 4, "64": 4, "256": 10},
    ("forward", GROUPED): {"64": 1.5, "1024": 1.5},
    ("train", GROUPED): {"64": 1.5, "1024": 1.5},
}
"""How many times as fast as each of the others we want to be, by tokens."""
CACHED_GOAL = {"4096": 0.99}
"""The same, of ours with everything cached, beside one process."""

Seconds = Mapping[str, Mapping[str, Sequence[float]]]
"""By tokens and contestant, round by round."""


def page(data: report.Data) -> str:
    """Made of `results/layer.json`."""
    p = data["problem"]
    kind = "SwiGLU" if p["gated"] else "FFN"
    num_rounds = len(next(iter(data["seconds"]["forward"].values()))[ONE])
    parts = [
        "# One MoE layer, its experts apart",
        f"Gate and {p['experts']} experts, top-{p['top_k']}, {kind} {p['width']}-{p['inner']}-{p['width']} in float32. "
        f"All use the same {data['cores']} cores, and take turns in rotating order. Median of {num_rounds} rounds "
        "(least–greatest).",
    ]
    for what, seconds in data["seconds"].items():
        parts += section(what, seconds, data)
    parts += ["## Contestants", "\n".join(f"- *{name}*: {about}" for name, about in data["contestants"].items())]
    parts.append(
        "Before the rounds all gave the same outputs and the same gradients of the tokens. Ray and hivemind go on with "
        "their own business while others have their turn."
    )
    if HIVEMIND not in data["contestants"]:
        parts.append("hivemind was left out: no `--hivemind-python`.")
    return "\n\n".join(parts)


def section(what: str, seconds: Seconds, data: report.Data) -> list[str]:
    columns = [f"{tokens} tokens" if tokens != "1" else "1 token" for tokens in seconds]
    names = [name for name in data["contestants"] if any(name in each for each in seconds.values())]
    speeds = {name: [speed(each, name, ONE) for each in seconds.values()] for name in names}
    ours: dict[str, list[str]] = {}
    for name in names:
        if name not in (OURS, CACHED):
            ours[f"{OURS} / {name}"] = with_goals(seconds, OURS, name, GOALS.get((what, name), {}))
    if CACHED in names:
        ours[f"{CACHED} / {ONE}"] = with_goals(seconds, CACHED, ONE, CACHED_GOAL)
    return [
        f"## {TITLES[what]}",
        f"Speed as a multiple of {ONE}:",
        report.table(columns, speeds),
        "How many times as fast ours is, and what it should be:",
        report.table(columns, ours),
        floor_text(data),
        report.table(columns, floor_rows(what, seconds, data)),
    ]


def speed(seconds: Mapping[str, Sequence[float]], name: str, beside: str) -> str:
    return report.cell(seconds[beside], seconds[name]) if name in seconds and beside in seconds else ""


def with_goals(seconds: Seconds, name: str, beside: str, goals: Mapping[str, float]) -> list[str]:
    cells = []
    for tokens, each in seconds.items():
        cell = speed(each, name, beside)
        cells.append(f"{cell}, goal ≥ {goals[tokens]:g}" if cell and tokens in goals else cell)
    return cells


def floor_text(data: report.Data) -> str:
    rates = Rates(**data["rates"])
    return (
        f"The floor: with {data['cores']} threads this machine copies {rates.copy_bytes_per_s / 1e9:.1f} GB/s, reads "
        f"weights at {rates.read_bytes_per_s / 1e9:.1f} GB/s and multiplies matrices at "
        f"{rates.flops_per_s / 1e9:.0f} GFLOP/s. *Least*: the weights of the experts that are touched are read while "
        "the matrices are multiplied, and the rows are copied to the hosts and back, once each."
    )


def floor_rows(what: str, seconds: Seconds, data: report.Data) -> dict[str, list[str]]:
    p, rates = data["problem"], Rates(**data["rates"])
    rows: dict[str, list[str]] = {"weights read, MB": [], "GFLOP": [], "rows moved, MB": [], "least, ms": []}
    rows |= {f"{name} / least": [] for name in (ONE, OURS)}
    for tokens, each in seconds.items():
        touched = data["touched"][tokens]
        work = layer_work(
            int(tokens), p["width"], p["inner"], p["top_k"], touched, gated=p["gated"], train=what == "train"
        )
        least_s = work.least_s(rates)
        rows["weights read, MB"].append(f"{work.read_bytes / 1e6:.0f}")
        rows["GFLOP"].append(f"{work.flops / 1e9:.2f}")
        rows["rows moved, MB"].append(f"{work.moved_bytes / 1e6:.2f}")
        rows["least, ms"].append(f"{1000 * least_s:.2f}")
        for name in (ONE, OURS):
            rows[f"{name} / least"].append(f"{statistics.median(each[name]) / least_s:.2f}")
    return rows
