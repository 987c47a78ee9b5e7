"""`ray-moe train`: run a training to its last step, with a progress bar and a line for whatever happens."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console

from ray_moe.actors import logs
from ray_moe.cli.output import JsonLines
from ray_moe.cli.terminal import Interrupts, ProgressView
from ray_moe.config import Config
from ray_moe.service.composition import ServiceProgress
from ray_moe.service.training import train
from ray_moe.training.loop import Progress


def run(config: Config, interrupts: Interrupts, service: str, json_file: Path | None = None) -> None:
    """Train until the last step or an interrupt; everything that was started is ended then.

    Args: json_file: gets a line for each report, at once.

    Raises: what `service.training.train` raises; KeyboardInterrupt.
    """
    logs.configure(config.logs, "driver")
    console = Console(highlight=False)
    view = ProgressView(Console(stderr=True))
    installed = False
    lines = None if json_file is None else JsonLines(json_file)

    def start(progress: ServiceProgress) -> None:
        interrupts.install()  # again after `ray.init`, which puts handlers of its own in place
        view.update(progress.stage, progress.done_bytes, progress.total_bytes, progress.detail)

    def step(progress: Progress) -> None:
        nonlocal installed
        if not installed:
            interrupts.install()
            installed = True
        if lines is not None:
            lines.write(record(progress))
        if progress.event:
            console.print(progress.event, markup=False, soft_wrap=True)
        view.update("training", progress.step, progress.steps, line(progress))

    try:
        with view:
            last = train(config, step, start, service_name=service)
    except SystemExit as error:  # Ray's own SIGTERM handler, in place during `ray.init`
        raise KeyboardInterrupt from error
    finally:
        if lines is not None:
            lines.close()
    console.print(f"trained {config.model} to step {last.step}: {line(last)}", markup=False, soft_wrap=True)


def record(progress: Progress) -> dict[str, object]:
    """What is known of a progress, for `ray-moe report`."""
    said = {"event": progress.event, "failure": "" if progress.failure is None else progress.failure.message}
    numbers = {**progress.metrics(), "step": progress.step, "steps": progress.steps}
    return {**numbers, **{name: text for name, text in said.items() if text}}


def line(progress: Progress) -> str:
    """What is worth a line of a progress: step, loss, speed, balance."""
    parts = [f"step {progress.step} of {progress.steps}"]
    for name, value, form in (
        ("loss", progress.loss, "{:.4f}"),
        ("validation", progress.validation_loss, "{:.4f}"),
        ("norm", progress.grad_norm, "{:.3g}"),
        ("tokens/s", progress.tokens_per_s, "{:,.0f}"),
        ("balance", progress.balancedness, "{:.2f}"),
    ):
        if math.isfinite(value):
            parts.append(f"{name} {form.format(value)}")
    if progress.dropped_tokens:
        parts.append(f"dropped {progress.dropped_tokens:,}")
    return ", ".join(parts)
