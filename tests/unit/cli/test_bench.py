"""`ray-moe bench`: which script it becomes, with which options."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ray_moe
from ray_moe.cli.bench import BENCHMARKS
from ray_moe.cli.commands import commands

ROOT = Path(ray_moe.__file__).parents[1]


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that this process would have become."""
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda file, arguments: seen.append(arguments))
    return seen


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_a_script_that_takes_the_common_options(name: str, became: list[list[str]]) -> None:
    script = ROOT / "benchmarks" / BENCHMARKS[name].file
    text = script.read_text()
    assert "def main(argv: list[str] | None = None) -> None:" in text
    assert "report.options(__doc__" in text
    assert "report.finish(" in text
    result = CliRunner().invoke(commands, ["bench", name, "--quick"])
    assert result.exit_code == 0, result.stderr
    assert became == [[sys.executable, str(script), "--quick"]]


def test_options_of_the_benchmark_are_passed_on(became: list[list[str]]) -> None:
    given = ["--cores", "1", "--rounds", "2", "--json", "out.json", "--gated"]
    assert CliRunner().invoke(commands, ["bench", "layer", *given]).exit_code == 0
    assert CliRunner().invoke(commands, ["bench", "layer", "--", "--help"]).exit_code == 0
    assert CliRunner().invoke(commands, ["bench", "pages", "--check"]).exit_code == 0
    assert [each[2:] for each in became] == [
        ["--cores", "1", "--gated", "--rounds", "2", "--json", "out.json"], ["--help"], ["--check"],
    ]  # fmt: skip
    assert became[2][1] == str(ROOT / "benchmarks" / "report.py")


def test_from_a_wheel_it_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, became: list[list[str]]
) -> None:
    monkeypatch.setattr(ray_moe, "__file__", str(tmp_path / "site-packages/ray_moe/__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands, ["bench", "dispatch"])
    assert (result.exit_code, became) == (2, [])
    assert "clone the repository and run ray-moe bench there" in result.stderr
    monkeypatch.chdir(ROOT)  # a checkout that one stands in is as good
    assert CliRunner().invoke(commands, ["bench", "dispatch"]).exit_code == 0
    assert became[0][1] == str(ROOT / "benchmarks" / "dispatch.py")


def test_a_script_that_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, became: list[list[str]]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "report.py").touch()
    monkeypatch.setattr(ray_moe, "__file__", str(tmp_path / "ray_moe/__init__.py"))
    result = CliRunner().invoke(commands, ["bench", "layer"])
    assert (result.exit_code, became) == (2, [])
    assert "layer.py is not there" in result.stderr
