"""A byte-level language model of your own with `ray_moe.MoELayer`, trained on the sources of Python's standard library.

`python examples/moe_layer_lm.py [--steps 300] [--data stdlib]`: one process, no download, a few minutes on a laptop. It
shows the layer inside a network that is nobody else's, its auxiliary losses, a look at how evenly the experts are used,
and data that is the same in every run.
`--data` takes what `ray_moe.training.data.open_data` takes: a file, a folder, a glob, a .jsonl file, module:function.

Shape legend: B windows of a batch, S tokens of a window, D model width, H heads.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.models.byte_level import END
from ray_moe.ops.losses import auxiliary_loss
from ray_moe.ops.utilization import UtilizationMonitor
from ray_moe.training.data import BatchRequest, Data, open_data

AUXILIARY = {"load_balancing": 0.01, "router_z": 0.001}
"""That tokens are spread evenly, and that the gates' logits stay small."""


class Block(nn.Module):
    """Attention, then the MoE layer where others have one feed-forward network."""

    def __init__(self, width: int, num_heads: int, num_experts: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.before_attention, self.before_experts = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.moe = MoELayer(width, 2 * width, num_experts, top_k=2, auxiliary=AUXILIARY)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        heads = self.qkv(self.before_attention(hidden)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.transpose(1, 3).unbind(2)  # [B, H, S, D / H]
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.moe(self.before_experts(hidden))


class ByteLM(nn.Module):
    """A small decoder over bytes."""

    def __init__(self, width: int, num_layers: int, num_experts: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.tokens, self.positions = nn.Embedding(END + 1, width), nn.Embedding(window, width)
        nn.init.normal_(self.tokens.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.05)
        self.blocks = nn.ModuleList(Block(width, width // 32, num_experts) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] -> logits [B, S, END + 1]."""
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.linear(self.norm(hidden), self.tokens.weight)


def loss_of(model: ByteLM, data: Data, request: BatchRequest) -> torch.Tensor:
    """Nats per byte."""
    batch = data.batch(request)
    logits = model(batch["input_ids"])
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@torch.no_grad()
def continue_text(model: ByteLM, text: str, num_bytes: int) -> str:
    tokens = torch.tensor([list(text.encode())])
    for _ in range(num_bytes):
        logits = model(tokens[:, -model.window :])[:, -1]
        tokens = torch.cat([tokens, (logits / 0.5).softmax(-1).multinomial(1)], dim=1)
    return bytes(token for token in tokens[0].tolist() if token < END).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--window", type=int, default=192)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = open_data(arguments.data, vocab_size=END + 1)
    model = ByteLM(arguments.width, arguments.layers, arguments.experts, arguments.window)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    monitor = UtilizationMonitor(model)
    held_out = BatchRequest(step=0, batch_size=4 * arguments.batch, window=arguments.window, split="validation")
    for step in range(arguments.steps):
        loss = loss_of(model, data, BatchRequest(step, arguments.batch, arguments.window))
        (loss + auxiliary_loss(model)).backward()
        monitor.observe()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == arguments.steps - 1:
            with torch.no_grad():
                unseen = loss_of(model, data, held_out)
            print(f"step {step}: {loss.detach():.3f} nats per byte, {unseen:.3f} on files it has not seen", flush=True)
    print(monitor.report())
    print(continue_text(model, "def ", 200))


if __name__ == "__main__":
    main()
