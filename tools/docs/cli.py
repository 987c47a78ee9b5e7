"""The page of all commands, made of the command line itself. Called by `hooks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import typer

from ray_moe.cli.commands import commands
from ray_moe.cli.target import Target

HEAD = """# Command line

Every command of `ray-moe` with its arguments and options, made of the command line itself. `ray-moe COMMAND --help`
says the same. `--debug` shows where an error came from.
"""
ASKS = "Asks a service: takes [the options that say which](#which-service)."
SHARED = """## Which service

Commands that ask a running service take these options, too.
"""
SILENT = {"help", "debug"}


def page() -> str:
    """Markdown."""
    group = typer.main.get_command(commands)
    parts = [HEAD]
    shared: dict[str, str] = {}
    for name, command in _commands(group, "ray-moe"):
        own = _rows(command)
        target = {each.name for each in fields(Target)}
        asks = target <= own.keys()
        if asks:
            shared = {key: own.pop(key) for key in list(own) if key in target}
        arguments = [each.name for each in command.params if each.param_type_name == "argument"]
        parts += [f"## {name}", (command.help or "").strip()]
        parts += [f"```text\n{' '.join([name, *(argument.upper() for argument in arguments), '[OPTIONS]'])}\n```"]
        parts += [ASKS] if asks else []
        parts += ["\n".join(own.values())] if own else []
    return "\n\n".join([*parts, SHARED.strip(), "\n".join(shared.values())]) + "\n"


def _commands(group: Any, above: str) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{above} {name}")
        else:
            yield f"{above} {name}", command


def _rows(command: Any) -> dict[str, str]:
    """Each argument and option as `--help` shows it, as an item of a list."""
    context = command.context_class(command, info_name=command.name)
    rows = {}
    for parameter in command.params:
        if parameter.name not in SILENT:
            written, text = parameter.get_help_record(context)
            rows[parameter.name] = f"- `{written.strip()}`: {' '.join(text.split())}"
    return rows
