"""Finding room for slots whose expert has none: the vectorised part of `ops/capacity.py`.

No settings and no counting of what was lost. No Python loop over tokens: over choices and rounds, at most K times E.

Shape legend: T tokens, E experts, K experts per token, n slots of some kind.
"""

from __future__ import annotations

import math

import torch


def find_room(index: torch.Tensor, new: torch.Tensor, scores: torch.Tensor, room: int) -> torch.Tensor:
    """Find experts for the slots that have none, in order of priority.

    All ask at once for the best expert there is room in. The first that is turned away marks how far the answers are
    those of one after the other; its expert is full now. So there are at most E rounds for each of the K choices.

    Args:
        index: [K, T] what the gate chose, tokens in order of priority.
        new: [K, T] the same where there was room, E elsewhere.
        scores: [T, E] who is best for each token; minus infinity is never taken.
        room: of an expert.

    Returns: `new` with experts for slots that found one.
    """
    num_experts = scores.shape[1]
    left = room - count_slots(new, num_experts)
    # One column more, for "no expert".
    taken = torch.zeros(len(scores), num_experts + 1, dtype=torch.bool, device=scores.device)
    taken.scatter_(1, new.t(), True)
    new = new.clone()
    for choice in range(len(new)):
        waiting = ((new[choice] == num_experts) & (index[choice] != num_experts)).nonzero()[:, 0]
        while len(waiting) and bool((left > 0).any()):
            allowed = scores[waiting].masked_fill(taken[waiting, :num_experts] | (left <= 0), -math.inf)
            best, expert = allowed.max(1)
            waiting, expert = waiting[~best.isneginf()], expert[~best.isneginf()]
            turned_away = (rank(expert, num_experts) >= left[expert]).nonzero()
            served = int(turned_away[0]) if len(turned_away) else len(waiting)
            token, expert = waiting[:served], expert[:served]
            new[choice, token] = expert
            taken[token, expert] = True
            left -= count_slots(expert, num_experts)
            waiting = waiting[served:]
    return new


def rank(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[n] in 0..E -> [n] how many slots before this one go to its expert; E has no limit and ranks -1."""
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=num_experts + 1)
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(experts)
    ranks[order] = torch.arange(len(experts), device=experts.device) - starts[experts[order]]
    return ranks.masked_fill(experts == num_experts, -1)


def count_slots(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[...] in 0..E -> [E] slots of each expert."""
    return index.reshape(-1).bincount(minlength=num_experts + 1)[:num_experts]
