"""The page of `benchmarks/scale.py`. Here is also the model: what a router can dispatch, given what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import report

GBITS = (25, 100, 400)
"""Of a router's network."""


def page(data: report.Data) -> str:
    """Made of `results/scale.json`."""
    rows = data["rows"]
    parts = [
        "# Scale",
        "What the service's own code costs as hosts and experts grow, in process and without Ray; CPU time of one "
        "thread. Experts are as the planner places them (8 hosts on a node, one spare slot of each layer on each "
        "host), load is Zipf 0.8, top-8, D 2,048 in bfloat16. The last row has each layer on 16 hosts of its own.",
        "## One batch, one layer",
        "*Split*: choice of replicas and grouping by host. *Encode*: all calls of the layer, tokens gathered. "
        "*Combine*: the weighted sum.",
        report.table(
            ["experts", "tokens", "messages", "MB out", "MB back", "split, ms", "encode, ms", "combine, ms"],
            {key: cells for row in rows for key, cells in _batches(row)},
        ),
        "## Plans",
        report.table(
            ["replicas", "first, s", "after a drift, s", "after a death, s"],
            {_name(row): _plan(row["now"]) for row in rows if "plan" in row["now"]},
        ),
        "## Controller and routing table",
        "*Start*: all hosts say that they are up, one a second: the last are overdue after a minute, and others stand "
        "in for them, which is the worst a start can be. *Round*: each host's heartbeat and a tick. "
        "*Death*: a host is lost, and the table that follows. A table is encoded and decoded as it travels to a "
        "router; *apply*: a router uses it for all layers; *late*: the same when a host becomes late.",
        report.table(
            [
                "start, s",
                "round, ms",
                "report, ms",
                "death, ms",
                "table, kB",
                "in memory, MB",
                "encode, ms",
                "decode, ms",
                "apply, ms",
                "late, ms",
            ],
            {_name(row): _controller(row["now"]) for row in rows},
        ),
        "## What one router can dispatch",
        _model(data),
    ]
    if data.get("before"):
        parts += [f"## Before (`{data['before']}`) and now", _before(rows, data["tokens"])]
    if "simulation" in data:
        parts += ["## A simulation of 1,000 hosts", _simulation(data["simulation"])]
    return "\n\n".join(parts)


def _name(row: Mapping[str, Any]) -> str:
    size = row["size"]
    few = f", {size['hosts_a_layer']} a layer" if size.get("hosts_a_layer") else ""
    return f"{size['hosts']:,} hosts{few}"


def _batches(row: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    size, out = row["size"], []
    for tokens, one in row["now"]["batch"].items():
        cells = [
            f"{size['experts'] * size['layers']:,}",
            f"{int(tokens):,}",
            f"{one['messages']:,}",
            f"{one['bytes_out'] / 1e6:.2f}",
            f"{one['bytes_back'] / 1e6:.2f}",
            *(f"{one[name] * 1e3:.2f}" for name in ("split_s", "encode_s", "combine_s")),
        ]
        out.append((f"{_name(row)}, {int(tokens):,}", cells))
    return out


def _plan(now: Mapping[str, Any]) -> list[str]:
    times = now["plan"]
    return [f"{now['replicas']:,}", *(f"{times[n]:.2f}" if n in times else "" for n in ("first", "drift", "death"))]


def _controller(now: Mapping[str, Any]) -> list[str]:
    controller, table = now["controller"], now["table"]
    return [
        f"{controller['start_all_s']:.2f}",
        *(f"{controller[name] * 1e3:.2f}" for name in ("heartbeats_s", "report_s", "death_s")),
        f"{table['bytes'] / 1e3:,.0f}",
        f"{table['memory_bytes'] / 1e6:.1f}",
        *(f"{table[name] * 1e3:.2f}" for name in ("encode_s", "decode_s", "apply_s", "late_s")),
    ]


# --- the model ---------------------------------------------------------------------------------------------------
def tokens_per_s(row: Mapping[str, Any], tokens: str, message_s: float) -> dict[str, float]:
    """Tokens that each part of a router can take through all layers in a second, if it did nothing else."""
    one, layers = row["now"]["batch"][tokens], row["size"]["layers"]
    number = int(tokens)
    # What of a message does not depend on its length is in `message_s`, encoding one token included.
    thread_s = one["split_s"] + one["combine_s"] + max(one["encode_s"], one["messages"] * message_s)
    most = max(one["bytes_out"], one["bytes_back"])
    network = {f"{gbit} Gbit/s": number / (layers * most * 8 / (gbit * 1e9)) for gbit in GBITS}
    return {"thread": number / (layers * thread_s), **network}


def _model(data: report.Data) -> str:
    message_s = data["message"]["grpc_s"]
    cells = {}
    for row in data["rows"]:
        for tokens in row["now"]["batch"]:
            one = tokens_per_s(row, tokens, message_s)
            wall = min(("thread", "100 Gbit/s"), key=lambda name: one[name])
            shown = {"thread": "messages", "100 Gbit/s": "network"}[wall]
            batch = row["now"]["batch"][tokens]
            if wall == "thread" and batch["messages"] * message_s < batch["split_s"] + batch["combine_s"]:
                shown = "split and combine"
            cells[f"{_name(row)}, {int(tokens):,} tokens"] = [*(f"{value:,.0f}" for value in one.values()), shown]
    return "\n\n".join(
        [
            "A model, not a measurement: tokens a second through all layers, if one thing alone were the limit. The "
            f"thread splits, sends and hears each message ({message_s * 1e6:.0f} µs of CPU between nodes, by gRPC; "
            f"{data['message']['socket_s'] * 1e6:.0f} µs on one node, by socket: measured with one token a call) and "
            "combines; the network carries the larger of both directions. *First wall*: what is least, with 100 "
            "Gbit/s. The backbone is left out.",
            report.table(["thread", *(f"{gbit} Gbit/s" for gbit in GBITS), "first wall"], cells),
        ]
    )


# --- before and now ----------------------------------------------------------------------------------------------
def _before(rows: list[Mapping[str, Any]], tokens: list[int]) -> str:
    looks: dict[str, Callable[[Mapping[str, Any]], float]] = {
        f"split of {number:,} tokens, ms": lambda one, number=number: one["batch"][str(number)]["split_s"] * 1e3  # type: ignore[misc]
        for number in tokens
    }
    looks |= {
        "apply a table, ms": lambda one: one["table"]["apply_s"] * 1e3,
        "a host becomes late, ms": lambda one: one["table"]["late_s"] * 1e3,
        "first plan, s": lambda one: one["plan"]["first"],
        "plan after a drift, s": lambda one: one["plan"]["drift"],
        "all hosts start, s": lambda one: one["controller"]["start_all_s"],
        "round of heartbeats, ms": lambda one: one["controller"]["heartbeats_s"] * 1e3,
        "a host dies, ms": lambda one: one["controller"]["death_s"] * 1e3,
    }
    planned = [row for row in rows if "plan" in row["now"]]
    cells = {
        name: [f"{look(row['before']):.2f} → {look(row['now']):.2f}" for row in planned] for name, look in looks.items()
    }
    return report.table([_name(row) for row in planned], cells)


# --- a simulation ------------------------------------------------------------------------------------------------
def _simulation(found: Mapping[str, Any]) -> str:
    faults, changes, balance = found["faults"], found["changes"], found["per_batch"]
    facts = {
        "real time": f"{found['passed_s']:.0f} s for {found['virtual_s']:.0f} s; of it {sum(found['planning_s']):.0f} "
        f"s in {len(found['planning_s'])} plans, {found['policy_s']:.1f} s in events, {found['splitting_s']:.1f} s in "
        "splits",
        "balancedness per batch": f"mean {balance['mean']:.3f}, second half {balance['second_half']:.3f}, least "
        f"{balance['least']:.3f}",
        "hosts": f"{found['first_hosts']:,} at first, {found['most_hosts']:,} at most, {found['last_hosts']:,} at the "
        "end",
        "losses": f"{faults['lost_nodes']} nodes with {faults['lost_hosts']} hosts, {faults['survived']} of these left "
        f"every expert a host; {faults['evacuated_hosts']} hosts handed over before",
        "stalls": f"{faults['orphan_s']:.1f} s with an expert without a host, {faults['lifeboat_rows']:,.0f} rows for "
        f"lifeboats; queue of {found['longest_queue_s']:.1f} s at most, {found['last_queue_s']:.1f} s at the end",
        "changes": f"{changes['transactions']} of the placement, {changes['loaded_replicas']:,} replicas loaded",
    }
    return f"`ray-moe simulate {found['scenario']}`\n\n" + report.table(
        [""], {name: [text] for name, text in facts.items()}
    )
