"""The examples that need a service: each runs as its docstring says, ends by itself, and prints what it claims.

Those without Ray are in tests/unit/training/test_examples.py.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.support import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 280
"""Each takes less than a minute on two cores of its own; here other tests have them, too."""


def run_here(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What an example prints on the Ray that this process has: a service joins the one that it finds."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def run_alone(name: str, *arguments: str) -> str:
    """What an example prints that brings a Ray of its own, in a process of its own."""
    command = [sys.executable, f"examples/{name}.py", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = run_here("quick_start", monkeypatch, capsys, "--seconds", "2")
    assert "now in" in said
    assert "96 tokens; the service is ready" in said
    assert len(re.findall(r"expert-\d, process \d+: \d+ experts, [1-9]\d* rows", said)) == 2
    assert said.endswith("everything that was started has ended\n")


def test_serve_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_here("serve_checkpoint", monkeypatch, capsys)
    assert "['mixture']" in said
    assert said.endswith("3 of 3 greedy texts are those of transformers\n")


def test_train_and_publish(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_here("train_and_publish", monkeypatch, capsys)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < losses[0] - 1
    assert "published as version 1" in said and "back to version 0" in said
    (before,), (after,) = (re.findall(rf"served by version {number}: (.*)", said) for number in (0, 1))
    assert before != after
    (answers,) = re.findall(r"answers meanwhile, by version: {(.*)}", said)
    assert re.fullmatch(r"0: \d+(, 1: \d+)?", answers)  # and no error


def test_train_stdlib_lm(tmp_path: Path) -> None:
    said = run_alone("train_stdlib_lm", "--steps", "12", "--out", str(tmp_path / "model"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", said)]
    assert losses[-1] < losses[0] - 0.5
    assert f"the model is in {tmp_path / 'model'}" in said
    assert (tmp_path / "model" / "config.json").exists()


def test_layer_from_numpy() -> None:
    said = run_alone("layer_from_numpy")
    assert "(64, 128) through 2 of 8 experts" in said
    (apart,) = re.findall(r"one after the other: (\S+) apart", said)
    assert float(apart) < 1e-5
    assert said.endswith("torch is loaded: False; Ray is loaded: False\n")


def test_custom_gate_on_actors() -> None:
    said = run_alone("custom_gate", "--train")
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", said)]
    assert losses[-1] < losses[0] - 0.5


def test_elastic_killed_node() -> None:
    said = run_alone("elastic_killed_node")
    assert re.search(r"node \w+ is killed", said)
    assert "0 of 8 requests failed\nthe same tokens: True" in said
    assert re.search(r"longest pause with the kill: \d+ ms", said)
    assert re.search(r" lost: .*expert-", said)


def test_ray_cluster() -> None:
    said = run_alone("ray_cluster")
    assert "is ready: 2 expert actors on 1 node(s) of 127.0.0.1" in said
    assert "24 tokens" in said
    assert said.endswith("the service is taken down\nand so is the cluster\n")


def test_kuberay() -> None:
    said = run_alone("kuberay", "--port", str(free_port()))
    assert "RayService ray-moe runs ray_moe.service.app:build" in said
    assert re.search(r"model answers '.+'", said)
    assert "without a key: 401\n" in said  # Ray may say something about its own actors after it
