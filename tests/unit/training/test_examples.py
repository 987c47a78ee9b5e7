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


def run(name: str, *options: str) -> str:
    command = [sys.executable, "-W", "error", f"examples/{name}.py", *options]
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=150)
    assert made.returncode == 0, made.stderr
    return made.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_a_vision_transformer_with_experts_learns() -> None:
    said = run("vision_moe", "--steps", "120", "--width", "32", "--layers", "2", "--batch", "32")
    accuracy = numbers(r"step \d+: loss [\d.]+, accuracy ([\d.]+)", said)
    assert accuracy[0] < 0.3
    assert accuracy[-1] > 0.4
    assert said.count("% of the choices by p") == 6
    assert "dropped" in said


def test_a_recommender_of_two_tasks_learns_both() -> None:
    said = run("recommender", "--steps", "101")
    areas = re.findall(r"step (\d+): .* AUC ([\d.]+) clicks, ([\d.]+) likes", said)
    assert len(areas) == 4
    for step, click, like in areas:
        assert (float(click) > 0.56 and float(like) > 0.56) == (step != "0"), said


def test_one_stack_over_vision_and_text_learns() -> None:
    said = run("multimodal", "--steps", "60", "--width", "32")
    accuracy, loss = numbers(r"accuracy ([\d.]+)", said), numbers(r"loss ([\d.]+)", said)
    assert loss[0] > 2.2
    assert loss[-1] < 1.7
    assert accuracy[-1] > 0.2  # of 14 answers
    assert re.search(r"vision \[\d+, \d+, 0, 0, \d+, \d+\], text \[0, 0, \d+, \d+, \d+, \d+\]", said)


def test_evomoe_runs_beside_a_plain_moe_in_the_same_budget(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("all work and no play makes jack a dull boy. " * 200)
    sizes = ["--width", "32", "--layers", "1", "--experts", "4", "--window", "32", "--batch", "4", "--steps", "60"]
    sizes += ["--diversify", "45", "--anneal", "10"]
    said = run("evomoe", "--data", str(tmp_path / "text.txt"), *sizes)
    unseen = numbers(r"([\d.]+) nats per byte on files", said)
    assert len(unseen) == 2 and max(unseen) < 3.5
    rows = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) rows", said)]
    assert 0 <= rows[1] - rows[0] < 4 * 32  # within one step of the plain one
    assert max(numbers(r"([\d.]+) experts a token", said)) > 1.3


def test_a_dense_model_becomes_a_mixture_and_learns_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("all work and no play makes jack a dull boy. " * 200)
    sizes = ["--width", "32", "--layers", "1", "--experts", "4", "--window", "32", "--batch", "4"]
    said = run("upcycle", "--data", str(tmp_path / "text.txt"), "--steps", "30", "--more", "30", *sizes)
    assert numbers(r"logits differ by ([\d.e-]+)", said)[0] < 1e-5
    before, dense, moe = numbers(r"([\d.]+) nats per byte", said)
    assert max(dense, moe) < before - 0.2


def test_a_gate_of_ones_own_learns_in_a_layer_and_routes_in_a_model() -> None:
    said = run("custom_gate")
    (errors,) = re.findall(r"mean squared error ([\d.]+) with topk, ([\d.]+) with cosine", said)
    assert all(0 < float(error) < 0.2 for error in errors)
    assert "model.layers.0.mlp.gate, model.layers.1.mlp.gate" in said
    assert re.search(r"experts of the last token: \[\[\d, \d\], \[\d, \d\]\]", said)
