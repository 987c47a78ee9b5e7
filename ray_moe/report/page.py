"""A report as one HTML page: styles, figures and tables inside, no script, nothing from elsewhere. Called by
`cli/report.py`. A content security policy in the page says so, too; all text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from ray_moe.report.figures import NUM_COLOURS, draw
from ray_moe.report.parts import Lines, Run, Section, Table

LIGHT = ("#0b62a4", "#c2410c", "#1a7f4b", "#8e3a9d", "#8a6d00", "#4b5563")
DARK = ("#6cb6ff", "#ff9e64", "#5fd39a", "#d49bea", "#e2c044", "#a9b1bd")
"""Of the series: told apart by people who see few colours, and far enough from the background."""

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2024; --dim: #5b6470; --line: #d8dde3; --soft: #f5f7f9; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14171a; --fg: #e6e9ec; --dim: #9aa4af; --line: #343b43; --soft: #1c2126; DARK }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: var(--bg); color: var(--fg);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 20px; margin: 40px 0 4px } h3 { font-size: 16px; margin: 0 }
p { margin: 4px 0; color: var(--dim) } nav a { margin-right: 16px; color: var(--c0) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0 }
dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
section { border-top: 1px solid var(--line); padding: 16px 0 }
.both { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 24px; align-items: start;
        margin-top: 8px }
@media (max-width: 800px) { .both { grid-template-columns: minmax(0, 1fr) } }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--dim); font-weight: 600 } th:first-child, td:first-child { text-align: left }
td:first-child { white-space: normal; min-width: 8em } td.text { text-align: left; white-space: normal }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--dim); font: 11px system-ui, sans-serif }
.grid { stroke: var(--line) } .mark line { stroke: var(--dim); stroke-width: 1.5; stroke-dasharray: 3 3 }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
circle { fill-opacity: 0 } circle:hover { fill-opacity: 1 }
.bar { fill: var(--c0); fill-opacity: .75 } .range { stroke: var(--fg); stroke-width: 1.5 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--dim) }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle }
@media print { body { max-width: none } section { break-inside: avoid } }
"""


def page(runs: Sequence[Run], made: str) -> str:
    """The whole page.

    Args: made: when and with what, in words.
    """
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} runs"
    body = "".join(_run(number, run, len(runs) > 1) for number, run in enumerate(runs))
    links = "".join(f'<a href="#run-{i}">{escape(run.title)}</a>' for i, run in enumerate(runs))
    contents = f"<nav>{links}</nav>" if len(runs) > 1 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} – ray_moe</title><style>{_style()}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p>{escape(made)}</p>{contents}</header>\n<main>{body}</main></body></html>\n"
    )


def _style() -> str:
    style = STYLE
    for name, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        style = style.replace(name, " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours)))
    for i in range(NUM_COLOURS):
        style += f".c{i} {{ stroke: var(--c{i}) }} .p{i} {{ fill: var(--c{i}) }} .b{i} {{ background: var(--c{i}) }}\n"
    return style


def _run(index: int, run: Run, is_one_of_many: bool) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in run.facts)
    title = f"<h2>{escape(run.title)}</h2>" if is_one_of_many else ""
    return (
        f'<article id="run-{index}">{title}<p>{escape(run.source)}</p>'
        f"{f'<dl>{facts}</dl>' if facts else ''}{''.join(map(_section, run.sections))}</article>\n"
    )


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    table = "" if section.table is None else _table(section.table)
    inside = table
    if section.figure is not None:
        figure = "".join(_legend(section)) + draw(section.figure, section.title)
        inside = f'<div class="both"><div>{figure}</div>{table}</div>'
    return f"<section><h3>{escape(section.title)}</h3>{text}{inside}</section>\n"


def _legend(section: Section) -> Iterator[str]:
    if isinstance(section.figure, Lines) and len(section.figure.series) > 1:
        names = enumerate(section.figure.series)
        marks = "".join(f'<span><i class="b{i % NUM_COLOURS}"></i>{escape(name)}</span>' for i, name in names)
        yield f'<div class="legend">{marks}</div>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    is_number = text[:1].isdigit() or text[:1] in ("-", "–", "")
    return f"<td>{escape(text)}</td>" if is_number else f'<td class="text">{escape(text)}</td>'
