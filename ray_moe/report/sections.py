"""Runs of `ray-moe train`, `chaos` and `simulate` as sections. What the numbers are, the commands' own values say:
`training.loop.Progress`, `types.ChaosReport`, `simulate.report.Report`. Called by `reading.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_moe.report.parts import Bar, Bars, Lines, Points, Run, Section, Table, number, of_bars, of_lines

Record = Mapping[str, Any]

TRAINING: Sequence[tuple[str, Mapping[str, str], tuple[float | None, float | None]]] = (
    ("Loss", {"loss": "training", "validation_loss": "validation"}, (None, None)),
    ("Norm of the gradient", {"grad_norm": "norm"}, (0, None)),
    ("Learning rate", {"lr": "rate"}, (0, None)),
    ("Tokens a second", {"tokens_per_s": "tokens a second"}, (0, None)),
    ("Balance of the actors", {"balancedness": "balancedness", "expert_utilisation": "experts in use"}, (0, 1)),
    ("Dropped tokens", {"dropped_tokens": "tokens"}, (0, None)),
)
"""Title -> the values that are drawn together, and their names."""


def training(steps: Sequence[Record], source: str) -> Run:
    """Of the lines of `ray-moe train --json`, in the order in which they were written."""
    last_of = {int(each["step"]): each for each in steps if "loss" in each}  # a step may be made again
    made = [last_of[step] for step in sorted(last_of)]
    events = list(dict.fromkeys((int(each["step"]), str(each["event"])) for each in steps if each.get("event")))
    interruptions = [(float(step), event) for step, event in events if "interrupted" in event]
    sections = []
    for title, names, y_range in TRAINING:
        series = {shown: _points(made, name) for name, shown in names.items()}
        series = {shown: points for shown, points in series.items() if points}
        if series and (title != "Dropped tokens" or any(y for _, y in series["tokens"])):
            sections.append(of_lines(title, Lines(series, "step", y_range, interruptions)))
    if events:
        table = Table(["step", "what"], [[number(step), event] for step, event in events])
        sections.append(Section("What happened", table=table))
    return Run("Training", source, list(_training_facts(steps, made)), sections)


def _points(steps: Sequence[Record], name: str) -> Points:
    points = [(float(each["step"]), float(each[name])) for each in steps if each.get(name) is not None]
    if name != "validation_loss":
        return points
    # Each line has that of the last look: a point is where it is new.
    return [
        point for before, point in zip([None, *points], points, strict=False) if not before or before[1] != point[1]
    ]


def _training_facts(steps: Sequence[Record], made: Sequence[Record]) -> Iterator[tuple[str, str]]:
    yield "steps", f"{number(max(int(each['step']) for each in steps))} of {number(steps[-1]['steps'])}"
    if made:
        yield "loss", f"{number(made[0]['loss'])} at first, {number(made[-1]['loss'])} at last"
    yield "interruptions", number(max(float(each.get("num_interruptions", 0)) for each in steps))
    failures = [str(each["failure"]) for each in steps if each.get("failure")]
    if failures:
        yield "ended with", failures[-1]


# --- chaos ---------------------------------------------------------------------------------------------------
FAULT = {
    "stall_s": "longest stall, s",
    "failed_requests": "failed requests",
    "repaired_s": "repaired in, s",
    "balancedness_before": "balancedness before",
    "balancedness_after": "after",
    "retried_calls": "calls sent again",
    "hedged_calls": "hedged",
    "lifeboat_loads": "experts read by the lifeboat",
}
"""What is told of each, and its column."""


def chaos(reports: Sequence[tuple[Record, str]]) -> Run:
    """Faults side by side; each with the file that it is from."""
    plain = [f"{fault['kind']} of {', '.join(fault['targets'])}" for fault, _ in reports]
    named = [
        (name if plain.count(name) == 1 else f"{name} ({source})", fault)
        for name, (fault, source) in zip(plain, reports, strict=True)
    ]
    rows = [
        [name, *("not yet" if key == "repaired_s" and fault[key] < 0 else number(fault[key]) for key in FAULT)]
        for name, fault in named
    ]
    sections = [Section("All faults", table=Table(["fault", *FAULT.values()], rows))]
    stalls = Bars([Bar.of(name, [fault["stall_s"]]) for name, fault in named])
    sections.append(of_bars("Longest stall of a stream, seconds", stalls, "The longest time between two tokens."))
    repairs = Bars([Bar.of(name, [fault["repaired_s"]]) for name, fault in named if fault["repaired_s"] >= 0])
    if repairs.bars:
        text = "Until every expert had its replicas and every host was back."
        sections.append(of_bars("Time to repair, seconds", repairs, text))
    failed = sum(int(fault["failed_requests"]) for _, fault in named)
    facts = [("faults", number(len(named))), ("failed requests", number(failed))]
    return Run("Faults on purpose", ", ".join(dict.fromkeys(source for _, source in reports)), facts, sections)


# --- simulation ----------------------------------------------------------------------------------------------
SIMULATION: Sequence[tuple[str, Mapping[str, str], tuple[float | None, float | None]]] = (
    ("Balancedness", {"per_batch": "per batch", "per_window": "per window"}, (0, 1)),
    ("Hosts", {"num_hosts": "hosts"}, (0, None)),
    ("Traffic, rows a second", {"rows_per_s": "rows a second"}, (0, None)),
    ("Utilisation of the hosts", {"utilisation": "share of the time"}, (0, 1)),
    ("How far behind the hosts are, seconds", {"queue_age_s": "queue"}, (0, None)),
    ("Experts without a host", {"num_orphans": "experts"}, (0, None)),
    ("Chance that no expert is lost with a node", {"p_lossless": "chance"}, (0, 1)),
)


def simulation(report: Record, source: str) -> Run:
    """Of `ray-moe simulate --json`."""
    steps = report["steps"]
    sections = []
    for title, names, y_range in SIMULATION:
        series = {shown: [(step["at_s"], float(step[name])) for step in steps] for name, shown in names.items()}
        is_flat = not any(y for points in series.values() for _, y in points)
        if steps and not (is_flat and title in ("Experts without a host", "How far behind the hosts are, seconds")):
            sections.append(of_lines(title, Lines(series, "s", y_range)))
    rows = [
        [name, *(number(spread[key]) for key in ("mean", "low", "least", "second_half"))]
        for name, spread in (("per batch", report["per_batch"]), ("per window", report["per_window"]))
    ]
    columns = ["balancedness", "mean", "5% are below", "lowest", "second half"]
    sections.insert(
        0, Section("Balance", f"Mean over highest {report['measured']} of a host.", table=Table(columns, rows))
    )
    for title, key in (("Changes of the placement", "changes"), ("Faults", "faults"), ("Events", "told")):
        if report[key]:
            rows = [[name.replace("_", " "), number(value)] for name, value in report[key].items()]
            sections.append(Section(title, table=Table(["", "number"], rows)))
    return Run("Simulation", source, list(_simulation_facts(report)), sections)


def _simulation_facts(report: Record) -> Iterator[tuple[str, str]]:
    yield "virtual time", f"{number(report['virtual_s'])} s, in {number(report['wall']['total_s'])} s"
    yield "model", f"{number(report['num_layers'])} layers, up to {number(report['num_experts'])} experts"
    yield "rows", number(report["rows"])
    yield (
        "hosts",
        f"{report['first_hosts']} at first, {report['most_hosts']} at most, {report['last_hosts']} at the end; "
        f"{number(report['host_hours'])} host-hours",
    )
    yield (
        "chance to lose no expert",
        f"{number(report['p_lossless'])}, at the lowest {number(report['least_p_lossless'])}",
    )
