"""`ray-moe upcycle` and `ray-moe merge`: dense checkpoints become a Mixture-of-Experts checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from ray_moe.cli.terminal import ProgressView, format_bytes
from ray_moe.errors import InvalidConfig
from ray_moe.models.merge import MergeSettings, merge
from ray_moe.models.moe_writing import NewMoE, Parameters
from ray_moe.models.sharded import OnWritten
from ray_moe.models.upcycle import UpcycleSettings, upcycle

DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(name: str | None) -> torch.dtype | None:
    """Raises: `InvalidConfig`: it is none that weights are written in."""
    if name is None:
        return None
    if name not in DTYPES:
        raise InvalidConfig(f"--dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def run(dense: str, out: Path, settings: UpcycleSettings, force: bool) -> None:
    """Write the MoE model of `dense` to `out`, showing how far it is."""
    _made(dense, lambda told: upcycle(dense, out, settings, overwrite=force, on_progress=told))


def run_merge(models: Sequence[str], out: Path, settings: MergeSettings, force: bool) -> None:
    """Write the MoE model of `models` to `out`, showing how far it is."""
    _made(", ".join(models), lambda told: merge(models, out, settings, overwrite=force, on_progress=told))


def prompts_in(files: Sequence[Path]) -> tuple[tuple[str, ...], ...]:
    """The lines of each file that are not blank.

    Raises:
        InvalidConfig: a file cannot be read.
    """
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"prompts cannot be read: {error}. Name a text file with a prompt on each line") from error
    return tuple(tuple(line for line in text.splitlines() if line.strip()) for text in texts)


def _made(source: str, make: Callable[[OnWritten], NewMoE]) -> None:
    started_s = time.monotonic()
    with ProgressView(Console(stderr=True)) as view:
        view.update("checking", 0, 0, source)
        made = make(
            lambda done, all_: view.update("writing", done, all_, f"{format_bytes(done)} of {format_bytes(all_)}")
        )
    console = Console()
    for line in summary(made, time.monotonic() - started_s):
        console.print(line, soft_wrap=True, highlight=False)


def summary(made: NewMoE, elapsed_s: float) -> Sequence[str]:
    """What came out, in lines."""
    plan = made.blueprint
    shared = f" and a shared one of width {plan.dense_width}" if plan.shared else ""
    same = "as the dense model, but for rounding" if made.same_function else "something new: train it, then judge it"
    return (
        f"{made.folder}: {made.model_type}, {format_bytes(made.num_bytes)} in {elapsed_s:.1f} s",
        f"  experts     {plan.num_experts} of width {plan.expert_width}{shared} in {len(plan.layers)} of "
        f"{plan.num_layers} layers, {plan.top_k} for each token",
        f"  parameters  {format_parameters(made.before)} before, {format_parameters(made.after)} after",
        f"  computes    {same}",
    )


def format_parameters(parameters: Parameters) -> str:
    total, active = format_count(parameters.total), format_count(parameters.active)
    return total if parameters.total == parameters.active else f"{total} ({active} active)"


def format_count(number: float) -> str:
    """`46.7 B`, in powers of 1000."""
    for unit in ("", " k", " M", " B"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f} T"
