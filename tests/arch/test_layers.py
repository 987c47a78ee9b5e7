"""Imports point down only: import-linter holds it, and this holds that import-linter would notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the check on the package in `root`, not on the installed one."""
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and its contracts, to break."""
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(REPOSITORY / "ray_moe", tmp_path / "ray_moe", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_imports_point_down_only() -> None:
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("path", "source", "broken"),
    [
        ("types.py", "import ray_moe.ops.dispatch", "Imports point down only BROKEN"),
        ("runtime/planted.py", "import ray_moe.config", "Imports point down only BROKEN"),
        ("models/planted.py", "import ray_moe.transport.base", "Imports point down only BROKEN"),
        ("client/planted.py", "import torch", "The client needs neither Ray nor torch BROKEN"),
        ("policy/planted.py", "import time", "Decisions are values BROKEN"),
        ("unplaced.py", "", "unplaced"),
    ],
)
def test_the_check_finds_a_planted_violation(copy: Path, path: str, source: str, broken: str) -> None:
    with (copy / "ray_moe" / path).open("a") as file:
        file.write(f"\n{source}\n")
    result = lint_imports(copy)
    assert result.returncode != 0
    assert broken in " ".join(result.stdout.split()) + result.stderr
