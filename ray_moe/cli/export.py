"""`ray-moe export`: a checkpoint of training becomes a folder that `transformers` and `ray-moe serve` load."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from ray_moe.cli.terminal import ProgressView, format_bytes
from ray_moe.errors import InvalidConfig, NotFound
from ray_moe.models.export import check_target
from ray_moe.models.huggingface import Checkpoint
from ray_moe.training.export import export_trained, find

DTYPES = ("float32", "bfloat16", "float16")


def run(folder: Path, out: Path, model: str | None, dtype: str | None, force: bool) -> None:
    """Write the checkpoint of training at `folder` to `out`, showing how far it is."""
    if dtype is not None and dtype not in DTYPES:
        raise InvalidConfig(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    started_s = time.monotonic()
    with ProgressView(Console(stderr=True)) as view:
        view.update("checking", 0, 0, str(folder))
        trained = find(folder)
        source = _source(model, trained.manifest.stamp.model)
        check_target(source, out, force)
        trained.check_hashes()
        total_bytes = 0

        def show(done: int, total: int) -> None:
            nonlocal total_bytes
            total_bytes = total
            view.update("writing", done, total, f"{format_bytes(done)} of {format_bytes(total)}")

        written = export_trained(
            trained,
            source,
            out,
            dtype=None if dtype is None else getattr(torch, dtype),
            overwrite=force,
            on_progress=show,
        )
    text = f"{written}: step {trained.manifest.stamp.step} of {source.name}, {format_bytes(total_bytes)}"
    Console().print(f"{text} in {time.monotonic() - started_s:.1f} s", soft_wrap=True, highlight=False)


def _source(model: str | None, beginning: str) -> Checkpoint:
    """What the training began with."""
    try:
        return Checkpoint.open(model or beginning)
    except NotFound as error:
        if model is not None:
            raise
        raise NotFound(f"the training began with {beginning}: {error.message} Say where it is with --model.") from error
