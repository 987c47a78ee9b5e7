"""A benchmark's results as sections. Each benchmark has a tree of its own, so its shape decides:

- numbers, or lists of numbers (repetitions), under names: bars, with the range of the repetitions;
- records of numbers under names: bars for each number, name beside name;
- pairs: a line; and so is a long list under a name that says it is a course (`COURSES`);
- whatever else: sections of its own, under the names that lead to it.

Called by `reading.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_moe.report.parts import Bar, Bars, Lines, Run, Section, Table, of_bars, of_lines

COURSES = ("losses",)
"""Lists under these names are in the order of steps."""
BEST = 12
"""Values of a list that are shown where it is text."""


def benchmark(results: Mapping[str, Any], name: str, source: str) -> Run:
    """Of `benchmarks/results/NAME.json`."""
    facts = [(key, str(value)) for key, value in results.get("machine", {}).items()]
    tree = {key: value for key, value in results.items() if key != "machine"}
    return Run(name.replace("_", " "), source, facts, list(_sections(tree, ())))


def _sections(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Section]:
    """Of everything in `tree`, to which the names of `path` lead."""
    title = ", ".join(path) or "Numbers"
    tree = {key: value for key, value in tree.items() if value not in ([], {}, None)}
    courses = {key: value for key, value in tree.items() if _is_course(key, value)}
    lines = {key: value for key, value in tree.items() if _is_pairs(value)}
    measures = {key: _numbers(value) for key, value in tree.items() if key not in courses and _numbers(value)}
    words = ", ".join(f"{key}: {value}" for key, value in tree.items() if isinstance(value, str | bool))
    if measures:
        section = of_bars(title, Bars([Bar.of(key, values) for key, values in measures.items()]), words)
        yield section if path else replace(section, figure=None)  # at the top are the settings, each of its own kind
    elif words:
        yield Section(title, words)
    if lines:
        series = {key: [(float(x), float(y)) for x, y in value] for key, value in lines.items()}
        yield of_lines(title, Lines(series, "first of the pair", (0, None)))
    for key, value in courses.items():
        yield of_lines(", ".join([*path, key]), Lines({key: [(i + 1, float(y)) for i, y in enumerate(value)]}, "step"))
    inner = {
        key: value
        for key, value in tree.items()
        if not _numbers(value) and key not in lines and not isinstance(value, str | bool)
    }
    records = {key: _records(value) for key, value in inner.items()}
    if len(inner) > 1 and all(records.values()):
        yield from _by_number(records, path)
        return
    for key, value in inner.items():
        if isinstance(value, Mapping):
            yield from _sections(value, (*path, key))
        elif all(isinstance(each, Mapping) for each in value):
            for i, each in enumerate(value):
                yield from _sections(each, (*path, f"{key} {i + 1}"))
        else:
            shown = [[str(i + 1), str(each)] for i, each in enumerate(value[:BEST])]
            yield Section(", ".join([*path, key]), f"{len(value)} values", table=Table(["", "value"], shown))


def _by_number(records: Mapping[str, Sequence[Mapping[str, float]]], path: tuple[str, ...]) -> Iterator[Section]:
    """Bars for each number of the records, one for each name."""
    for what in dict.fromkeys(key for each in records.values() for record in each for key in record):
        values = {name: [record[what] for record in each if what in record] for name, each in records.items()}
        bars = [Bar.of(name, found) for name, found in values.items() if found]
        yield of_bars(", ".join([*path, what.replace("_", " ")]), Bars(bars))


# --- shapes --------------------------------------------------------------------------------------------------
def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> list[float]:
    """Repetitions of one measure; empty for what is none."""
    if _is_number(value):
        return [float(value)]
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return [float(each) for each in value]
    return []


def _is_pairs(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 2
        and all(isinstance(each, list) and len(each) == 2 and all(map(_is_number, each)) for each in value)
    )


def _is_course(name: str, value: Any) -> bool:
    return name in COURSES and len(_numbers(value)) > 2


def _records(value: Any) -> list[Mapping[str, float]]:
    """Several of one kind, or the one; empty for what is none."""
    found = value if isinstance(value, list) else [value]
    are = all(isinstance(each, Mapping) and each and all(map(_is_number, each.values())) for each in found)
    return list(found) if are else []
