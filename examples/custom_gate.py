"""A gate of one's own in three places: a layer, a model of `transformers`, and, with --train, a run on expert actors.

`python examples/custom_gate.py [--train]`. The gate goes by the angle between a token and the experts, as that of X-MoE
(arXiv:2204.09179), so that no expert is chosen for the length of its row. In a configuration it is named as
`module:Class`; that module has to be found on every node.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import ray_moe
from ray_moe.models.byte_level import ByteModel, new_model, write
from ray_moe.models.gates import replace_gates, routings
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.gates.registry import GATES
from ray_moe.ops.losses import auxiliary_loss


class CosineGate(nn.Module):
    """The K experts at the smallest angles, weighted by a softmax of the cosines over a temperature that is learned."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.top_k = top_k
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """First weights, the same from the same generator; who makes the gate by its name asks for them."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5, generator=generator)
        nn.init.constant_(self.log_temperature, math.log(0.1))

    def forward(self, hidden: torch.Tensor) -> Routing:
        towards, rows = functional.normalize(hidden.float(), dim=-1), functional.normalize(self.weight.float(), dim=-1)
        logits = towards @ rows.T / self.log_temperature.float().exp()  # [T, E], never in half precision
        chosen, index = logits.topk(self.top_k, dim=-1)
        return Routing(index, chosen.softmax(-1), logits)


@dataclass(frozen=True, slots=True)
class CosineSettings:
    """What makes it."""

    top_k: int = 2

    def build(self, hidden_size: int, num_experts: int) -> CosineGate:
        return CosineGate(hidden_size, num_experts, self.top_k)


def learn(gate: str, steps: int = 150) -> float:
    """Loss of one layer on four functions of [64, 32], each of its own region, which only experts can tell apart."""
    torch.manual_seed(0)
    layer = ray_moe.MoELayer(32, 64, num_experts=4, gate=gate, auxiliary={"load_balancing": 0.01}, seed=0)
    regions, functions = 2 * torch.randn(4, 32), torch.randn(4, 32, 32) / 6
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(steps):
        region = torch.randint(4, (64,))
        x = regions[region] + torch.randn(64, 32) / 2
        loss = functional.mse_loss(layer(x), torch.einsum("td,tde->te", x, functions[region]))
        (loss + auxiliary_loss(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="also on expert actors, by the configuration train.gate")
    arguments = parser.parse_args()
    GATES["cosine"] = CosineSettings  # from here on a name like the others, in this process
    print(f"a layer: mean squared error {learn('topk'):.3f} with topk, {learn('cosine'):.3f} with cosine")

    model = new_model(ByteModel(hidden_size=64, num_layers=2, expert_width=64))
    paths = replace_gates(model, "cosine")
    tokens = torch.tensor([list(b"def main():")])
    print(f"a model: loss {model(tokens, labels=tokens).loss:.2f} with the gate at {', '.join(paths)}")
    print(f"  experts of the last token: {[routing.index[-1].tolist() for routing in routings(model).values()]}")
    if arguments.train:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), new_model(ByteModel(hidden_size=64, num_layers=2, expert_width=64)))
            train(folder)


def train(model: str) -> None:
    few = {"num_cpus": 0.1}
    settings = {"data": "stdlib", "steps": 20, "report_every": 5, "sequence_length": 96, "parallel": {"expert": 2}}
    settings |= {"gate": "custom_gate:CosineSettings", "optimizer": {"lr": 4e-3}, **few}
    config = ray_moe.Config.model_validate({"model": model, "experts": few, "router": few, "train": settings})
    ray_moe.train(config, lambda told: print(told.event or f"  step {told.step}: loss {told.loss:.3f}", flush=True))


if __name__ == "__main__":
    main()
