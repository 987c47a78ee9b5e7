"""`ray-moe plan`, `resize`, `drain` and `chaos`: changing a running service, and watching it change."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_moe.cli import tables
from ray_moe.cli.output import STDOUT, write_json
from ray_moe.cli.target import Target
from ray_moe.cli.terminal import ProgressView, format_bytes
from ray_moe.client.sync import Client
from ray_moe.errors import Unavailable
from ray_moe.simulate.checks import check_writable
from ray_moe.types import ChaosReport, ChaosRequest, PlanSummary

POLL_S = 0.2
MAX_ROWS = 40
"""Longer lists of moves are cut; the numbers above them are of all."""


def run_plan(to: Target, dry_run: bool, wait: bool, timeout_s: float) -> None:
    """Show a better placement; without `dry_run` the service changes to it."""
    console = Console()
    with Client(to.server, timeout_s, **to.access) as client:
        plan = client.plan(dry_run=dry_run)
        console.print(_plan(plan))
        if plan.moves:
            console.print(_moves(plan))
        if dry_run:
            console.print("dry run: nothing was changed; without --dry-run the service does it")
        elif wait:
            _await_change(client, timeout_s)
            console.print("done")


def run_resize(to: Target, num_actors: int, wait: bool, timeout_s: float) -> None:
    """Change the number of expert actors."""
    with Client(to.server, timeout_s, **to.access) as client:
        client.resize(num_actors)
        if wait:
            _await_change(client, timeout_s)
        _show_hosts(client)


def run_drain(to: Target, target: str, replace: bool, wait: bool, timeout_s: float) -> None:
    """Empty an actor, or the actors of a node, and end them."""
    with Client(to.server, timeout_s, **to.access) as client:
        going = client.drain(target, replace=replace)
        Console().print(f"draining {', '.join(going)}")
        if wait:
            _await_change(client, timeout_s)
        _show_hosts(client)


def run_chaos(to: Target, request: ChaosRequest, timeout_s: float, json_file: Path | None = None) -> None:
    """Hurt the service, and show the report on its recovery; with `json_file` write it there (``-``: only that)."""
    if json_file is not None and json_file != STDOUT:
        check_writable(json_file)
    with Client(to.server, timeout_s, **to.access) as client:
        report = client.chaos(request)
    if json_file is not None:
        write_json(json_file, asdict(report))
    if json_file != STDOUT:
        Console().print(_report(report))
    if report.repaired_s < 0:
        raise Unavailable("the service is not whole again; see ray-moe status")


def _await_change(client: Client, timeout_s: float) -> None:
    """Return when no change is under way any more.

    Raises: `Unavailable` when the last change was given up, with its reason, or goes on after `timeout_s`.
    """
    end_s = time.monotonic() + timeout_s
    since_s = time.time() - 1.0
    with ProgressView(Console(stderr=True)) as view:
        while True:
            status = client.status()
            if not status.changing:
                break
            ready = sum(host.state in ("ready", "standby") for host in status.hosts)
            view.update("changing", ready, len(status.hosts), status.changing)
            if time.monotonic() > end_s:
                raise Unavailable(f"still under way after {timeout_s:g} s: {status.changing}; see ray-moe status")
            time.sleep(POLL_S)
    for event in reversed(status.events):
        if event.at_s < since_s or event.kind == "resized":
            break
        if event.kind == "aborted":
            raise Unavailable(f"rolled back: {event.text}")


def _show_hosts(client: Client) -> None:
    Console().print(tables.hosts(client.status().hosts, client.placement()))


def _plan(plan: PlanSummary) -> Text:
    if not plan.moves:
        return Text(f"nothing to change: balancedness is {plan.balancedness_before:.3f}")
    kinds = Counter("move" if m.added and m.removed else "replicate" if m.added else "drop" for m in plan.moves)
    counts = ", ".join(f"{count} to {kind}" for kind, count in sorted(kinds.items()))
    pause = f"{plan.pause_s:.1f} s" if plan.pause_s else "none (every expert stays served)"
    return Text(
        f"experts: {counts}\n"
        f"to copy: {format_bytes(plan.copied_bytes)} in {plan.num_steps} step(s), about {plan.duration_s:.1f} s\n"
        f"balancedness: {plan.balancedness_before:.3f} now, {plan.balancedness_after:.3f} then (predicted)\n"
        f"pause of requests: {pause}"
    )


def _moves(plan: PlanSummary) -> Table:
    out = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("layer", "expert", "added to", "removed from"):
        out.add_column(name, no_wrap=True)
    for move in plan.moves[:MAX_ROWS]:
        out.add_row(move.layer, str(move.expert), ", ".join(move.added), ", ".join(move.removed))
    if len(plan.moves) > MAX_ROWS:
        out.add_row(f"and {len(plan.moves) - MAX_ROWS} more", "", "", "")
    return out


def _report(report: ChaosReport) -> Table:
    repaired = f"{report.repaired_s:.2f} s" if report.repaired_s >= 0 else "not yet"
    out = Table(
        title=f"{report.kind} of {', '.join(report.targets)}", title_justify="left", box=None, show_header=False
    )
    for name, value in (
        ("longest stall of a stream", f"{report.stall_s:.3f} s"),
        ("failed requests", str(report.failed_requests)),
        ("repaired in", repaired),
        ("balancedness", f"{report.balancedness_before:.3f} before, {report.balancedness_after:.3f} after"),
        ("calls sent again", str(report.retried_calls)),
        ("calls hedged", str(report.hedged_calls)),
        ("experts read by the lifeboat", str(report.lifeboat_loads)),
    ):
        out.add_row(name, value)
    return out
