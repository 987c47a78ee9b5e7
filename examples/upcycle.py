"""A dense language model that becomes a Mixture of Experts and learns on, beside the same model that stays dense.

`python examples/upcycle.py [--steps 150] [--more 150] [--data stdlib]`: one process, no download, about a minute on one
core. A small Llama over bytes is trained on the sources of Python's standard library and saved; `ray_moe.upcycle` makes
a Mixtral of it (as `ray-moe upcycle` does), which at first gives the same logits. Then both are trained for as many
steps on the same batches.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ray_moe
from ray_moe import UpcycleSettings
from ray_moe.models.byte_level import END, write
from ray_moe.models.moe_writing import NewMoE
from ray_moe.models.quiet import no_progress_bars
from ray_moe.training.data import BatchRequest, Data, open_data


def train(model: Any, data: Data, arguments: argparse.Namespace, begin: int, num_steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, weight_decay=0.01)
    for step in range(begin, begin + num_steps):
        model(**data.batch(BatchRequest(step, arguments.batch, arguments.window))).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def unseen(model: Any, data: Data, arguments: argparse.Namespace) -> float:
    """Nats per byte on files that are kept apart."""
    held_out = BatchRequest(step=0, batch_size=4 * arguments.batch, window=arguments.window, split="validation")
    loss: float = model.eval()(**data.batch(held_out)).loss.item()
    return loss


def upcycled(folder: Path, settings: UpcycleSettings) -> tuple[Any, NewMoE]:
    """The MoE model that becomes of folder/dense, and what is told of it."""
    made = ray_moe.upcycle(folder / "dense", folder / "moe", settings, overwrite=True)
    with no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(folder / "moe"), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=150, help="of the dense model, before")
    parser.add_argument("--more", type=int, default=150, help="of both, afterwards")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = open_data(arguments.data, vocab_size=END + 1)
    dense: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=END + 1,
            hidden_size=arguments.width,
            intermediate_size=2 * arguments.width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            initializer_range=0.05,
            eos_token_id=END,
            pad_token_id=END,
        )
    )
    train(dense, data, arguments, 0, arguments.steps, lr=4e-3)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "dense"), dense)
        copies, made = upcycled(Path(folder), UpcycleSettings(num_experts=arguments.experts))
        # Equal copies give the gate nothing to learn from at first: for training they begin a little apart.
        moe, _ = upcycled(Path(folder), UpcycleSettings(num_experts=arguments.experts, noise=0.05))
    ids = data.batch(BatchRequest(0, 2, arguments.window))["input_ids"]
    with torch.no_grad():
        difference = (copies(ids).logits - dense.eval()(ids).logits).abs().max()
    print(f"{made.before.total:,} weights became {made.after.total:,}, of which a token meets {made.after.active:,}")
    print(f"as {made.model_type}, logits differ by {difference:.1e}")
    print(f"after {arguments.steps} steps: {unseen(dense, data, arguments):.3f} nats per byte, dense")
    for name, model in (("dense", dense), ("moe", moe)):
        train(model, data, arguments, arguments.steps, arguments.more, lr=2e-3)
        print(f"after {arguments.more} more: {unseen(model, data, arguments):.3f} nats per byte, {name}", flush=True)


if __name__ == "__main__":
    main()
