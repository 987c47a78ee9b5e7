"""The model of `ray-moe demo`: a small byte-level MoE language model, trained here on Python's own library.

Makes a complete Hugging Face checkpoint (weights, config, tokenizer) from what every machine with Python has: no
download. Kept in a cache and reused. Knows nothing of Ray or of how the model is served; called by `cli/demo.py` and
by the tests.

Shape legend: B windows of a batch, S tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_moe import __version__
from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.models import byte_level
from ray_moe.models.byte_level import END, ByteModel, library_files, new_model
from ray_moe.models.quiet import no_progress_bars

MIN_CORPUS_BYTES = 1_000_000
_RECEIPT = "training.json"


@dataclass(frozen=True, slots=True)
class DemoSettings(ByteModel):
    """Everything that decides what the model becomes; part of the name of its cache."""

    train_seconds: float = 115.0
    window: int = 192
    """S, tokens of a training window."""
    batch: int = 8
    """B, windows of a training step. Small: in two minutes, many steps teach more than smooth ones."""
    learning_rate: float = 4e-3


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """How far the training is."""

    step: int
    elapsed_s: float
    loss: float
    """Nats per byte on this step's batch."""
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A trained checkpoint."""

    path: Path
    reused: bool
    held_out_loss: float
    """Nats per byte on files that the training never saw; 5.55 is knowing nothing."""
    losses: tuple[float, ...]
    """Nats per byte over the training, in (up to) 20 equal parts."""


def cache_root(chosen: Path | None = None) -> Path:
    """Where demo models are kept: `chosen`, or ``$XDG_CACHE_HOME/ray_moe``, or ``~/.cache/ray_moe``."""
    if chosen is not None:
        return chosen
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_moe"


def demo_model(
    settings: DemoSettings | None = None,
    cache_dir: Path | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> DemoModel:
    """The demo's checkpoint: from the cache if it is there whole, else trained now.

    Raises: `InvalidConfig` when the cache cannot be written, `InsufficientResources` when this Python comes without
    the sources of its library.
    """
    settings = settings or DemoSettings()
    versions = [__version__, transformers.__version__, platform.python_version()]
    identity = json.dumps([asdict(settings), versions], sort_keys=True)
    path = cache_root(cache_dir) / f"demo-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    receipt = _read_receipt(path)
    if receipt is not None:
        return DemoModel(path, True, receipt["held_out_loss"], tuple(receipt["losses"]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            model, losses, held_out_loss = train(settings, on_progress)
            unfinished = Path(scratch) / path.name
            byte_level.write(unfinished, model)
            sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
            record = {"held_out_loss": held_out_loss, "losses": losses, "settings": asdict(settings), "files": sizes}
            (unfinished / _RECEIPT).write_text(json.dumps(record, indent=1))
            if _read_receipt(path) is None:  # else another demo was faster
                shutil.rmtree(path, ignore_errors=True)
                unfinished.rename(path)  # at once: nobody ever sees half of it
    except OSError as error:
        raise InvalidConfig(f"cannot keep the demo's model in {path.parent}: {error}; choose a --cache-dir") from error
    return DemoModel(path, False, held_out_loss, tuple(losses))


def _read_receipt(path: Path) -> dict[str, Any] | None:
    """What was written beside a finished checkpoint; None unless every file of it is there in full."""
    try:
        receipt: dict[str, Any] = json.loads((path / _RECEIPT).read_text())
        whole = all((path / name).stat().st_size == size for name, size in receipt["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return receipt if whole else None


def reference_tokens(path: Path, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[int, ...]]:
    """Greedy continuations of each prompt by `transformers` alone, the whole model in this process."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(path)
    continuations = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        continuations.append(tuple(tokens[0, inputs["input_ids"].shape[1] :].tolist()))
    return continuations


# --- Training ------------------------------------------------------------------------------------------------
def corpus(held_out: bool = False) -> torch.Tensor:
    """[bytes] int16: the sources of Python's standard library, in a fixed order; every 20th file is held out."""
    chosen = [file for number, file in enumerate(library_files()) if (number % 20 == 0) == held_out]
    pieces = [np.append(np.frombuffer(file.read_bytes(), np.uint8).astype(np.int16), np.int16(END)) for file in chosen]
    if not held_out and sum(map(len, pieces)) < MIN_CORPUS_BYTES:
        raise InsufficientResources(
            f"the demo learns from Python's own library, but {sysconfig.get_path('stdlib')} has "
            f"{sum(map(len, pieces))} bytes of sources and {MIN_CORPUS_BYTES} are needed; use a Python that comes with "
            "them"
        )
    return torch.from_numpy(np.concatenate(pieces))


def train(
    settings: DemoSettings, on_progress: Callable[[TrainProgress], None] = lambda progress: None
) -> tuple[Any, list[float], float]:
    """Train a model for `settings.train_seconds`; returns it, the loss over time, and the loss on held-out files."""
    generator = torch.Generator().manual_seed(settings.seed)
    data = corpus()
    model = new_model(settings).train()
    model.set_experts_implementation("eager")  # trains twice as fast as grouped_mm at this size on CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    started = time.perf_counter()
    elapsed_s = 0.0
    while elapsed_s < settings.train_seconds:
        _set_learning_rate(optimizer, settings, len(losses), elapsed_s)
        losses.append(_step(model, optimizer, _windows(data, settings.batch, settings.window, generator)))
        elapsed_s = time.perf_counter() - started
        num_tokens = len(losses) * settings.batch * settings.window
        on_progress(TrainProgress(len(losses), elapsed_s, losses[-1], num_tokens / elapsed_s))
    parts = np.array_split(np.array(losses), min(20, len(losses)))
    curve = [round(float(part.mean()), 4) for part in parts]
    model.set_experts_implementation("grouped_mm")
    return model.eval(), curve, _held_out_loss(model, settings)


def _set_learning_rate(optimizer: torch.optim.Optimizer, settings: DemoSettings, step: int, elapsed_s: float) -> None:
    """Twenty steps of warm-up, then a cosine over the time there is, down to a twentieth."""
    cosine = 0.525 + 0.475 * math.cos(math.pi * min(1.0, elapsed_s / settings.train_seconds))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 20) * cosine


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens_BS: torch.Tensor) -> float:
    out = model(input_ids=tokens_BS, labels=tokens_BS, output_router_logits=True)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(out.loss.detach() - model.config.router_aux_loss_coef * out.aux_loss.detach())


def _windows(data: torch.Tensor, batch: int, window: int, generator: torch.Generator) -> torch.Tensor:
    """[B, S] int64: windows of the data, anywhere."""
    starts = torch.randint(0, len(data) - window, (batch, 1), generator=generator)
    return data[starts + torch.arange(window)].long()


@torch.inference_mode()
def _held_out_loss(model: Any, settings: DemoSettings) -> float:
    generator = torch.Generator().manual_seed(settings.seed)
    tokens_BS = _windows(corpus(held_out=True), 32, settings.window, generator)
    return float(model(input_ids=tokens_BS, labels=tokens_BS).loss)
