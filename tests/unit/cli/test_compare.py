"""`ray-moe compare-dense`: a table of what was measured."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ray_moe.cli.commands import commands

TINY = "--hidden-size 32 --num-layers 1 --dense-width 512 --batch 2 --window 16 --answers 1 --prompt 8 --new-tokens 2"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_all_models_and_their_ratios_are_shown() -> None:
    result = CliRunner().invoke(commands, ["compare-dense", *TINY.split(), "--steps", "1"])
    assert result.exit_code == 0, result.stderr
    rows = {line.strip().split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert 0.45 < float(rows["moe / dense"][4]) < 0.65
    assert 4 < float(rows["moe / dense"][3]) < 4.6
    assert float(rows["small / dense"][3]) == float(rows["small / dense"][4])
    for row in ("small / dense", "moe / dense"):
        ratios = rows[row][5:]
        assert len(ratios) == 8  # four ratios, each with its spread
        assert all(float(ratio) > 0 for ratio in ratios[::2])
    assert "loss" not in result.stdout
    assert "training: " in result.stderr
    assert "asking: " in result.stderr


def test_losses_are_told_after_enough_steps() -> None:
    result = CliRunner().invoke(commands, ["compare-dense", *TINY.split(), "--steps", "100", "--answers", "0"])
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("loss after the same time: "))
    losses = [float(word) for word in line.replace(",", "").split() if word[0].isdigit()]
    assert len(losses) == 3
    assert all(2 < loss < 5 for loss in losses)  # it began at 5.5
    rows = {line.strip().split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert rows["moe / dense"][-2:] == ["-", "-"]


def test_sizes_that_cannot_be_are_one_line() -> None:
    result = CliRunner().invoke(commands, ["compare-dense", *TINY.split(), "--active", "0.01"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: active is 0.01, but " in result.stderr
