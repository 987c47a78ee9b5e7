"""A recommender with two tasks (MMoE, KDD 2018): who clicks, and who of those likes what they got.

`python examples/recommender.py [--steps 400]`: one process, no download, seconds on one core. Users, items and what
they do are made here: both tasks depend on how well tastes and topics fit, but the second one on the price, too. Four
experts are shared, each task has its own gate and tower. The area under the ROC curve (0.5 is chance) is of
pairs that were drawn before training. For comparison, the same is trained with one expert of four
times the width, where the tasks share everything below their towers.

Shape legend: B pairs of a batch, D model width.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from ray_moe.ops.architectures.multi_task import MMoE

USERS, ITEMS, TASTES = 200, 100, 4


class World:
    """What users like, what items are, and the chances of a click and of a like."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.taste, self.topic = (self._normal(number, TASTES) for number in (USERS, ITEMS))
        self.thrift, self.price = (self._normal(number) for number in (USERS, ITEMS))

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def pairs(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Users [B], items [B], and whether each clicked, and liked, [2, B]."""
        user, item = (torch.randint(most, (number,), generator=self.generator) for most in (USERS, ITEMS))
        fit = (self.taste[user] * self.topic[item]).sum(-1)
        cheap = self.thrift[user] * self.price[item]
        chance = torch.stack([fit, fit - 3 * cheap]).sigmoid()
        return user, item, (torch.rand(chance.shape, generator=self.generator) < chance).float()


class Recommender(nn.Module):
    """Embeddings, an MMoE, and a tower for each task."""

    def __init__(self, width: int, num_experts: int, expert_size: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, width // 2), nn.Embedding(ITEMS, width // 2)
        towers = [nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in range(2)]
        self.mmoe = MMoE(width, expert_size, num_experts, towers)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """[B] and [B] -> logits of a click and of a like, [2, B]."""
        both = torch.cat([self.user(user), self.item(item)], -1)
        return torch.stack(self.mmoe(both)).squeeze(-1)


def area_under_curve(score: torch.Tensor, truth: torch.Tensor) -> float:
    """How often one of those who did is before one of those who did not: from the ranks of all."""
    rank = score.argsort().argsort().double() + 1
    did, did_not = float(truth.sum()), float((1 - truth).sum())
    return (float(rank[truth == 1].sum()) - did * (did + 1) / 2) / (did * did_not)


def train(num_experts: int, expert_size: int, arguments: argparse.Namespace) -> Recommender:
    torch.manual_seed(0)
    world = World()
    model = Recommender(arguments.width, num_experts, expert_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    unseen = world.pairs(20_000)
    for step in range(arguments.steps):
        user, item, did = world.pairs(arguments.batch)
        loss = nn.functional.binary_cross_entropy_with_logits(model(user, item), did)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == arguments.steps - 1:
            user, item, did = unseen
            with torch.no_grad():
                click, like = (area_under_curve(*each) for each in zip(model(user, item), did, strict=True))
            name = f"{num_experts} experts of {expert_size}"
            print(
                f"{name}, step {step}: loss {loss.detach():.3f}, AUC {click:.3f} clicks, {like:.3f} likes", flush=True
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = train(arguments.experts, arguments.width, arguments)
    user, item, _ = World(seed=1).pairs(2000)
    model(user, item)
    routing = model.mmoe.moe.routing
    by_expert = torch.zeros_like(routing.logits).scatter(1, routing.index, routing.weight).detach()
    for task, name in enumerate(("clicks", "likes")):
        print(
            f"the gate of {name} gives experts on average", [round(w, 2) for w in by_expert[task::2].mean(0).tolist()]
        )
    train(1, arguments.experts * arguments.width, arguments)


if __name__ == "__main__":
    main()
