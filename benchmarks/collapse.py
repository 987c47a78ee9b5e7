"""A gate that has collapsed onto two experts, and what becomes of it with each way to balance.

`python benchmarks/collapse.py [--quick]`. Trains the network of `examples/moe_layer_lm.py` on the sources of Python's
standard library, once for each way and seed, from gates that were made to send all tokens to two of their experts. None
of the figures depends on timing. Results go to `benchmarks/results/collapse.{json,md}`.

Shape legend: B windows of a batch, S tokens of a window, D model width, E experts.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks import report
from examples.moe_layer_lm import ByteLM, loss_of
from ray_moe import MoELayer
from ray_moe.models.byte_level import END
from ray_moe.ops.balancing import LossFreeBalancing
from ray_moe.ops.losses import auxiliary_loss
from ray_moe.ops.revival import RevivalSettings
from ray_moe.ops.utilization import CollapseSettings, Report, UtilizationMonitor
from ray_moe.training.data import BatchRequest, Data, open_data

WIDTH, LAYERS, EXPERTS, TOP_K, WINDOW, BATCH = 64, 2, 8, 2, 128, 8
STEPS, SEEDS = 400, (0, 1, 2)
PULL = 3.0
"""Length of what is added to the gates' rows of two experts, along the mean of the hidden states: all go there then."""

REVIVE_EVERY, REVIVE_UNTIL = 20, 0.8
"""Steps between two looks, and the part of the steps after which experts are left alone."""

TENTH, QUARTER = CollapseSettings(decay=0.9), CollapseSettings(decay=0.9, underused=0.25)
"""Under-used is below a tenth of the fair share, the default, or below a quarter, by which experts are revived."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to balance: options of the layers, and what is done after each step."""

    layer: Mapping[str, Any] = field(default_factory=dict)
    bias_rate: float = 0.0
    revives: bool = False


BIAS = "loss-free bias, sigmoid gate"
WAYS = {
    "nothing": Way(),
    "auxiliary loss": Way({"auxiliary": {"load_balancing": 0.01}}),
    "usage loss": Way({"auxiliary": {"usage": 0.01}}),
    "nothing, sigmoid gate": Way({"gate": "sigmoid"}),
    BIAS: Way({"gate": "sigmoid"}, bias_rate=0.02),
    "revival": Way(revives=True),
}


def collapsed_model(data: Data, seed: int, way: Way) -> ByteLM:
    """A network whose gates send all to experts 0 and 1."""
    torch.manual_seed(seed)
    model = ByteLM(WIDTH, LAYERS, EXPERTS, WINDOW)
    for block in model.blocks:
        block.moe = MoELayer(WIDTH, 2 * WIDTH, EXPERTS, TOP_K, **way.layer)

    @torch.no_grad()
    def pull(layer: Any, inputs: tuple[torch.Tensor]) -> None:
        mean = inputs[0].flatten(0, -2).mean(0)
        layer.gate.weight[:2] += PULL * mean / mean.norm()

    blocks: list[Any] = list(model.blocks)
    hooks = [block.moe.register_forward_pre_hook(pull) for block in blocks]  # layer by layer, as they are reached
    with torch.no_grad():
        loss_of(model, data, BatchRequest(0, BATCH, WINDOW, seed=seed))
    for hook in hooks:
        hook.remove()
    return model


def run(data: Data, seed: int, way: Way, num_steps: int) -> dict[str, float]:
    """One training: how many experts are under-used at its beginning and end, and its loss at the end."""
    model = collapsed_model(data, seed, way)
    begin = unseen(model, data, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    monitor = UtilizationMonitor(model, QUARTER)
    balancing = LossFreeBalancing(model, way.bias_rate) if way.bias_rate else None
    revived = 0
    for step in range(1, num_steps + 1):
        loss = loss_of(model, data, BatchRequest(step - 1, BATCH, WINDOW, seed=seed))
        (loss + auxiliary_loss(model) if "auxiliary" in way.layer else loss).backward()
        monitor.observe()
        if balancing is not None:
            balancing.observe()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if balancing is not None:
            balancing.step()
        if way.revives and step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * num_steps:
            revived += sum(map(len, monitor.revive(optimizer, RevivalSettings()).values()))
    end = unseen(model, data, seed)
    return {"before": begin["tenth"], **end, "revived": revived}


@torch.no_grad()
def unseen(model: ByteLM, data: Data, seed: int, num_batches: int = 16) -> dict[str, float]:
    """Of files that were kept apart: the loss, the parts of the experts that are under-used, and the entropy."""
    tenth, quarter = UtilizationMonitor(model, TENTH), UtilizationMonitor(model, QUARTER)
    losses = []
    for number in range(num_batches):
        request = BatchRequest(number, BATCH, WINDOW, seed=seed, split="validation")
        losses.append(float(loss_of(model, data, request)))
        tenth.observe()
        quarter.observe()
    said: Report = tenth.report()
    return {
        "tenth": said.underused_share,
        "quarter": quarter.report().underused_share,
        "entropy": statistics.mean(layer.entropy for layer in said.layers.values()),
        "loss": statistics.mean(losses),
    }


def main(argv: list[str] | None = None) -> None:
    given = report.options(__doc__).parse_args(argv)
    quick: bool = given.quick
    torch.set_num_threads(1)
    num_steps, seeds = (10, SEEDS[:1]) if quick else (STEPS, SEEDS)
    data = open_data("stdlib", vocab_size=END + 1)
    results: dict[str, list[dict[str, float]]] = {}
    for name, way in WAYS.items():
        results[name] = [run(data, seed, way, num_steps) for seed in seeds]
        print(name, results[name], flush=True)
    settings = {
        "layers": LAYERS,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "width": WIDTH,
        "batch": BATCH,
        "window": WINDOW,
        "bias_rate": WAYS[BIAS].bias_rate,
        "revive_every": REVIVE_EVERY,
        "revive_until": REVIVE_UNTIL,
    }
    report.finish("collapse", {"settings": settings, "steps": num_steps, "seeds": seeds, "runs": results}, given)


if __name__ == "__main__":
    main()
