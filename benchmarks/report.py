"""What every benchmark has in common: its options, interleaved timing, ratios with their spread, and what it leaves.

A benchmark measures and hands the numbers to `finish`, which writes them as JSON. What is read, `results/*.md`, is made
of that JSON alone by `pages/NAME.py`: nobody can type a figure. `python benchmarks/report.py [--check]` makes all pages
anew, or says which are not what their JSON gives; so do `ray-moe bench pages` and a test. Needs neither Ray nor torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
PAGE_OF = {"train_step_gated": "train_step", "layer_gated": "layer"}
"""Results that have the page of others."""

Data = Mapping[str, Any]
"""What is in a file of results."""


def options(doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks understand. Args: rounds: by default; None for those that have no rounds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs; no results written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to time: `run` once is one measurement; `prepare` is called before each block of them."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def interleave(contestants: Sequence[Contestant], rounds: int, block_s: float = 0.25) -> dict[str, list[float]]:
    """Median seconds of each contestant in each round; in every round all take their turn, in rotating order."""
    medians: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds + 1):
        shift = number % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            contestant.prepare()
            samples: list[float] = []
            until = time.perf_counter() + block_s
            while time.perf_counter() < until or len(samples) < 3:
                begin = time.perf_counter()
                contestant.run()
                samples.append(time.perf_counter() - begin)
            if number:  # the first round only warms up
                medians[contestant.name].append(statistics.median(samples))
    return medians


def ratios(of: Sequence[float], to: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of ``of / to``, round by round."""
    each = [a / b for a, b in zip(of, to, strict=True)]
    return statistics.median(each), min(each), max(each)


def cell(of: Sequence[float], to: Sequence[float]) -> str:
    median, least, most = ratios(of, to)
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Median, least and greatest, with so many digits, or as many as there is need for."""
    middle = statistics.median(values)
    if digits is None:
        digits = 2 if middle < 10 else 1 if middle < 100 else 0
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    packages = ("torch", "ray", "grpcio", "transformers", "numpy")
    return {
        "commit": _commit(),
        "cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def finish(name: str, measured: Data, given: argparse.Namespace) -> None:
    """Print the page of what was measured. `results/NAME.{json,md}` are written unless the run was a quick one.

    Args: given: what `options` has parsed.
    """
    data = json.loads(json.dumps({"machine": machine(), **measured}))  # as the page will find it
    text = page(name, data)
    print(text)
    if given.json is not None:
        _write_json(given.json, data)
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        _write_json(RESULTS / f"{name}.json", data)
        (RESULTS / f"{name}.md").write_text(text)


def page(name: str, data: Data) -> str:
    """The Markdown of `results/NAME.json`, made of nothing else."""
    text: str = import_module(f"benchmarks.pages.{PAGE_OF.get(name, name)}").page(data)
    about = ", ".join(f"{key} {value}" for key, value in data["machine"].items())
    return f"{text}\n\nMeasured on: {about}.\n"


def _write_json(file: Path, data: Data) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n")


def stale_pages() -> dict[Path, str]:
    """Pages that are not what their JSON gives, or are not there, and what they should be."""
    made = {file.with_suffix(".md"): page(file.stem, json.loads(file.read_text())) for file in RESULTS.glob("*.json")}
    return {file: text for file, text in made.items() if not file.exists() or file.read_text() != text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not as it should be")
    check = parser.parse_args().check
    stale = stale_pages()
    for file, text in stale.items():
        print(f"{file.name} {'is not what its JSON gives' if check else 'made anew'}")
        if not check:
            file.write_text(text)
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
