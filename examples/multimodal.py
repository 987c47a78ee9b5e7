"""Questions about pictures: one MoE stack over tokens of vision and text, on data that is made here.

`python examples/multimodal.py [--steps 400]`: one process, no download, less than a minute on one core. A picture is a
grid of coloured cells, a question asks for the colour of a cell ("row 2 column 3 ?") or how many cells have a colour
("count blue ?"). The answer is read at the question mark, so text has to look at vision. Experts are of vision, of
text, and of both (`ModalitySettings`); the network prints which each modality used in the end.

Shape legend: B examples, S tokens, D model width, H heads.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.ops.architectures.hybrid import PreNorm, Stack
from ray_moe.ops.architectures.multimodal import MultimodalStack
from ray_moe.ops.gates.modality import ModalitySettings
from ray_moe.ops.layer import moe_layers

GRID, COLOURS = 3, 4
WORDS = ["?", "row", "column", "count", *map(str, range(GRID)), *(f"colour {number}" for number in range(COLOURS))]
ROW, COLUMN, COUNT, NUMBER, COLOUR = 1, 2, 3, 4, 4 + GRID
ANSWERS = COLOURS + GRID * GRID + 1
"""A colour, or a number of cells."""


def make_questions(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cells [B, GRID², 3] in noise, words [B, 5], and answers [B]."""
    palette = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    cells = torch.randint(COLOURS, (number, GRID * GRID), generator=generator)
    noise = 0.2 * torch.randn(number, GRID * GRID, 3, generator=generator)
    row, column = torch.randint(GRID, (2, number), generator=generator)
    colour = torch.randint(COLOURS, (number,), generator=generator)
    word = torch.ones_like(row)
    which = torch.stack([ROW * word, NUMBER + row, COLUMN * word, NUMBER + column, 0 * word], -1)
    count = torch.stack([COUNT * word, COLOUR + colour, 0 * word, 0 * word, 0 * word], -1)
    is_count = torch.rand(number, generator=generator) < 0.5
    there = cells.gather(1, (row * GRID + column).unsqueeze(1)).squeeze(1)
    many = COLOURS + (cells == colour.unsqueeze(1)).sum(1)
    words, answer = torch.where(is_count.unsqueeze(1), count, which), torch.where(is_count, many, there)
    return palette[cells] + noise, words, answer


class Attention(nn.Module):
    """Of every token to every token, whatever it is of."""

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


class Positions(nn.Module):
    """What an encoder puts out, and where it is."""

    def __init__(self, encoder: nn.Module, length: int, width: int) -> None:
        super().__init__()
        self.encoder, self.positions = encoder, nn.Parameter(torch.empty(length, width).normal_(std=0.5))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.encoder(given) + self.positions


class Answerer(nn.Module):
    """A multimodal stack, and an answer at the last word."""

    def __init__(self, width: int, num_layers: int, own: int, shared: int) -> None:
        super().__init__()
        gate = ModalitySettings(own=(own, own), top_k=2)
        layers: list[nn.Module] = []
        for _ in range(num_layers):
            layers.append(PreNorm(width, Attention(width, width // 16)))
            moe = MoELayer(width, width, 2 * own + shared, gate=gate)
            layers.append(PreNorm(width, moe))
        vision = Positions(nn.Linear(3, width), GRID * GRID, width)
        text = Positions(nn.Embedding(len(WORDS), width), 5, width)
        self.stack = MultimodalStack(width, [vision, text], Stack(layers))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, ANSWERS))

    def forward(self, cells: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits [B, ANSWERS]."""
        _, text = self.stack((cells, words))
        return self.head(text[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    cells, words, answers = make_questions(1000, torch.Generator().manual_seed(2))
    model = Answerer(arguments.width, arguments.layers, own=2, shared=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, arguments.steps)
    for step in range(arguments.steps):
        *given, wanted = make_questions(arguments.batch, generator)
        loss = nn.functional.cross_entropy(model(*given), wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == arguments.steps - 1:
            with torch.no_grad():
                right = (model(cells, words).argmax(-1) == answers).float()
            is_count = answers >= COLOURS
            print(
                f"step {step}: loss {loss.detach():.3f}, accuracy {right.mean():.3f} "
                f"(colours {right[~is_count].mean():.3f}, counts {right[is_count].mean():.3f})",
                flush=True,
            )
    for path, layer in moe_layers(model).items():
        index = layer.routing.index.view(len(cells), -1, 2)
        vision, text = (
            torch.bincount(part.flatten(), minlength=6).tolist()
            for part in (index[:, : GRID * GRID], index[:, GRID * GRID :])
        )
        print(f"{path}: tokens of each expert, vision {vision}, text {text}")


if __name__ == "__main__":
    main()
