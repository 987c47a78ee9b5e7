"""`ray-moe status`: a running service as tables, or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.console import Console

from ray_moe.cli import tables
from ray_moe.cli.target import Target
from ray_moe.client.sync import Client
from ray_moe.errors import Unavailable
from ray_moe.types import RoutingTable, ServiceStatus


def run(to: Target, as_json: bool, timeout_s: float) -> None:
    """Ask a service and print what it says."""
    with Client(to.server, timeout_s, **to.access) as client:
        status = client.status()
        try:
            table = client.placement()
        except Unavailable:  # it is starting: there is none yet
            table = None
    if as_json:
        sys.stdout.write(to_json(status, table) + "\n")
        return
    console = Console()
    for part in tables.service(status, table, console.width):
        console.print(part)


def to_json(status: ServiceStatus, table: RoutingTable | None) -> str:
    """Everything, under the names of `ray_moe.types`."""
    placement = None
    if table is not None:
        placement = {
            "epoch": table.epoch,
            "hosts_of": {layer: [list(hosts) for hosts in experts] for layer, experts in _hosts_of(table)},
            "addresses": {host: asdict(address) for host, address in table.addresses.items()},
        }
    return json.dumps({**asdict(status), "placement": placement}, indent=2)


def _hosts_of(table: RoutingTable) -> list[tuple[str, tuple[tuple[str, ...], ...]]]:
    return list(table.placement.hosts_of.items())
