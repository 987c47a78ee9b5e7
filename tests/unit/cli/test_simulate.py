"""`ray-moe simulate`: what it prints, what it writes, what it records, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ray_moe.cli import simulate
from ray_moe.cli.commands import commands
from ray_moe.errors import Unavailable
from ray_moe.simulate.recording import RecordedTrace
from ray_moe.types import ServiceStatus
from tests.unit.cli.fakes import LAYERS, FakeClient, status

run = CliRunner().invoke

SMALL = "--hosts 4 --layers 2 --experts 8 --top-k 2 --tokens-per-batch 64 --seconds 8".split()


def report_of(*options: str) -> dict[str, Any]:
    result = run(commands, ["simulate", *options, "--json", "-"])
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_the_summary_says_all_that_was_found() -> None:
    result = run(commands, ["simulate", *SMALL, "--spot-losses", "600", "--start-seconds", "2", "--notice", "1"])
    assert result.exit_code == 0, result.stderr
    for said in (
        "8 s simulated in",
        "2 layers, up to 8 experts",
        "balancedness: mean / highest rows of a host, 1 is perfect",
        "per batch",
        "per window",
        "plans made",
        "from other hosts",
        "left every expert a host",
        "p_lossless",
        "4 at first",
        "host-hours",
        "% busy, queue of",
        "(real time)",
    ):
        assert said in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "simulating: " in result.stderr


def test_options_and_settings_reach_the_policies(tmp_path: Path) -> None:
    balanced, static = report_of(*SMALL), report_of(*SMALL, "--no-balance")
    assert balanced["changes"]["loaded_replicas"] > 0
    assert static["changes"]["loaded_replicas"] == 0
    assert balanced["per_batch"]["second_half"] > static["per_batch"]["second_half"]
    again = report_of(*SMALL)
    assert {**balanced, "wall": 0} == {**again, "wall": 0}
    assert report_of(*SMALL, "--min-replicas", "2", "--spare-slots", "4")["p_lossless"] == 1.0
    file = tmp_path / "settings.yaml"
    file.write_text("balance: {enabled: false}\nexperts: {experts_per_actor: 3, standby_actors: 2}\n")
    configured = report_of(*SMALL[2:], "--config", str(file), "--set", "balance.survive_nodes=2")
    assert configured["changes"]["plans"] == 0
    assert configured["first_hosts"] == 3
    assert configured["host_hours"] == pytest.approx(5 * 8 / 3600)
    assert configured["num_lost_nodes"] == 2


def test_numbers_are_written_beside_the_summary(tmp_path: Path) -> None:
    result = run(commands, ["simulate", *SMALL, "--json", str(tmp_path / "report.json")])
    assert "per window" in result.stdout
    assert len(json.loads((tmp_path / "report.json").read_text())["steps"]) == 8


def test_the_trend_has_a_column_for_each_step_or_several() -> None:
    assert simulate.trend([0.0, 0.5, 1.0]) == "▁▅█"
    assert simulate.trend([]) == ""
    assert 30 < len(simulate.trend([1.0] * 1000)) <= simulate.MAX_CELLS


def test_it_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from ray_moe.cli.commands import commands\n"
        f"result = CliRunner().invoke(commands, ['simulate', *{SMALL!r}])\n"
        "print(result.exit_code, *[name for name in ('ray', 'torch', 'transformers') if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == ["0"]


# --- recording -------------------------------------------------------------------------------------------------
class Busy(FakeClient):
    """A service that routes 8 rows to each expert between two looks, and may stop answering."""

    looks = 0
    ends_after = 1000

    def status(self) -> ServiceStatus:
        self.looks += 1
        if self.looks > self.ends_after:
            raise Unavailable("it is gone")
        return replace(status(), tokens_per_expert=dict.fromkeys(LAYERS, (8 * self.looks,) * 4))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> type[Busy]:
    kind = type("Client", (Busy,), {})
    monkeypatch.setattr(simulate, "Client", kind)
    monkeypatch.setattr(simulate, "LOOK_EVERY_S", 0.01)
    return kind


def test_a_service_is_recorded_and_replayed(service: type[Busy], tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"
    result = run(commands, ["simulate", "--save", str(file), "--seconds", "0.05"])
    assert result.exit_code == 0, result.stderr
    trace = RecordedTrace.load(file)
    assert trace.layers == LAYERS
    assert len(trace.rows) >= 1
    assert (trace.rows == 8).all()
    assert f"{trace.rows.sum():,} rows routed" in result.stdout
    replayed = report_of("--trace", str(file), "--hosts", "2", "--top-k", "2", "--tokens-per-batch", "4")
    assert replayed["rows"] == trace.rows.sum()
    assert replayed["virtual_s"] == pytest.approx(trace.duration_s)


def test_what_was_recorded_is_kept_when_the_service_ends(service: type[Busy], tmp_path: Path) -> None:
    service.ends_after = 4
    result = run(commands, ["simulate", "--save", str(tmp_path / "t.npz"), "--seconds", "100"])
    assert result.exit_code == 0, result.stderr
    assert "3 steps" in result.stdout
    assert "ended early: it is gone" in result.stdout
    assert RecordedTrace.load(tmp_path / "t.npz").rows.shape == (3, 2, 4)


@pytest.mark.parametrize("ends_after", [0, 1])
def test_a_service_that_is_not_there_is_an_error(service: type[Busy], tmp_path: Path, ends_after: int) -> None:
    service.ends_after = ends_after
    result = run(commands, ["simulate", "--save", str(tmp_path / "t.npz")])
    assert result.exit_code == 1
    assert result.stderr.endswith("error: it is gone\n")
    assert list(tmp_path.iterdir()) == []


# --- refusals --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--trace zpif:1", "--trace is 'zpif:1', which is neither a kind of trace nor a file; expected zipf:NUMBER"),
        ("--trace none.npz", "--trace is 'none.npz', which is neither"),
        ("--trace zipf:steep", "--trace is 'zipf:steep'; expected a number after the colon"),
        ("--trace zipf:-1", "the number of --trace zipf is -1"),
        ("--hosts 0", "experts.num_actors = 0 (flag --hosts): should be greater than"),
        ("--layers 0", "--layers is 0"),
        ("--experts 0", "--experts is 0"),
        ("--top-k 9", "--top-k is 9, but a layer has 8 experts"),
        ("--tokens-per-batch 0", "--tokens-per-batch is 0"),
        ("--tokens-per-second -1", "--tokens-per-second is -1"),
        ("--seconds 0", "--seconds is 0"),
        ("--seconds nan", "--seconds is nan"),
        ("--spot-losses -1", "--spot-losses is -1; expected a number that is 0 or more"),
        ("--notice -1", "--notice is -1"),
        ("--drift -1", "--drift is -1"),
        ("--flash-crowd 5", "--flash-crowd is '5'; expected SECONDS:FACTOR, such as 20:5"),
        ("--surge x:2", "--surge is 'x:2'; expected SECONDS:FACTOR"),
        ("--hosts-per-node 0", "--hosts-per-node is 0"),
        ("--expert-bytes 0", "--expert-bytes is '0'; expected a size above 0, such as 64KiB"),
        ("--expert-bytes big", "--expert-bytes is 'big'"),
        ("--bandwidth -1", "--bandwidth is '-1'"),
        ("--host-speed 0", "--host-speed is 0; expected a number that is more than 0"),
        ("--spare-slots -1", "experts.spare_slots = -1 (flag --spare-slots)"),
        ("--min-replicas 0", "balance.min_replicas = 0 (flag --min-replicas)"),
        ("--seed -1", "--seed is -1"),
        ("--set experts.max_bytes=1", "4 hosts of 1 bytes (experts.max_bytes) have 0 slots for the 8 experts"),
        ("--set balance.evry_s=1", "flag --set: there is no setting 'balance.evry_s'"),
        ("--json none/report.json", "cannot write none/report.json: No such file or directory"),
        ("--save none/trace.npz", "cannot write none/trace.npz: No such file or directory"),
    ],
)
def test_bad_input_is_refused_in_one_line(options: str, said: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(commands, ["simulate", *SMALL, *options.split()])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_files_that_are_no_traces_and_options_that_they_do_not_take(tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"
    file.write_text("not a trace")
    result = run(commands, ["simulate", "--trace", str(file)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file} is not a trace: ")
    step = np.full((1, 1, 4), 10)
    RecordedTrace(("a",), (4,), np.array([1.0]), step).save(file)
    result = run(commands, ["simulate", "--trace", str(file), "--experts", "8", "--drift", "0"])
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: --experts, --drift: only synthetic traces take that; {file} has its own, leave it out\n"
    )
