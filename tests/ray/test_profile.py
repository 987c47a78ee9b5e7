"""`benchmarks/profile_step.py`, through its command: a service and a training of its own are taken apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.profile_seams import WAIT
from benchmarks.profile_table import COMPUTED, TO_HOST, WOKEN

ROOT = Path(__file__).parents[2]

PARTS: dict[str, set[str]] = {
    "decode": {COMPUTED, TO_HOST, WOKEN, "gate", "norms", "combine", "scheduler", "detokenising", "logits"},
    "train": {COMPUTED, "backward of the backbone", "optimizer", "snapshot", "data", "orders to hosts: wait (commit)"},
}


@pytest.mark.parametrize("kind", PARTS)
def test_every_moment_of_a_step_is_in_one_part(kind: str, tmp_path: Path) -> None:
    file, graphs = tmp_path / "profile.json", tmp_path / "graphs"
    command = [sys.executable, str(ROOT / "benchmarks" / "profile_step.py"), "--quick", "--only", kind]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    run = subprocess.run(
        [*command, "--json", str(file), "--graphs", str(graphs)],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(file.read_text())[kind]
    wall, cpu = found["main"]["wall_us"], found["main"]["cpu_us"]
    assert sum(wall.values()) == pytest.approx(found["step_us"], rel=0.01)
    assert all(us >= 0 for us in (*wall.values(), *cpu.values()))
    assert PARTS[kind] <= wall.keys()
    assert WAIT not in wall  # it is told what was waited for
    assert found["host"]["wall_us"]["experts: products"] > 0
    assert 0 < found["floor"]["us"] < found["step_us"]
    assert f"µs, the mean of {found['num_steps']}" in run.stdout
    assert set(_frames(graphs / f"profile-{kind}.svg")) >= {"all", "host 0", "host 1"}


def _frames(file: Path) -> list[Any]:
    titles = ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}title")
    return [(title.text or "").partition(":")[0] for title in titles]
