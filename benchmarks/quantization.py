"""Experts in 8 bits: what they take, what they cost in quality and in time, and training them in 8 bits.

`python benchmarks/quantization.py [--quick]`. The network of `examples/moe_layer_lm.py` is trained on the sources of
Python's standard library; then its experts are held in each of the forms of `experts.quantization`. The same network is
trained with its experts in 8 bits, with and without what rounding takes away. Only the table of times depends on the
machine. Results go to `benchmarks/results/quantization.{json,md}`.

Shape legend: D model width, F expert width, n rows.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import report
from examples.moe_layer_lm import ByteLM, loss_of
from ray_moe.models.byte_level import END
from ray_moe.ops.dispatch import combine
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.layer import moe_layers
from ray_moe.ops.losses import auxiliary_loss
from ray_moe.ops.optimizers import OptimizerSettings
from ray_moe.ops.quantization import Quantization, QuantizedExperts, make_group
from ray_moe.ops.quantized_training import Compensation, train_in_8_bits
from ray_moe.ops.routed_experts import Experts
from ray_moe.ops.schedules import ScheduleSettings, factor
from ray_moe.training.data import BatchRequest, Data, open_data

WIDTH, LAYERS, EXPERTS, WINDOW, BATCH = 64, 2, 8, 128, 8
STEPS, SEEDS = 300, (0, 1)
LR, TUNE_LR = 4e-3, 1e-4
"""Peak learning rates: from fresh weights, and when what was trained in float32 is trained on."""
SHAPES = ((256, 512), (1024, 2816))
"""D and F of the expert that is timed: of a small model, and of one that is wider than the caches."""
ROWS = (1, 16, 256)

KINDS: tuple[Quantization, ...] = get_args(Quantization)
TRAINED: tuple[Compensation | str, ...] = ("float32", *get_args(Compensation))


def network(seed: int) -> Any:
    torch.manual_seed(seed)
    return ByteLM(WIDTH, LAYERS, EXPERTS, WINDOW)


def train(
    model: Any, data: Data, num_steps: int, seed: int, compensation: str = "float32", rate: float = LR, begin: int = 0
) -> Any:
    """Train in place; the experts in 8 bits if told so. Returns what holds them then, or None."""
    schedule = ScheduleSettings("cosine", warmup_steps=min(20, num_steps), total_steps=num_steps)
    settings = OptimizerSettings(lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    experts = None if compensation == "float32" else train_in_8_bits(model, settings, compensation)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(num_steps):
        (loss_of(model, data, BatchRequest(begin + step, BATCH, WINDOW, seed=seed)) + auxiliary_loss(model)).backward()
        mine = [p.grad for p in model.parameters() if p.grad is not None]
        norm = (sum(float(g.square().sum()) for g in mine) + (experts.grad_norm() ** 2 if experts else 0)) ** 0.5
        scale, lr = min(1.0, 1 / (norm + 1e-6)), rate * factor(schedule, step + 1)
        for grad in mine:
            grad.mul_(scale)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if experts is not None:
            experts.step(lr, grads_scale=scale)
    return experts


@torch.no_grad()
def unseen(model: Any, data: Data, num_batches: int) -> float:
    """Nats per byte of files that were kept apart."""
    requests = [BatchRequest(step, 4 * BATCH, WINDOW, split="validation") for step in range(num_batches)]
    return statistics.mean(float(loss_of(model, data, request)) for request in requests)


class Served:
    """Answers for a layer's experts from a group, as a host does."""

    def __init__(self, groups: Mapping[str, Any]) -> None:
        self.groups = groups

    def __call__(self, path: str, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        slots, top_k = index.reshape(-1), index.shape[-1]
        order, counts = slots.argsort(stable=True), slots.bincount(minlength=EXPERTS).tolist()
        touched = [expert for expert, count in enumerate(counts) if count]
        out = self.groups[path].run(hidden[order // top_k], touched, [counts[expert] for expert in touched])
        return combine(torch.empty_like(out).index_copy(0, order, out), weight)


def bytes_of(group: Any) -> int:
    if isinstance(group, QuantizedExperts):
        return group.nbytes
    return sum(p.nbytes for p in group.module.parameters())


@torch.no_grad()
def held(model: Any, data: Data, kind: Quantization, num_batches: int) -> dict[str, float]:
    """Bytes of the experts, the loss, and how far logits are from those of the weights as they are."""
    small = copy.deepcopy(model)
    groups = {path: make_group(copy.deepcopy(layer.experts), kind) for path, layer in moe_layers(model).items()}
    for path, layer in moe_layers(small).items():
        layer.experts.answer_with(Served(groups), path)
    tokens = data.batch(BatchRequest(0, 4 * BATCH, WINDOW, split="validation"))["input_ids"]
    wanted, given = model(tokens), small(tokens)
    return {
        "bytes": sum(bytes_of(group) for group in groups.values()),
        "loss": unseen(small, data, num_batches),
        "error": float((given - wanted).norm() / wanted.norm()),
        "agree": float((given.argmax(-1) == wanted.argmax(-1)).float().mean()),
    }


@torch.no_grad()
def timed(width: int, size: int, rounds: int, block_s: float) -> dict[str, dict[str, list[float]]]:
    """Median seconds of each round, by number of rows and form; of one expert."""
    torch.manual_seed(0)
    groups = {kind: make_group(Experts(width, size, 1).requires_grad_(False), kind) for kind in KINDS}
    whole = Experts(width, size, 1).requires_grad_(False).bfloat16()
    named: dict[str, tuple[Any, torch.dtype]] = {kind: (group, torch.float32) for kind, group in groups.items()}
    named["none, bfloat16"] = (StackedExperts(whole), torch.bfloat16)
    times = {}
    for num_rows in ROWS:
        rows = torch.randn(num_rows, width)
        contestants = [
            report.Contestant(name, partial(group.run, rows.to(dtype), [0], [num_rows]))
            for name, (group, dtype) in named.items()
        ]
        times[str(num_rows)] = report.interleave(contestants, rounds, block_s)
    return times


def main(argv: list[str] | None = None) -> None:
    given = report.options(__doc__).parse_args(argv)
    quick: bool = given.quick
    torch.set_num_threads(1)
    num_steps, seeds, num_batches = (6, SEEDS[:1], 1) if quick else (STEPS, SEEDS, 8)
    data = open_data("stdlib", vocab_size=END + 1)
    forms: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    trained: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINED}
    tuned: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINED}
    for seed in seeds:
        first = network(seed)
        train(first, data, num_steps, seed)
        for kind in KINDS:
            forms[kind].append(held(copy.deepcopy(first).eval(), data, kind, num_batches))
        for name in TRAINED:
            for results, start, rate in ((trained, network(seed), LR), (tuned, copy.deepcopy(first), TUNE_LR)):
                whole = sum(p.nbytes for layer in moe_layers(start).values() for p in layer.experts.parameters())
                number, begin = (num_steps, 0) if results is trained else (num_steps // 2, num_steps)
                experts = train(start, data, number, seed, name, rate, begin)
                loss = unseen(start.eval(), data, num_batches)
                results[name].append({"loss": loss, "bytes": experts.nbytes if experts else whole})
                print(name, results[name][-1], flush=True)
    rounds, block_s = (1, 0.01) if quick else (5, 0.1)
    times = {f"{width} and {size}": timed(width, size, rounds, block_s) for width, size in SHAPES}
    settings = {"width": WIDTH, "layers": LAYERS, "experts": EXPERTS, "tune_lr": TUNE_LR}
    measured = {"steps": num_steps, "forms": forms, "times": times, "training": trained, "tuning": tuned}
    report.finish("quantization", {"settings": settings, **measured}, given)


if __name__ == "__main__":
    main()
