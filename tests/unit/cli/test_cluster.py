"""`ray-moe plan`, `resize`, `drain`, `chaos`: what they ask for, what they show, and how they end."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from ray_moe.cli import cluster
from ray_moe.cli.commands import commands
from ray_moe.types import ChaosReport, ChaosRequest, ClusterEvent, PlannedMove, PlanSummary, ServiceStatus
from tests.unit.cli.fakes import LAYERS, FakeClient, status

run = CliRunner().invoke

MOVES = (
    PlannedMove(LAYERS[0], 1, ("expert-1",), ()),
    PlannedMove(LAYERS[1], 3, ("expert-0",), ("expert-1",)),
)
PLAN = PlanSummary(MOVES, 3_200_000, 1, 0.61, 0.98, 0.0, 0.5)
REPORT = ChaosReport("kill", ("expert-1",), 0.042, 0, 2.5, 0.9, 0.95, 3, 0, 8)


class Changing(FakeClient):
    """A service that is at a change for a few looks, and what was asked of it."""

    asked: ClassVar[list[tuple[Any, ...]]] = []
    plans = PLAN
    report = REPORT
    looks = 0
    ends_with = ClusterEvent(0.0, "resized", "requested: 2 to 3 hosts")

    def plan(self, *, dry_run: bool) -> PlanSummary:
        self.asked.append(("plan", dry_run))
        return self.plans

    def resize(self, num_actors: int) -> None:
        self.asked.append(("resize", num_actors))

    def drain(self, target: str, *, replace: bool) -> tuple[str, ...]:
        self.asked.append(("drain", target, replace))
        return ("expert-0", "expert-1")

    def chaos(self, request: ChaosRequest) -> ChaosReport:
        self.asked.append(("chaos", request))
        return self.report

    def status(self) -> ServiceStatus:
        self.looks += 1
        if self.looks <= 2:
            return status(changing="requested: 2 to 3 hosts")
        return status(events=(replace(self.ends_with, at_s=time.time()),))


@pytest.fixture
def changing(monkeypatch: pytest.MonkeyPatch) -> type[Changing]:
    kind = type("Client", (Changing,), {"asked": []})
    monkeypatch.setattr(cluster, "Client", kind)
    monkeypatch.setattr(cluster, "POLL_S", 0.001)
    return kind


def test_a_dry_run_shows_moves_bytes_balance_and_pause_and_changes_nothing(changing: type[Changing]) -> None:
    result = run(commands, ["plan", "--dry-run"])
    assert result.exit_code == 0
    for said in (
        "experts: 1 to move, 1 to replicate",
        "to copy: 3.2 MB in 1 step(s), about 0.5 s",
        "balancedness: 0.610 now, 0.980 then (predicted)",
        "pause of requests: none",
        "dry run: nothing was changed",
    ):
        assert said in result.stdout
    assert changing.asked == [("plan", True)]


def test_a_plan_is_carried_out_and_waited_for(changing: type[Changing]) -> None:
    result = run(commands, ["plan"])
    assert (result.exit_code, changing.asked) == (0, [("plan", False)])
    assert result.stdout.endswith("done\n")


def test_a_long_plan_is_cut(changing: type[Changing]) -> None:
    changing.plans = replace(PLAN, moves=MOVES * 50, pause_s=1.5)
    result = run(commands, ["plan", "--dry-run"])
    assert f"and {100 - cluster.MAX_ROWS} more" in result.stdout
    assert "pause of requests: 1.5 s" in result.stdout


def test_nothing_to_plan(changing: type[Changing]) -> None:
    changing.plans = PlanSummary((), 0, 0, 0.99, 0.99, 0.0, 0.0)
    assert "nothing to change: balancedness is 0.990" in run(commands, ["plan", "--dry-run"]).stdout


def test_resize_waits_and_shows_the_hosts(changing: type[Changing]) -> None:
    result = run(commands, ["resize", "3"])
    assert (result.exit_code, changing.asked) == (0, [("resize", 3)])
    assert "expert-1" in result.stdout


def test_a_resize_that_was_rolled_back_is_an_error(changing: type[Changing]) -> None:
    changing.ends_with = ClusterEvent(0.0, "aborted", "requested: 2 to 3 hosts: expert-2 cannot start")
    result = run(commands, ["resize", "3"])
    assert result.exit_code == 1
    assert result.stderr.endswith("error: rolled back: requested: 2 to 3 hosts: expert-2 cannot start\n")


def test_a_change_that_takes_too_long_is_left_to_itself(changing: type[Changing]) -> None:
    changing.looks = -(10**9)
    result = run(commands, ["resize", "3", "--timeout", "0.05"])
    assert result.exit_code == 1
    assert "still under way after 0.05 s: requested: 2 to 3 hosts" in result.stderr


def test_drain(changing: type[Changing]) -> None:
    result = run(commands, ["drain", "abcdef", "--replace", "--no-wait"])
    assert (result.exit_code, changing.asked) == (0, [("drain", "abcdef", True)])
    assert "draining expert-0, expert-1" in result.stdout


def test_chaos_reports_the_recovery(changing: type[Changing]) -> None:
    result = run(commands, ["chaos", "slow", "--target", "expert-1", "--at", "1", "--factor", "3", "--seed", "7"])
    assert result.exit_code == 0
    assert changing.asked == [("chaos", ChaosRequest("slow", "expert-1", 1.0, 5.0, 3.0, 7))]
    for said in ("kill of expert-1", "0.042 s", "failed requests", "2.50 s", "0.900 before, 0.950 after"):
        assert said in result.stdout


def test_chaos_that_is_not_repaired_is_an_error(changing: type[Changing]) -> None:
    changing.report = replace(REPORT, repaired_s=-1.0)
    result = run(commands, ["chaos", "kill"])
    assert result.exit_code == 1
    assert "not yet" in result.stdout
