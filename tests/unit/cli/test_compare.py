"""`ray-moe compare-dense`: a table of what was measured."""

from __future__ import annotations

from typer.testing import CliRunner

from ray_moe.cli.commands import commands

TINY = "--hidden-size 32 --num-layers 1 --dense-width 512 --batch 2 --window 16 --steps 1 --new-tokens 2".split()


def test_both_models_and_their_ratio_are_shown() -> None:
    result = CliRunner().invoke(commands, ["compare-dense", *TINY])
    assert result.exit_code == 0, result.stderr
    rows = {line.strip().split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert 0.45 < float(rows["moe / dense"][4]) < 0.65
    assert 4 < float(rows["moe / dense"][3]) < 4.6
    assert "loss after the same time: dense " in result.stdout
    assert "training: " in result.stderr


def test_sizes_that_cannot_be_are_one_line() -> None:
    result = CliRunner().invoke(commands, ["compare-dense", *TINY, "--active", "0.01"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: active is 0.01, but " in result.stderr
