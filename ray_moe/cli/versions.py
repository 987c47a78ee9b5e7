"""`ray-moe publish`, `rollback` and `canary`: versions of the weights of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ray_moe.cli import tables
from ray_moe.cli.target import Target
from ray_moe.client.sync import Client
from ray_moe.types import VersionStatus


def run_publish(to: Target, model: str, timeout_s: float) -> None:
    """Make `model` the current version."""
    with Client(to.server, timeout_s, **to.access) as client:
        _tell(client, client.publish(_named(model)))


def run_rollback(to: Target, version: int | None, timeout_s: float) -> None:
    """Make an older version current."""
    with Client(to.server, timeout_s, **to.access) as client:
        _tell(client, client.rollback(version))


def run_canary(to: Target, layer: str | int, expert: int, model: str, *, timeout_s: float, **how: Any) -> None:
    """Try out an expert of `model`."""
    with Client(to.server, timeout_s, **to.access) as client:
        tried = client.canary(layer, expert, _named(model), **how)
        console = Console()
        console.print(f"version {tried.number} is tried out: {tried.model}", soft_wrap=True)
        console.print(tables.versions(client.versions()))


def run_end_canary(to: Target, *, promote: bool, timeout_s: float) -> None:
    """Make what is tried out current, or let it go."""
    with Client(to.server, timeout_s, **to.access) as client:
        _tell(client, client.end_canary(promote=promote))


def _named(model: str) -> str:
    """A directory by its whole path: the service has another working directory."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _tell(client: Client, now: VersionStatus) -> None:
    console = Console()
    console.print(f"version {now.number} is current: {now.model}", soft_wrap=True)
    console.print(tables.versions(client.versions()))
