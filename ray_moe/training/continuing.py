"""Continuing a prompt with the model that is being trained: for looks at what it has learned, not for service.

Keys and values are not kept: each token takes a forward pass over the whole sequence. Called by `training/session.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ray_moe.runtime.sampling import Sampler
from ray_moe.types import GenerateChunk, GenerateRequest


def continue_prompt(model: nn.Module, request: GenerateRequest) -> GenerateChunk:
    """The whole continuation of `request.token_ids`, chosen as `Engine` would with these weights; without its text."""
    prompt = list(request.token_ids or ())
    tokens, ends = (
        list(prompt),
        frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else _eos(model)),
    )
    device = next(model.parameters()).device
    sampler = Sampler(request)
    reason = "length"
    while len(tokens) - len(prompt) < request.max_new_tokens:
        logits: Any = model(input_ids=torch.tensor([tokens], device=device)).logits
        token = sampler.sample(tokens, logits[0, -1].float().cpu())
        tokens.append(token)
        if token in ends:
            reason = "stop"
            break
    return GenerateChunk(tuple(tokens[len(prompt) :]), "", reason, len(prompt))


def _eos(model: Any) -> frozenset[int]:
    settings = getattr(model, "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
