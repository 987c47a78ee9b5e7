"""A random model whose gates choose experts by Zipf's law, as trained ones nearly do; for `benchmarks/decode.py`.

The first coordinate of the hidden states is made to carry a constant that no layer changes and no logit of a word
sees. Through it each gate gets a bias for each expert, which is fitted on some tokens until the slots of the experts
are 1/rank. Which expert has which rank is random, and of each layer its own.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch

TOKENS, SEQUENCE = 2048, 64
"""On which the biases are fitted."""
SWEEPS, RATE = 400, 0.3
CONSTANT = 1.0
"""Of the first coordinate in the embedding, as a multiple of the norm of a row."""


def law(num_experts: int, exponent: float = 1.0) -> torch.Tensor:
    """[E] shares of the slots, the greatest first."""
    weight = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -exponent
    return weight / weight.sum()


@torch.no_grad()
def make_zipf(model: Any, exponent: float = 1.0, seed: int = 0) -> None:
    """Change the gates of a Qwen3-MoE in place, layer by layer, each fitted on what the ones before it now give."""
    source = torch.Generator().manual_seed(seed)
    decoder = model.model
    embedding = decoder.embed_tokens.weight
    embedding[:, 0] = CONSTANT * embedding.norm(dim=-1).mean()
    decoder.norm.weight[0] = 0
    for layer in decoder.layers:
        layer.input_layernorm.weight[0] = 0  # attention does not see it
        layer.self_attn.o_proj.weight[0] = 0  # and nobody changes it
        layer.mlp.experts.down_proj[:, 0] = 0
    ids = torch.randint(len(embedding), (TOKENS // SEQUENCE, SEQUENCE), generator=source)
    for layer in decoder.layers:
        gate = layer.mlp.gate
        hidden = gate_input(model, gate, ids)
        wanted = law(len(gate.weight), exponent)[torch.randperm(len(gate.weight), generator=source)]
        gate.weight[:, 0] = fitted(gate.weight, hidden, wanted, gate.top_k)


def gate_input(model: Any, gate: Any, ids: torch.Tensor) -> torch.Tensor:
    """[T, D] what reaches a gate."""
    seen: list[torch.Tensor] = []
    hook = gate.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    model(ids, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def fitted(weight: torch.Tensor, hidden: torch.Tensor, wanted: torch.Tensor, top_k: int) -> torch.Tensor:
    """[E] the gate's column for the first coordinate, by which experts get the `wanted` shares [E] of the slots.

    Args: weight: [E, D] of the gate; hidden: [T, D] that reach it.
    """
    rest = hidden[:, 1:] @ weight[:, 1:].T
    column = torch.zeros(len(weight))
    for _ in range(SWEEPS):
        shares_now = shares((rest + hidden[:, :1] * column).topk(top_k).indices, len(weight))
        column += RATE * rest.std() * (wanted.log() - shares_now.clamp(min=1e-5).log()).float() / hidden[:, 0].mean()
    return column


def shares(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E] of the slots of `index` [T, K]."""
    return index.reshape(-1).bincount(minlength=num_experts).double() / index.numel()
