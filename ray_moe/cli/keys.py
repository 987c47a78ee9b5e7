"""`ray-moe keys`: who may use a service. Changes the file of API keys, which services follow within two seconds."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_moe.cli.terminal import Debug, told
from ray_moe.errors import InvalidConfig, NotFound
from ray_moe.service.keys import ROLES, ApiKey, check_name, check_roles, digest_of, editing, new_key, read_keys
from ray_moe.service.limits import Limits

keys = typer.Typer(
    help="API keys of a service (server.keys_file): make, list, revoke.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they show local variables, a key among them
)

KeysFile = Annotated[Path, typer.Option("--file", metavar="FILE", help="The file of keys, server.keys_file.")]

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_COLUMNS = ("id", "name", "roles", "made", "expires (UTC)", "limits")


@keys.command()
def create(
    file: KeysFile,
    name: Annotated[str, typer.Option(help="Whose key it is; several keys may have the same name.")],
    role: Annotated[list[str], typer.Option(help=f"What it is for: {', '.join(ROLES)}; may be given several times.")],
    expires_in: Annotated[str | None, typer.Option(metavar="TIME", help="Such as 30d; units s, m, h, d, w.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests in a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Most tokens, in and out, in a minute.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Most requests at a time.")] = None,
    debug: Debug = False,
) -> None:
    """Make a key and print it, this once. The file, made if it is not there, keeps only its SHA-256."""
    with told(debug):
        now = int(time.time())
        secret = new_key()
        key = ApiKey(
            check_name(name, "--name"),
            digest_of(secret),
            check_roles(role, "--role"),
            now,
            None if expires_in is None else now + parse_duration(expires_in),
            Limits(requests_per_minute, tokens_per_minute, max_concurrent),
        )
        with editing(file) as entries:
            entries.append(key)
        until = "for ever" if key.expires_at is None else f"until {_date(key.expires_at)} UTC"
        _say(f"key {key.key_id} of {key.name}, for {_roles(key)}, valid {until}; it is not shown again:")
        typer.echo(secret)


@keys.command("list")
def list_keys(
    file: KeysFile,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    debug: Debug = False,
) -> None:
    """Show all keys but for the keys themselves."""
    with told(debug):
        entries = read_keys(file)
        now = int(time.time())
        if as_json:
            sys.stdout.write(json.dumps([_as_json(key, now) for key in entries], indent=2) + "\n")
            return
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for column in _COLUMNS:
            table.add_column(column, no_wrap=column == "id")
        for key in entries:
            expires = "never" if key.expires_at is None else _date(key.expires_at)
            if _is_expired(key, now):
                expires += ", is over"
            made = _date(key.created_at) if key.created_at else ""
            table.add_row(key.key_id, Text(key.name), _roles(key), made, expires, _limits(key.limits))
        Console().print(table if entries else "no keys: nobody can use a service with this file")


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The id of a key, or a name, whose keys are all revoked.")],
    file: KeysFile,
    debug: Debug = False,
) -> None:
    """Take a key out of the file: services refuse it within two seconds. Requests under way go on."""
    with told(debug), editing(file) as entries:
        gone = [entry for entry in entries if key in (entry.key_id, entry.name)]
        if not gone:
            names = ", ".join(sorted({entry.name for entry in entries})) or "none"
            raise NotFound(f"there is no key {key!r} in {file}; expected an id or one of the names: {names}")
        entries[:] = [entry for entry in entries if entry not in gone]
    _say("revoked " + ", ".join(f"{entry.key_id} of {entry.name}" for entry in gone))


def parse_duration(text: str) -> int:
    """`30d` -> seconds.

    Raises: `InvalidConfig`.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})([smhdw])", text)
    if match is None:
        raise InvalidConfig(f"--expires-in is {text!r}; expected a whole number and s, m, h, d or w, such as 30d")
    return int(match[1]) * _UNIT_S[match[2]]


def _as_json(key: ApiKey, now: int) -> dict[str, object]:
    return {
        "id": key.key_id,
        "name": key.name,
        "roles": [role for role in ROLES if role in key.roles],
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "expired": _is_expired(key, now),
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
        "max_concurrent": key.limits.max_concurrent,
    }


def _roles(key: ApiKey) -> str:
    return ", ".join(role for role in ROLES if role in key.roles)


def _is_expired(key: ApiKey, now: int) -> bool:
    return key.expires_at is not None and key.expires_at <= now


def _limits(limits: Limits) -> str:
    named = (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.max_concurrent, "at a time"),
    )
    return ", ".join(f"{limit:,} {name}" for limit, name in named if limit is not None)


def _date(unix_time: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix_time))


def _say(text: str) -> None:
    """Beside the key on standard output, which is for pipes."""
    typer.echo(text, err=True)
