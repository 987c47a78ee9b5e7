"""The examples that need no service run, and learn."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_language_model_of_ones_own_learns(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("all work and no play makes jack a dull boy. " * 200)
    sizes = ["--width", "32", "--layers", "1", "--experts", "4", "--window", "32", "--batch", "4", "--steps", "40"]
    command = [sys.executable, "-W", "error", "examples/moe_layer_lm.py", "--data", str(tmp_path / "text.txt"), *sizes]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=150)
    assert run.returncode == 0, run.stderr
    unseen = [float(number) for number in re.findall(r"([\d.]+) on files", run.stdout)]
    assert unseen[0] > 5
    assert unseen[-1] < 3.5
    assert "\ndef " in run.stdout
