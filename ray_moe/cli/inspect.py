"""`ray-moe inspect`: what a model is, how it is known, what it weighs, and a configuration to serve it with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ray_moe.cli.tables import plain_table
from ray_moe.cli.terminal import format_bytes
from ray_moe.models.inspect import inspect
from ray_moe.models.inspect_verdict import Inspection
from ray_moe.policy.anatomy import KIND_NAMES, Anatomy
from ray_moe.policy.deployment import suggest

CONTEXTS = (0, 4096)
"""Tokens before one, for which its arithmetic is told."""
MAX_CONTRADICTIONS = 6


def run(model: str, num_hosts: int | None, measure: bool, as_json: bool) -> None:
    """Look at `model`, and tell."""
    found = inspect(model, measure=measure)
    hosts = num_hosts or max(1, min(8, found.anatomy.num_experts))
    if as_json:
        print_json(as_values(found, hosts))
        return
    console = Console()
    for part in pictures(found, hosts):
        console.print(part, soft_wrap=True, highlight=False)


def print_json(values: Mapping[str, Any]) -> None:
    """On standard output, as it is."""
    Console().print(json.dumps(values, indent=2), markup=False, highlight=False, soft_wrap=True)


def as_values(found: Inspection, num_hosts: int) -> dict[str, Any]:
    """Everything, for programs."""
    anatomy = found.anatomy
    told = asdict(found)
    told["anatomy"] |= {
        "active_params": anatomy.active_params,
        "expert_params": anatomy.expert_params,
        "expert_share": anatomy.expert_share,
        "flops_per_token": {str(context): anatomy.flops_per_token(context) for context in CONTEXTS},
        "memory": asdict(anatomy.memory(num_hosts)),
    }
    return told | {"deployment": deployment(found, num_hosts)}


def deployment(found: Inspection, num_hosts: int) -> str:
    """Settings as YAML that `ray-moe serve --config` takes; empty for what it does not serve."""
    if not found.anatomy.groups or found.servable is False:
        return ""
    return suggest(folder_of(found.name), found.anatomy, num_hosts)


def folder_of(name: str) -> str:
    """What `ray-moe serve` takes for it: of a file named by itself its folder."""
    return str(Path(name).parent) if Path(name).is_file() else name


def pictures(found: Inspection, num_hosts: int) -> Iterator[RenderableType]:
    """All of it, part by part."""
    yield Text.assemble((found.name, "bold"), f" ({found.family}): ", (KIND_NAMES[found.kind], "bold green"))
    yield _evidence(found)
    for text in found.contradictions[:MAX_CONTRADICTIONS]:
        yield Text.assemble(("against it: ", "bold yellow"), text)
    if len(found.contradictions) > MAX_CONTRADICTIONS:
        yield Text(f"and {len(found.contradictions) - MAX_CONTRADICTIONS} more contradictions (--json has them)")
    for text in found.notes:
        yield Text.assemble(("note: ", "bold"), text)
    yield ""
    yield numbers(found)
    if found.anatomy.groups:
        yield ""
        yield memory(found.anatomy, num_hosts)
    yield ""
    if found.servable is False:
        yield Text(f"ray-moe does not serve it: {found.not_servable}")
    elif config := deployment(found, num_hosts):
        yield Text("# ray-moe serve --config FILE", style="bold")
        yield Text(config)


def _evidence(found: Inspection) -> Table:
    table = plain_table("evidence")
    for name in ("source", "says", "because"):
        table.add_column(name, no_wrap=name == "source")
    for one in found.evidence:
        says = "" if one.says is None else one.says.replace("_", " ")
        mark = " (decides)" if one.source == found.basis else ""
        table.add_row(Text(one.source + mark, "bold" if mark else ""), says, Text(one.text))
    return table


def numbers(found: Inspection) -> Table:
    """The model in numbers."""
    anatomy = found.anatomy
    table = plain_table("the model in numbers")
    table.add_column("")
    table.add_column("")
    for name, value in _rows(found, anatomy):
        table.add_row(name, Text(value))
    return table


def _rows(found: Inspection, anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    if anatomy.groups:
        counts = sorted({group.num_experts for group in anatomy.groups})
        yield "experts", f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} × {len(anatomy.groups)}"
        yield "k, experts per token", k_of(found)
        shared = max(group.num_shared for group in anatomy.groups)
        yield "shared experts", str(shared) if shared else "none"
        widths = sorted({group.hidden_size for group in anatomy.groups})
        yield "width of tokens", str(widths[-1]) if widths[-1] else "not known"
        yield "parameters of an expert", _count(max(group.expert_params for group in anatomy.groups))
    for stack in anatomy.stacks:
        yield f"layers of {stack.path}", f"{_shortened(stack.pattern)} (M experts, D dense, . neither)"
    if found.mixers:
        yield "mixing of tokens", ", ".join(f"{number} {kind}" for kind, number in found.mixers.items())
    yield "parameters", _count(anatomy.total_params)
    yield "active parameters", _count(anatomy.active_params)
    if anatomy.groups:
        yield "in routed experts", f"{100 * anatomy.expert_share:.1f}%" if anatomy.total_params else "not known"
    yield "weights", f"{format_bytes(anatomy.weight_bytes)} ({found.dtype})" if anatomy.weight_bytes else "not known"
    for context in CONTEXTS if anatomy.total_params else ():
        yield f"FLOPs per token at {context}", _count(anatomy.flops_per_token(context))
    kv = anatomy.kv_bytes_per_token
    yield "keys and values per token", "not known" if kv is None else format_bytes(kv)


def k_of(found: Inspection) -> str:
    """K as text."""
    top_k = found.anatomy.top_k
    if top_k is None:
        return "not known (it is not in the weights)"
    if not found.k_per_token:
        return f"{top_k:g}"
    counts = [k for tokens in found.k_per_token.values() for k in tokens]
    spread = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{top_k:g} (measured: {spread})"


def memory(anatomy: Anatomy, num_hosts: int) -> Table:
    """Weights on each machine, for this many hosts and some others."""
    table = plain_table("weights in memory")
    for name in ("hosts", "experts of each", "router", "in all"):
        table.add_column(name, justify="right")
    for number in sorted({1, 2, 4, 8, num_hosts}):
        if number > anatomy.num_experts and number != num_hosts:
            continue
        each = anatomy.memory(number)
        cells = [str(number), *map(format_bytes, (each.expert_bytes, each.router_bytes, anatomy.weight_bytes))]
        table.add_row(*cells, style="bold" if number == num_hosts else "")
    return table


def _shortened(pattern: str) -> str:
    """``DMMMM`` -> ``D M×4``."""
    runs: list[tuple[str, int]] = []
    for letter in pattern:
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    if len(runs) > 12:
        return pattern
    return " ".join(letter if number == 1 else f"{letter}×{number}" for letter, number in runs)


def _count(number: int | None) -> str:
    if not number:
        return "not known"
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
