"""Every gate of the registry, small, and what the tests ask of all of them."""

from __future__ import annotations

from typing import Any

import torch

from ray_moe.ops.gates.base import GateSettings, Routing, TokenInfo, takes_info
from ray_moe.ops.gates.registry import make_gate, make_settings

WIDTH, EXPERTS, TOKENS = 5, 6, 9

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "topk, not normalised": ("topk", {"top_k": 3, "normalize": False}),
    "switch": ("switch", {}),
    "switch with jitter": ("switch", {"jitter": 0.3}),
    "noisy_topk": ("noisy_topk", {}),
    "noisy_topk of all": ("noisy_topk", {"top_k": EXPERTS}),
    "topk_random": ("topk_random", {"top_k": 2}),
    "topk_random, all alike": ("topk_random", {"draw": "uniform"}),
    "topk_random as GShard": ("topk_random", {"draw": "next", "dispatch": "by_weight"}),
    "expert_choice": ("expert_choice", {}),
    "expert_choice of few": ("expert_choice", {"capacity_factor": 0.5}),
    "dynamic_k": ("dynamic_k", {"threshold": 0.6}),
    "dynamic_k with a bound": ("dynamic_k", {"threshold": 0.9, "max_k": 3, "normalize": True}),
    "gumbel": ("gumbel", {}),
    "gumbel, hard": ("gumbel", {"hard": True, "max_k": 4, "target": 2.0}),
    "dense_to_sparse": ("dense_to_sparse", {}),
    "dense_to_sparse of few": ("dense_to_sparse", {"temperature": 0.4, "noise": 0.5, "threshold": 0.2}),
    "hard_concrete": ("hard_concrete", {}),
    "hard_concrete, half open": ("hard_concrete", {"initial": 0.5, "top_k": 3, "normalize": False}),
    "sigmoid": ("sigmoid", {}),
    "sigmoid in groups": ("sigmoid", {"num_groups": 3, "top_groups": 2, "top_k": 3, "scale": 2.5}),
    "hierarchical": ("hierarchical", {}),
    "hierarchical, not normalised": (
        "hierarchical",
        {"num_groups": 3, "top_groups": 2, "top_k": 1, "normalize": False},
    ),
    "hash": ("hash", {"top_k": 2, "seed": 3}),
    "multi_task": ("multi_task", {"num_tasks": 3}),
    "multi_task of few": ("multi_task", {"num_tasks": 3, "top_k": 2}),
    "modality": ("modality", {}),
    "modality with its own": ("modality", {"own": (1, 3), "top_k": 3, "normalize": False}),
}
"""By what it is: its name and its options."""

RANDOM = {"switch with jitter", "noisy_topk", "noisy_topk of all", "topk_random", "topk_random, all alike"} | {
    "topk_random as GShard",
    "gumbel",
    "gumbel, hard",
    "dense_to_sparse",
    "dense_to_sparse of few",
    "hard_concrete",
    "hard_concrete, half open",
}
"""Those that draw in training."""

INFO = TokenInfo(
    task=torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1]),
    modality=torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1]),
    ids=torch.tensor([5, 7, 5, 0, 50_000, 7, 1, 2, 3]),
)
"""Of `TOKENS` tokens."""


def settings_of(kind: str) -> GateSettings:
    name, options = OPTIONS[kind]
    return make_settings(name, **options)


def gate_of(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """With weights large enough for its choices to be far from each other."""
    gate = make_gate(settings_of(kind), WIDTH, EXPERTS).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in gate.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return gate


def tokens(dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


def ask(gate: Any, hidden: torch.Tensor, info: TokenInfo = INFO) -> Routing:
    routing: Routing = gate(hidden, info) if takes_info(gate) else gate(hidden)
    return routing


def spread(routing: Routing) -> torch.Tensor:
    """[T, E] the weight of each expert, 0 where it is not asked."""
    out = routing.logits.new_zeros(len(routing.index), EXPERTS + 1, dtype=routing.weight.dtype)
    return out.scatter_add(1, routing.index, routing.weight)[:, :EXPERTS]
