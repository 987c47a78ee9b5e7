"""`ray-moe canary`: another version of one expert, tried out beside the current one."""

from __future__ import annotations

from typing import Annotated

import typer

from ray_moe.cli.target import Target, asks_a_service
from ray_moe.cli.terminal import Debug, told

canary = typer.Typer(
    help="Try out another version of one expert of a running service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Timeout = Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="Give up after this.")]


@canary.command()
@asks_a_service
def start(  # noqa: PLR0913  (as many options as there are)
    to: Target,
    model: Annotated[str, typer.Argument(help="Checkpoint that has the expert: a directory, or a name on the hub.")],
    layer: Annotated[str, typer.Option(help="Path of the layer's experts, or its number among the MoE layers.")],
    expert: Annotated[int, typer.Option(help="Its number.")],
    share: Annotated[float, typer.Option(help="Of the requests (traffic), or of the expert's rows (shadow).")] = 0.1,
    mode: Annotated[
        str, typer.Option(help="shadow: only compare its rows; traffic: also answer requests by it.")
    ] = "shadow",
    max_drift: Annotated[float, typer.Option(help="It ends by itself when its rows are further away.")] = 0.1,
    timeout: Timeout = 600.0,
    debug: Debug = False,
) -> None:
    """Begin to try it out; `ray-moe status` shows how far it is from the current one."""
    with told(debug):
        from ray_moe.cli.versions import run_canary

        where = int(layer) if layer.isdecimal() else layer
        run_canary(to, where, expert, model, share=share, mode=mode, max_drift=max_drift, timeout_s=timeout)


@canary.command()
@asks_a_service
def promote(to: Target, timeout: Timeout = 60.0, debug: Debug = False) -> None:
    """Make it the current version."""
    with told(debug):
        from ray_moe.cli.versions import run_end_canary

        run_end_canary(to, promote=True, timeout_s=timeout)


@canary.command()
@asks_a_service
def cancel(to: Target, timeout: Timeout = 60.0, debug: Debug = False) -> None:
    """Let it go."""
    with told(debug):
        from ray_moe.cli.versions import run_end_canary

        run_end_canary(to, promote=False, timeout_s=timeout)
