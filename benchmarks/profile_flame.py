"""Flame graphs: samples of stacks as one SVG that needs nothing else, and is legible in light and dark.

Icicles (the root is on top), a frame as wide as the share of the samples that it is part of. A frame's full name, with
its file and share, is its tooltip. Called by `profile_step.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

WIDTH, ROW, LETTER = 1400, 17, 6.7
MIN_WIDTH = 1.2
"""Of a frame that is drawn, in pixels."""
MIN_TEXT = 26
TOP = 46

SKIPPED = re.compile(
    r"_call_impl|_wrapped_call_impl|^marked |^followed |_bootstrap|^Thread\.run \(threading|^wrapper |wrapped_fn|"
    r"forward_with_checkpointing|^decorate_context|^__enter__ \(contextlib|^__exit__ \(contextlib|<listcomp>|<module>"
)
"""Frames that say nothing: wrappers of torch and transformers around each module, our marks, how threads begin."""

KINDS = {
    "ray_moe": "#e8833a",
    "torch": "#5b9bd5",
    "transformers": "#66b38a",
    "ray": "#b07cc6",
    "other": "#a9a9a9",
}

Stack = tuple[str, ...]


def read_raw(text: str, process: str) -> dict[Stack, int]:
    """Lines of `py-spy record --format raw`: frames with semicolons between, and a count; under `process`."""
    found: dict[Stack, int] = {}
    for line in text.splitlines():
        frames, _, count = line.rpartition(" ")
        if not count.isdigit() or "Recorder.watch " in frames:  # the profile's own thread
            continue
        thread, *rest = frames.split(";")
        names = (process, _thread(thread), *(frame for frame in map(_tidy, rest) if not SKIPPED.search(frame)))
        found[names] = found.get(names, 0) + int(count)
    return found


def _thread(name: str) -> str:
    """`thread (26216): generation` -> `thread generation`; those of one pool together."""
    title = re.sub(r"^thread \(\d+\)(?:: )?", "", name)
    return f"thread {re.sub('[-_]?[0-9]+$', '', title)}" if title else "main thread"


def _tidy(frame: str) -> str:
    """Without the line, so that one function is one frame."""
    return re.sub(r":\d+\)$", ")", re.sub(r"^\w[\w.<>]*\.<locals>\.", "", frame))


# --- the tree ---------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Frame:
    name: str
    value: int = 0
    children: dict[str, Frame] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return 1 + max((child.depth for child in self.children.values()), default=0)


def tree(stacks: Iterable[Mapping[Stack, int]]) -> Frame:
    """All stacks under one root."""
    root = Frame("all")
    for each in stacks:
        for stack, value in each.items():
            at = root
            at.value += value
            for name in stack:
                at = at.children.setdefault(name, Frame(name))
                at.value += value
    return root


# --- the picture ------------------------------------------------------------------------------------------------
def draw(root: Frame, title: str, unit: str = "samples") -> str:
    """The SVG. Args: unit: of the values."""
    rows = list(_frames(root, 0.0, 0, WIDTH / max(1, root.value), root.value, unit))
    height = TOP + ROW * (1 + max((level for level, _ in rows), default=0)) + 8
    legend, x = [], WIDTH - 8.0
    for kind, colour in reversed(KINDS.items()):
        x -= 26 + LETTER * len(kind)
        legend.append(f'<rect x="{x:.0f}" y="12" width="12" height="12" fill="{colour}"/>{_text(x + 16, 22, kind)}')
    style = (
        "svg{background:#fff}text{font:11px ui-monospace,Menlo,Consolas,monospace;fill:#111;pointer-events:none}"
        "g:hover>rect{stroke:#000;stroke-width:1.5}h1{font-weight:600}rect{stroke:#fff;stroke-width:.6}"
        "@media (prefers-color-scheme:dark){svg{background:#1b1b1b}rect{stroke:#1b1b1b}.out{fill:#ddd}}"
    )
    head = f'<text class="out" x="8" y="22" style="font-size:14px;font-weight:600">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}"><style>{style}</style>{head}{"".join(legend)}'
        f"{''.join(part for _, part in rows)}</svg>\n"
    )


def _frames(frame: Frame, x: float, level: int, scale: float, total: int, unit: str) -> Iterator[tuple[int, str]]:
    width = frame.value * scale
    if width < MIN_WIDTH:
        return
    told = f"{frame.name}: {frame.value / max(1, total):.1%} ({frame.value:,} {unit})"
    y = TOP + level * ROW
    text = ""
    if width >= MIN_TEXT:
        letters = int((width - 6) / LETTER)
        short = frame.name.partition(" (")[0] if frame.name.endswith(")") else frame.name
        shown = short if len(short) <= letters else f"{short[: max(1, letters - 1)]}…"
        text = _text(x + 3, y + 12, shown, "")
    yield (
        level,
        f'<g><title>{escape(told)}</title><rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}" '
        f'fill="{_colour(frame.name)}"/>{text}</g>',
    )
    for child in sorted(frame.children.values(), key=lambda each: -each.value):
        yield from _frames(child, x, level + 1, scale, total, unit)
        x += child.value * scale


def _text(x: float, y: float, text: str, kind: str = ' class="out"') -> str:
    return f'<text{kind} x="{x:.1f}" y="{y}">{escape(text)}</text>'


def _colour(name: str) -> str:
    """By the package that the frame's file is in."""
    file = name.rpartition(" (")[2] if name.endswith(")") else ""
    package = file.partition("/")[0]
    return KINDS.get(package, KINDS["other"])
