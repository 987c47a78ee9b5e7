"""`ray-moe advise`: how to run a model on these machines for this traffic, each number with its rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from ray_moe.cli.inspect import folder_of, print_json
from ray_moe.cli.tables import plain_table
from ray_moe.config_types import BYTE_UNITS, parse_bytes
from ray_moe.errors import InvalidConfig
from ray_moe.models.inspect import inspect
from ray_moe.policy.advice import Advice, Device, Hardware, Traffic, explain
from ray_moe.policy.advise import advise
from ray_moe.policy.anatomy import KIND_NAMES
from ray_moe.policy.deployment import suggest


def run(
    model: str,
    hardware: Mapping[str, Any],
    traffic: Traffic,
    top_k: float | None,
    as_json: bool,
) -> None:
    """Look at `model`, and advise."""
    machines = _hardware(hardware)
    found = inspect(model, measure=False)
    advice = advise(found.anatomy, machines, traffic, top_k)
    rules = tuple(explain(advice, found.anatomy, machines, traffic))
    config = suggest(folder_of(found.name), found.anatomy, advice.num_actors, **_settings(advice, machines))
    if as_json:
        print_json(
            asdict(advice)
            | {"model": found.name, "kind": found.kind, "rules": [asdict(rule) for rule in rules], "deployment": config}
        )
        return
    console = Console()
    console.print(Text.assemble((found.name, "bold"), f" ({found.family}): {KIND_NAMES[found.kind]}"), soft_wrap=True)
    for text in advice.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)
    table = plain_table("advice")
    for name in ("what", "value", "rule"):
        table.add_column(name)
    for rule in rules:
        table.add_row(rule.name, Text(rule.value, "bold"), Text(rule.why))
    console.print(table)
    console.print("\n# ray-moe serve --config FILE", style="bold")
    console.print(config, markup=False, highlight=False, soft_wrap=True)


def _hardware(given: Mapping[str, Any]) -> Hardware:
    """Sizes and rates given as text become numbers."""
    if given["device"] not in get_args(Device):
        raise InvalidConfig(f"--device is {given['device']!r}; expected one of {', '.join(get_args(Device))}")
    sizes = {name: _bytes(name, given[name]) for name in ("host_bytes", "bandwidth")}
    return Hardware(**{**given, **sizes})


def _bytes(name: str, text: str) -> int:
    flag = {"host_bytes": "--memory", "bandwidth": "--bandwidth"}[name]
    try:
        return int(str(parse_bytes(text)))
    except ValueError as error:
        units = ", ".join(BYTE_UNITS)
        raise InvalidConfig(f"{flag} is {text!r}; expected a size such as 16GiB or 1GB (units: {units})") from error


def _settings(advice: Advice, machines: Hardware) -> dict[str, dict[str, object]]:
    experts: dict[str, object] = {"spare_slots": (advice.spare_slots, f"balancedness {advice.balancedness:.2f}")}
    router: dict[str, object] = {
        "kv_cache_bytes": (f"{-(-advice.kv_cache_bytes // 2**20)}MiB", "requests in flight x their length"),
        "lifeboat_bytes": (f"{advice.lifeboat_bytes // 2**20}MiB", "what is left of the fullest host, 2 GiB at most"),
    }
    if machines.device == "gpu":
        why = "the router shares the GPU of one of the hosts"
        experts["num_gpus"], router["num_gpus"] = (0.5, why), (0.5, why)
    return {"experts": experts, "router": router}
