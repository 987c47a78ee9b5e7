"""The page of `benchmarks/layer.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import report
from benchmarks.pages.floors import layer_floor, with_goals

ONE, OURS, CACHED = "one process", "ray_moe", "ray_moe, all experts cached by the router"
SERVE, ACTORS = "Ray Serve", "Ray actors"
GROUPED, HIVEMIND = "hivemind, grouped calls", "hivemind, its MoE layer"
TITLES = {"forward": "Forward", "train": "Forward and backward"}

GOALS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("forward", ONE): {"4096": "≥ 0.95"},
    ("train", ONE): {"4096": "≥ 0.92"},
    ("forward", SERVE): {"1": "≥ 10", "64": "≥ 3"},
    ("forward", HIVEMIND): {"1": "≥ 4", "64": "≥ 4", "256": "≥ 10"},
    ("train", HIVEMIND): {"1": "≥ 4", "64": "≥ 4", "256": "≥ 10"},
    ("forward", GROUPED): {"64": "≥ 1.5", "1024": "≥ 1.5"},
    ("train", GROUPED): {"64": "≥ 1.5", "1024": "≥ 1.5"},
}
"""How many times as fast as each of the others we want to be, by tokens."""
CACHED_GOAL = {"4096": "≥ 0.99"}
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
        "Before the rounds all gave the same outputs and the same gradients of the tokens. Who waits for his turn "
        "sleeps, but for what Ray and hivemind do by themselves: all that wait took "
        f"{report.spread(data['others_cores'])} cores of the others' turns."
    )
    if HIVEMIND not in data["contestants"]:
        parts.append("hivemind was left out: it is not installed here, and there was no `--hivemind-python`.")
    return "\n\n".join(parts)


def section(what: str, seconds: Seconds, data: report.Data) -> list[str]:
    columns = [f"{tokens} tokens" if tokens != "1" else "1 token" for tokens in seconds]
    names = [name for name in data["contestants"] if any(name in each for each in seconds.values())]
    speeds = {name: [speed(each, name, ONE) for each in seconds.values()] for name in names}
    ours: dict[str, list[str]] = {}
    for name in names:
        if name not in (OURS, CACHED):
            cells = {tokens: speed(each, OURS, name) for tokens, each in seconds.items()}
            ours[f"{OURS} / {name}"] = with_goals(cells, GOALS.get((what, name), {}))
    if CACHED in names:
        cells = {tokens: speed(each, CACHED, ONE) for tokens, each in seconds.items()}
        ours[f"{CACHED} / {ONE}"] = with_goals(cells, CACHED_GOAL)
    return [
        f"## {TITLES[what]}",
        f"Speed as a multiple of {ONE}:",
        report.table(columns, speeds),
        "How many times as fast ours is, and what it should be:",
        report.table(columns, ours),
        layer_floor(data, seconds, (ONE, OURS), train=what == "train"),
    ]


def speed(seconds: Mapping[str, Sequence[float]], name: str, beside: str) -> str:
    return report.cell(seconds[beside], seconds[name]) if name in seconds and beside in seconds else ""
