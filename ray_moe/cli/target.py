"""Which service a command talks to, and as whom: the options that all such commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_SERVER = "127.0.0.1:8476"
MAX_ATTEMPTS = 4
"""Fewer than a program makes: a person soon wants to know."""


@dataclass(frozen=True, slots=True)
class Target:
    """A service, and what a client shows to it and asks of it."""

    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the service is.")] = DEFAULT_SERVER
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Better in the environment variable RAY_MOE_API_KEY: others can see what commands are given.",
        ),
    ] = field(default=None, repr=False)
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, and check the service's certificate.")] = False
    ca_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Roots in PEM to check it against, not the system's.")
    ] = None
    cert_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your own certificate in PEM, for a service that wants one.")
    ] = None
    key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key in PEM, not encrypted.")] = None

    @property
    def access(self) -> dict[str, Any]:
        """What `Client` takes by these names."""
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "server"}
        return {**given, "max_attempts": MAX_ATTEMPTS}


def asks_a_service(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which takes a `Target` as `to`, with the options of one in its place."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "to"]
    shared = list(inspect.signature(Target, eval_str=True).parameters.values())
    names = [parameter.name for parameter in shared]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(to=Target(**{name: given.pop(name) for name in names}), **given)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *shared)]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # where typer looks
    return run
