"""`ray-moe report`: runs as one HTML page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import ray_moe
from ray_moe.cli.output import write_text
from ray_moe.report.page import page
from ray_moe.report.reading import read


def run(files: Sequence[Path], output: Path) -> None:
    """Write it. Raises: `InvalidConfig`."""
    runs = read(files)
    made = f"made {time.strftime('%Y-%m-%d %H:%M')} by ray_moe {ray_moe.__version__}"
    write_text(output, page(runs, made))
    figures = sum(section.figure is not None for each in runs for section in each.sections)
    Console().print(f"{output}: {len(runs)} runs, {figures} figures", soft_wrap=True, highlight=False, markup=False)
