"""`ray-moe report`, and the files that it reads as the other commands write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ray_moe.cli import cluster
from ray_moe.cli import train as train_command
from ray_moe.cli.commands import commands
from ray_moe.errors import StepRefused
from ray_moe.training.loop import Progress
from ray_moe.types import ChaosReport
from tests.unit.cli.fakes import client_that

run = CliRunner().invoke

ROOT = Path(__file__).parents[3]
FAULT = ChaosReport("kill", ("expert-<1>",), 0.042, 1, 2.5, 0.9, 0.95, 3, 0, 8)


class Page(HTMLParser):
    """Its tags, and the text of its headings, facts and cells."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def report(tmp_path: Path, *files: Path) -> Page:
    out = tmp_path / "out.html"
    result = run(commands, ["report", *map(str, files), "-o", str(out)])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{out}: ")
    return Page(out.read_text(encoding="utf-8"))


def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: list[Progress], *options: str) -> Any:
    def trained(config: Any, step: Callable[[Progress], None], *_: Any, **__: Any) -> Progress:
        for progress in told:
            step(progress)
        return told[-1]

    monkeypatch.setattr(train_command, "train", trained)
    config = tmp_path / "train.yaml"
    config.write_text("model: some/model\n")
    return run(commands, ["train", str(config), *options])


def chaos(monkeypatch: pytest.MonkeyPatch, fault: ChaosReport, file: str) -> Any:
    monkeypatch.setattr(cluster, "Client", client_that(chaos=lambda _self, _request: fault))
    return run(commands, ["chaos", "kill", "--json", file])


def test_a_training_is_drawn_from_what_the_command_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = [Progress(n, 4, 5.0 - n, 1.5, 1e-3, 2000.0, 0.8, 0.75) for n in range(1, 5)]
    event = "step 3 was interrupted (lost: expert-<1>); training goes on after step 2"
    told = [*steps[:3], replace(steps[1], event=event, num_interruptions=1), *steps[2:]]
    told[-1] = replace(told[-1], validation_loss=1.25, failure=StepRefused("the loss is not finite"))
    file = tmp_path / "train.jsonl"
    assert train(monkeypatch, tmp_path, told[:2], "--json", str(file)).exit_code == 0
    assert train(monkeypatch, tmp_path, told[2:], "--json", str(file)).exit_code == 0  # it goes on
    assert len(file.read_text().splitlines()) == len(told)
    page = report(tmp_path, file)
    assert page.texts["h1"] == ["Training"]
    titles = ["Loss", "Norm of the gradient", "Learning rate", "Tokens a second", "Balance of the actors"]
    assert page.texts["h3"] == [*titles, "What happened"]
    assert page.texts["dd"] == ["4 of 4", "4 at first, 1 at last", "1", "the loss is not finite"]
    assert page.tags.count("svg") == 5
    assert event in page.texts["td"]
    assert "loss" not in page.texts["td"]
    assert page.tags.count("polyline") == 5 + 2  # validation, and experts in use
    assert f"step 2: {event}" in page.texts["title"]


def test_without_the_option_a_training_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert train(monkeypatch, tmp_path, [Progress(1, 1)]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
    away = train(monkeypatch, tmp_path, [Progress(1, 1)], "--json", str(tmp_path / "no/where"))
    assert (away.exit_code, "cannot write" in away.stderr) == (2, True)


def test_faults_of_several_files_are_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    first = chaos(monkeypatch, FAULT, str(files[0]))
    assert (first.exit_code, "longest stall" in first.stdout) == (0, True)
    second = chaos(monkeypatch, replace(FAULT, kind="hang", repaired_s=-1.0), str(files[1]))
    assert second.exit_code == 1  # not repaired, and written all the same
    page = report(tmp_path, *files)
    assert (page.texts["h1"], page.texts["dd"]) == (["Faults on purpose"], ["2", "2"])
    assert {"kill of expert-<1>", "hang of expert-<1>", "not yet", "0.042"} <= set(page.texts["td"])


def test_a_report_of_chaos_can_be_for_programs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    result = chaos(monkeypatch, FAULT, "-")
    assert json.loads(result.stdout)["stall_s"] == 0.042


def test_a_simulation_is_drawn_from_what_the_command_wrote(tmp_path: Path) -> None:
    file = tmp_path / "simulation.json"
    small = "--hosts 4 --layers 2 --experts 8 --top-k 2 --tokens-per-batch 64 --seconds 8".split()
    assert run(commands, ["simulate", *small, "--json", str(file)]).exit_code == 0
    page = report(tmp_path, file)
    assert page.texts["h1"] == ["Simulation"]
    assert {"Balancedness", "Hosts", "Changes of the placement", "Events"} <= set(page.texts["h3"])
    assert "2 layers, up to 8 experts" in page.texts["dd"]


def test_every_benchmark_of_the_repository_is_drawn_on_one_page_that_needs_nothing(tmp_path: Path) -> None:
    files = sorted((ROOT / "benchmarks/results").glob("*.json"))
    page = report(tmp_path, *files)
    assert page.texts["h2"] == [file.stem.replace("_", " ") for file in files]
    assert page.tags.count("svg") > 50
    assert {"script", "img", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert not [value for name, value in page.attributes if name in {"src", "href"} and not str(value).startswith("#")]


def test_the_shape_of_a_benchmark_decides_what_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "made_up.json"
    results = {
        "machine": {"cores": 2},
        "steps": 3,
        "time_s": {"ours": [1.0, 2.0, 3.0], "theirs": [2.0]},
        "runs": {"a": [{"loss": 2.0, "bytes": 5}, {"loss": 4.0, "bytes": 5}], "b": [{"loss": 1.0, "bytes": 7}]},
        "memory": {"router": [[0.0, 5.0], [1.0, 6.0], [2.0, 5.5]]},
        "training": [{"name": "<x>", "losses": [3.0, 2.0, 1.0]}],
        "folders": [[1, "a"], [2, "b"]],
    }
    file.write_text(json.dumps(results))
    page = report(tmp_path, file)
    assert page.texts["h1"] == ["made up"]
    assert page.texts["h3"] == [
        "Numbers", "time_s", "runs, loss", "runs, bytes", "memory", "training 1", "training 1, losses", "folders",
    ]  # fmt: skip
    assert {"ours: 2 (1 to 3)", "a: 3 (2 to 4)", "router: 6 at first of the pair 1"} <= set(page.texts["title"])
    assert "name: <x>" in page.texts["p"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; expected what `ray-moe train --json`"),
        ("{}", "is JSON, but of no run that is known"),
        ("[1, 2]", "is JSON, but of no run that is known"),
        ("not\njson", "line 1, is no JSON"),
        ('{"kind": 1, "targets": 2, "stall_s": 3}', "is not whole (TypeError"),
        ('{"virtual_s": 1, "per_batch": {}, "steps": []}', "is not whole (KeyError"),
        ('{"step": 1, "steps": "many", "loss": null}', "is not whole (TypeError"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    result = run(commands, ["report", str(file), "-o", str(tmp_path / "out.html")])
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out.html").exists()


def test_a_line_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"step": 1, "steps": 2, "loss": 3.0}\n{"step": 2, "ste')
    assert report(tmp_path, file).texts["dd"][0] == "1 of 2"


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    away = run(commands, ["report", str(tmp_path / "none.json")])
    assert (away.exit_code, "cannot read" in away.stderr) == (2, True)
    file = tmp_path / "train.jsonl"
    file.write_text('{"step": 1, "steps": 2}')
    shut = run(commands, ["report", str(file), "-o", str(tmp_path / "no/where.html")])
    assert (shut.exit_code, "cannot write" in shut.stderr) == (2, True)
