"""EvoMoE (arXiv:2112.14397) beside a plain MoE, on the sources of Python's standard library, in the same budget.

`python examples/evomoe.py [--steps 400] [--data stdlib]`: one process, no download, about a minute on one core. The
network is that of `examples/moe_layer_lm.py`. EvoMoE trains one expert, makes many of it, and lets a gate go from dense
to sparse. Tokens have many experts while the gate is dense, so the budget is not steps but rows through experts: the
plain MoE, with one expert a token all along, is trained until it has computed as many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from moe_layer_lm import ByteLM, loss_of
from torch import nn

from ray_moe import Methods, MoELayer
from ray_moe.models.byte_level import END
from ray_moe.ops.gates.dense_to_sparse import DenseToSparseSettings
from ray_moe.ops.losses import auxiliary_loss, expert_load
from ray_moe.ops.methods.evomoe import EvoMoE
from ray_moe.training.data import BatchRequest, Data, open_data


class Run:
    """A network and its loop."""

    def __init__(self, arguments: argparse.Namespace, data: Data, gate: Any) -> None:
        torch.manual_seed(0)
        self.arguments, self.data = arguments, data
        width, experts = arguments.width, arguments.experts
        self.model = ByteLM(width, arguments.layers, experts, arguments.window)
        for block in self.model.blocks:
            block.moe = MoELayer(width, 2 * width, experts, gate=gate, auxiliary={"load_balancing": 0.01})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
        self.rows, self.steps, self.seconds = 0, 0, 0.0

    def train(self, is_done: Callable[[], bool], methods: Methods | None = None, every: int = 50) -> None:
        """Steps until `is_done`; the number of the step is all that the methods go by."""
        begin = time.perf_counter()
        while not is_done():
            if methods is not None:
                methods.apply(self.steps)
            loss = loss_of(self.model, self.data, BatchRequest(self.steps, self.arguments.batch, self.arguments.window))
            used = sum(int(expert_load(block.moe.routing).sum()) for block in self.model.blocks)
            (loss + auxiliary_loss(self.model)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.rows += used
            if self.steps % every == 0:
                tokens = self.arguments.batch * self.arguments.window * len(self.model.blocks)
                print(f"  step {self.steps}: {loss.detach():.3f}, {used / tokens:.2f} experts a token", flush=True)
            self.steps += 1
        self.seconds = time.perf_counter() - begin

    @torch.no_grad()
    def unseen(self) -> float:
        """Nats per byte of files that it has not seen."""
        self.model.eval()
        size = 4 * self.arguments.batch
        request = BatchRequest(step=0, batch_size=size, window=self.arguments.window, split="validation")
        return float(loss_of(self.model, self.data, request))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=400, help="of EvoMoE; the plain MoE has as many rows")
    parser.add_argument("--diversify", type=int, help="the first step with many experts; half of the steps")
    parser.add_argument("--anneal", type=int, help="steps from dense to sparse; a fifth of the steps")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    diversify = arguments.diversify if arguments.diversify is not None else arguments.steps // 2
    anneal = arguments.anneal if arguments.anneal is not None else max(arguments.steps // 5, 1)
    data = open_data(arguments.data, vocab_size=END + 1)

    print("EvoMoE")
    gate = DenseToSparseSettings(threshold=0.8 / arguments.experts, anneal_steps=anneal)
    evolved = Run(arguments, data, gate)
    methods = Methods(evolved.model, [EvoMoE(diversify=diversify, mask=0.1)], evolved.optimizer)
    evolved.train(lambda: evolved.steps >= arguments.steps, methods)

    print("plain MoE")
    plain = Run(arguments, data, "switch")
    plain.train(lambda: plain.rows >= evolved.rows)

    for name, run in (("EvoMoE", evolved), ("plain MoE", plain)):
        print(
            f"{name}: {run.unseen():.3f} nats per byte on files it has not seen; {run.steps} steps, {run.rows:,} rows "
            f"through experts, {run.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
