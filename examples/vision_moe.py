"""A small vision transformer with MoE layers (V-MoE, arXiv:2106.05974), on images that are made here.

`python examples/vision_moe.py [--steps 300]`: one process, no download, less than a minute on one core. Images show one
of six shapes anywhere, in any size and colour, in noise. Every 2nd layer is a MoE layer, and where an expert is asked
for too much, the patches that the gate is surest of come first (batch prioritised routing). In the end the network has
less and less room for patches, and the accuracy shows how little it minds: what is dropped says least.

Shape legend: B images of a batch, S patches of an image, D model width, H heads.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.ops.architectures.feed_forward import FeedForward
from ray_moe.ops.architectures.hybrid import PreNorm, Stack, moe_pattern
from ray_moe.ops.capacity import CapacitySettings
from ray_moe.ops.layer import moe_layers
from ray_moe.ops.losses import auxiliary_loss

SIZE, PATCH = 20, 4
SHAPES = ("disc", "ring", "square", "frame", "cross", "diagonals")


def make_images(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [number, 3, SIZE, SIZE], and which of `SHAPES` is on each [number]."""
    label = torch.randint(len(SHAPES), (number,), generator=generator)
    radius, y, x = torch.rand(3, number, 1, 1, generator=generator) * torch.tensor([2.5, 6, 6]).view(3, 1, 1, 1)
    radius = radius + 4
    rows = torch.arange(SIZE).view(1, SIZE, 1) - (y + 7)
    columns = torch.arange(SIZE).view(1, 1, SIZE) - (x + 7)
    far = (rows.square() + columns.square()).sqrt()
    most, least = torch.maximum(rows.abs(), columns.abs()), torch.minimum(rows.abs(), columns.abs())
    drawn = torch.stack([
        far < radius,
        (far < radius) & (far > radius - 2),
        most < radius,
        (most < radius) & (most > radius - 2),
        (least < 1.2) & (most < radius),
        ((rows.abs() - columns.abs()).abs() < 1.5) & (most < radius),
    ])  # fmt: skip
    shape = drawn[label, torch.arange(number)].unsqueeze(1)
    colour = 0.5 + torch.rand(number, 3, 1, 1, generator=generator)
    return shape * colour + 0.3 * torch.randn(number, 3, SIZE, SIZE, generator=generator), label


class Attention(nn.Module):
    """Of every patch to every patch."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        heads = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.transpose(1, 3).unbind(2)  # [B, H, S, D / H]
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class VisionMoE(nn.Module):
    """Patches, a hybrid stack, and the mean of the patches."""

    def __init__(self, width: int, num_layers: int, num_experts: int, pattern: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.empty((SIZE // PATCH) ** 2, width).normal_(std=0.02))
        capacity = CapacitySettings(factor=1.05, eval_factor=2.0, priority="probability")
        layers: list[nn.Module] = []
        for is_moe in moe_pattern(pattern, num_layers):
            layers.append(PreNorm(width, Attention(width, width // 16)))
            if is_moe:
                inner: nn.Module = MoELayer(
                    width, 2 * width, num_experts, 2, gated=False, activation="gelu",
                    capacity=capacity, auxiliary={"load_balancing": 0.01},
                )  # fmt: skip
            else:
                inner = FeedForward(width, 2 * width, gated=False, activation="gelu")
            layers.append(PreNorm(width, inner))
        self.stack = Stack(layers)
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, len(SHAPES)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, SIZE, SIZE] -> logits [B, len(SHAPES)]."""
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.stack(hidden).mean(1))


@torch.no_grad()
def accuracy(model: VisionMoE, images: torch.Tensor, label: torch.Tensor) -> float:
    model.eval()
    right = (model(images).argmax(-1) == label).float().mean()
    model.train()
    return float(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--pattern", default="every 2nd")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    unseen = make_images(500, torch.Generator().manual_seed(2))
    model = VisionMoE(arguments.width, arguments.layers, arguments.experts, arguments.pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, arguments.steps)
    for step in range(arguments.steps):
        images, label = make_images(arguments.batch, generator)
        loss = nn.functional.cross_entropy(model(images), label)
        (loss + auxiliary_loss(model)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.detach():.3f}, accuracy {accuracy(model, *unseen):.3f}", flush=True)
    for layer in moe_layers(model).values():
        print(f"experts take {layer.overflow}")
    for factor in (1.0, 0.5, 0.25):
        for priority in ("probability", "position"):
            for layer in moe_layers(model).values():
                layer.capacity.settings = CapacitySettings(factor=factor, priority=priority)
                layer.capacity.factor = factor
            print(f"room for {factor:.0%} of the choices by {priority}: accuracy {accuracy(model, *unseen):.3f}")


if __name__ == "__main__":
    main()
