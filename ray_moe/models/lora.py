"""Low-rank adapters (LoRA) on the backbone of a model, through `peft`, and a state without them again.

What is adapted is linear layers; routed experts are none. `peft` is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(
    model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int = 0
) -> list[str]:
    """Put an adapter beside each linear layer that is meant; from then on only adapters require a gradient.

    Args:
        rank: of the product that is added to the weights.
        alpha: times ``1 / rank`` it is what the product is multiplied by.
        dropout: of what goes into an adapter, in training.
        targets: patterns (`*self_attn*`) of names of linear layers.
        seed: of the adapters' first weights, which change nothing yet.

    Returns: the layers' names.

    Raises: `InvalidConfig` for a pattern that no linear layer fits, and without `peft`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InvalidConfig(f"train.lora needs peft ({error}): pip install 'ray-moe[lora]'") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise InvalidConfig(
                f"train.lora.target_modules names {pattern!r}, which no linear layer of the backbone is called; there "
                f"are {', '.join(linear[:8])} ..."
            )
    chosen = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in targets)]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return chosen


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model, as `without_adapters` where it has any."""
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    return without_adapters(model.state_dict(), adapted[0].scaling["default"] if adapted else 0.0)


def without_adapters(state: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The state of a model whose weights have taken up what its adapters add.

    Args:
        state: of the model with adapters; the layers' own weights are called as in a model with adapters or without.
        scale: alpha over rank.
    """
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            weight = merged[f"{layer}.weight"]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            update = state[f"{layer}{_B}"].to(dtype) @ down.to(dtype)
            merged[f"{layer}.weight"] = (weight + update * scale).to(weight.dtype)
    return merged
