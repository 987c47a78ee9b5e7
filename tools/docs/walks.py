"""Draws the three walks of docs/explanation/architecture.md: who tells whom what, from top to bottom.

`python tools/docs/walks.py` writes the SVG files, which are committed; tests/unit/docs/test_site.py compares. They need
nothing from elsewhere, and are light or dark as the reader's system is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "explanation"
WIDTH, MARGIN, TOP, ROW, BOX = 960, 88, 64, 46, 38
"""Of the drawing; from its edges to the first and last line; to the first step; of a step; of a name, in pixels."""

STYLE = """
svg { font-family: system-ui, sans-serif; font-size: 13px }
.box { fill: #e8eaf6; stroke: #5c6bc0 } .life { stroke: #b0b4c8; stroke-dasharray: 3 4 }
.name { font-weight: 600; text-anchor: middle } text { fill: #1b1d2a } .small { font-size: 11px; fill: #565a70 }
.arrow { stroke: #3949ab; stroke-width: 1.6; fill: none } .back { stroke-dasharray: 6 4 }
.head { fill: #3949ab } .note { fill: #fff8e1; stroke: #c9a227 } .said { text-anchor: middle }
.behind { stroke: #ffffff; stroke-width: 4px; paint-order: stroke; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
  .box { fill: #2b3152; stroke: #8c9eff } .life { stroke: #5c6280 } text { fill: #e6e8f4 } .small { fill: #a9aec8 }
  .arrow { stroke: #9fa8ff } .head { fill: #9fa8ff } .note { fill: #3b3520; stroke: #b59a3a }
  .behind { stroke: #1e2129 }
}
"""


@dataclass(frozen=True, slots=True)
class Says:
    """`of` tells `to` something; `back` where it is an answer."""

    of: int
    to: int
    text: str
    back: bool = False


@dataclass(frozen=True, slots=True)
class Does:
    """What happens at `first`, or at all from `first` to `last`."""

    first: int
    text: str
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Walk:
    title: str
    who: Sequence[tuple[str, str]]
    """Name, and where it is."""
    steps: Sequence[Says | Does]


REQUEST = Walk(
    "A request",
    (
        ("client", "SDK, OpenAI, KServe"),
        ("front door", "router actor"),
        ("engine", "router actor"),
        ("dispatcher", "router actor"),
        ("expert hosts", "expert actors"),
    ),
    (
        Says(0, 1, "a prompt"),
        Does(1, "who asks, may they, is it sound"),
        Says(1, 2, "GenerateRequest"),
        Does(2, "one step: tokens of all sequences that are due"),
        Says(2, 3, "layer, hidden, index, weight"),
        Does(3, "split over replicas, group by host"),
        Says(3, 4, "each token once per host"),
        Does(4, "grouped products"),
        Says(4, 3, "rows", back=True),
        Does(3, "combine as transformers does"),
        Says(3, 2, "[T, D], next layer", back=True),
        Does(2, "sample a token for each sequence"),
        Says(2, 1, "a piece of text", back=True),
        Says(1, 0, "the stream goes on", back=True),
    ),
)
LOAD = Walk(
    "Load moves the cluster",
    (
        ("routers", "router actors"),
        ("controller", "a shell"),
        ("ClusterState", "policy, values only"),
        ("launcher", "owns every process"),
        ("expert hosts", "expert actors"),
    ),
    (
        Says(0, 1, "token counts, each second"),
        Says(1, 2, "event, and the time"),
        Does(2, "load, scaling, plan: is it worth its moves?"),
        Says(2, 1, "instructions", back=True),
        Says(1, 3, "start an actor, if more are wanted"),
        Says(3, 4, "a process begins"),
        Says(1, 4, "load this replica"),
        Says(4, 1, "it is loaded and warm", back=True),
        Says(1, 0, "routing table, epoch + 1"),
        Does(0, "the next batch uses it"),
        Does(1, "no router names the old replica any more; drain_s"),
        Says(1, 4, "drop the old replica"),
    ),
)
STEP = Walk(
    "A training step",
    (
        ("workers", "backbone, micro-batches"),
        ("dispatcher", "in each worker"),
        ("expert hosts", "each expert has an owner"),
        ("coordinator", "steps as transactions"),
    ),
    (
        Says(3, 0, "attempt at step n"),
        Says(0, 1, "forward: hidden, index, weight"),
        Says(1, 2, "rows to owners and replicas"),
        Says(2, 1, "rows", back=True),
        Says(1, 0, "[T, D], then the loss", back=True),
        Says(0, 1, "backward: gradient of [T, D]"),
        Says(1, 2, "gradients, each call counts once"),
        Does(2, "accumulate; no weight changes"),
        Says(0, 3, "all micro-batches are in"),
        Says(3, 2, "commit: sum, norm, step"),
        Does(2, "new weights to replicas, state to another host"),
        Says(2, 3, "done", back=True),
        Does(0, "whatever fails: all go back to the last snapshot, and the step is made again", last=3),
    ),
)
WALKS = {"request.svg": REQUEST, "load.svg": LOAD, "step.svg": STEP}


def draw(walk: Walk) -> str:
    """The walk as SVG."""
    gap = (WIDTH - 2 * MARGIN) / (len(walk.who) - 1)
    places = [MARGIN + number * gap for number in range(len(walk.who))]
    height = TOP + ROW * len(walk.steps) + 20
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">']
    parts += [f"<title>{escape(walk.title)}</title>", f"<style>{STYLE}</style>"]
    for x in places:
        parts.append(f'<line class="life" x1="{x:g}" y1="{BOX + 4}" x2="{x:g}" y2="{height - 6}"/>')
    for x, (name, where) in zip(places, walk.who, strict=True):
        parts.append(f'<rect class="box" x="{x - 84:g}" y="2" width="168" height="{BOX}" rx="6"/>')
        parts.append(f'<text class="name" x="{x:g}" y="18">{escape(name)}</text>')
        parts.append(f'<text class="small said" x="{x:g}" y="33">{escape(where)}</text>')
    for number, step in enumerate(walk.steps):
        y = TOP + ROW * number
        parts += _says(step, number, places, y) if isinstance(step, Says) else _does(step, number, places, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _says(step: Says, number: int, places: Sequence[float], y: float) -> list[str]:
    start, end = places[step.of], places[step.to]
    side = 1 if end > start else -1
    kind = "arrow back" if step.back else "arrow"
    return [
        f'<line class="{kind}" x1="{start:g}" y1="{y + 24}" x2="{end - 9 * side:g}" y2="{y + 24}"/>',
        f'<path class="head" d="M{end:g} {y + 24} l{-10 * side} -5 v10 z"/>',
        f'<text class="said behind" x="{(start + end) / 2:g}" y="{y + 17}">{_numbered(number, step.text)}</text>',
    ]


def _does(step: Does, number: int, places: Sequence[float], y: float) -> list[str]:
    text = _numbered(number, step.text)
    width: float = 7 * len(f"{number + 1}. {step.text}") + 16
    middle = (places[step.first] + places[step.first if step.last is None else step.last]) / 2
    if step.last is not None:
        width = places[step.last] - places[step.first] + 100
    left = min(max(middle - width / 2, 4), WIDTH - width - 4)
    return [
        f'<rect class="note" x="{left:g}" y="{y + 6}" width="{width:g}" height="26" rx="4"/>',
        f'<text class="said" x="{left + width / 2:g}" y="{y + 23}">{text}</text>',
    ]


def _numbered(number: int, text: str) -> str:
    return f"{number + 1}. {escape(text)}"


def write(folder: Path) -> None:
    for name, walk in WALKS.items():
        (folder / name).write_text(draw(walk), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to write them")
    write(parser.parse_args().out)
