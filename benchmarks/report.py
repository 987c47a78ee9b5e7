"""Interleaved timing, ratios with their spread, and the JSON and Markdown every benchmark leaves behind."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    packages = ("torch", "ray", "grpcio", "transformers", "numpy")
    return {
        "commit": _commit(),
        "cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


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


def write(name: str, markdown: str, data: Mapping[str, Any]) -> None:
    """`results/<name>.json` with everything, `results/<name>.md` to be read."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    (RESULTS / f"{name}.md").write_text(f"{markdown}\n\nMeasured on: {about}.\n")
