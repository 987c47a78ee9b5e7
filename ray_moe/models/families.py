"""Families whose experts `transformers` does not put on its experts interface, brought onto it; and those refused.

An adapter works on one model: it exchanges the experts for modules of the interface, and tells how the weights on disk
become theirs. No class of `transformers` is changed, so other models of the process stay as they are.

Shape legend: B sequences, S tokens of each, T = B·S, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

UNSUPPORTED: dict[str, str] = {
    "nllb-moe": "in transformers 5.23 only the first two experts of a layer ever act.",
    "diffusion_gemma": "they are no autoregressive models, and their encoder and decoder share the experts.",
    "doge": "their experts are single neurons picked by a product key, too small to sit behind an actor.",
    "longcat_flash": "their gate also picks identity experts, which the experts interface has no place for.",
    "ernie4_5_vl_moe": "on disk, text and vision experts are in one list, which cannot be loaded one expert at a time.",
}
"""model_type -> why its experts cannot be served apart."""


@dataclass(frozen=True, slots=True)
class _Family:
    block: str
    """Name of the class that holds the gate and the experts."""
    adapt: Callable[[Any, Any], None]
    """Changes one such block, given the model's configuration."""
    conversions: Callable[[Any], list[Any]] = lambda config: []
    """Weight transforms that `transformers` lacks, given the model's configuration."""


def adapt(model: Any) -> None:
    """Bring the experts of `model` onto the experts interface, in place; nothing to do for most families.

    The weights it has are kept; a model on the meta device stays there.
    """
    family = _FAMILIES.get(model.config.model_type)
    if family is not None:
        for block in [module for module in model.modules() if type(module).__name__ == family.block]:
            family.adapt(block, _text_config(model))


def extra_conversions(model: Any) -> list[Any]:
    """Weight transforms of an adapted model, to be tried before those of `transformers`."""
    family = _FAMILIES.get(model.config.model_type)
    return [] if family is None else family.conversions(_text_config(model))


_lengths: ContextVar[list[int] | None] = ContextVar("lengths", default=None)


@contextmanager
def several_sequences(lengths: Sequence[int]) -> Iterator[None]:
    """While the block runs, a row [1, S, D] is several sequences of these lengths, one after the other.

    What a family counts within a sequence (the capacity of Switch Transformers) it counts within each.
    """
    token = _lengths.set(list(lengths))
    try:
        yield
    finally:
        _lengths.reset(token)


@use_experts_implementation
class GatedExperts(nn.Module):
    """Experts of the usual kind, down(act(gate(x)) * up(x)), for families that keep them in another shape."""

    def __init__(self, config: Any, gate_up_EGD: nn.Parameter, down_EDF: nn.Parameter, act_fn: Any) -> None:
        """`gate_up_EGD` is [E, 2F, D], the gate's rows before the up-projection's; `down_EDF` is [E, D, F]."""
        super().__init__()
        self.num_experts = len(gate_up_EGD)
        self.gate_up_proj = gate_up_EGD
        self.down_proj = down_EDF
        self.act_fn = act_fn

    forward = grouped_mm_experts_forward


@use_experts_implementation(has_gate=False)
class PlainExperts(nn.Module):
    """Experts without a gate of their own, down(act(up(x))). An index of E is "no expert" to them."""

    def __init__(self, config: Any, up_EFD: nn.Parameter, down_EDF: nn.Parameter, act_fn: Any) -> None:
        """`up_EFD` is [E, F, D], `down_EDF` is [E, D, F]."""
        super().__init__()
        self.num_experts = len(up_EFD)
        self.up_proj = up_EFD
        self.down_proj = down_EDF
        self.act_fn = act_fn

    forward = grouped_mm_experts_forward


# --- Llama 4: the gate's weight multiplies what goes into an expert, not what comes out ------------------------------
def _adapt_llama4(block: Any, config: Any) -> None:
    with torch.device("meta"):
        experts = _on_interface(block.experts.__class__, is_transposed=True)(config)
    experts._parameters = block.experts._parameters
    block.experts = experts
    block.forward = MethodType(_llama4_forward, block)


def _llama4_forward(block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, D] -> [T, D] and the gate's logits [T, E], as `Llama4TextMoe` does (which asks every expert)."""
    hidden_TD = hidden.reshape(-1, block.hidden_dim)
    scores_TE, logits_TE = block.router(hidden_TD)
    index_TK = torch.topk(logits_TE, block.top_k, dim=1).indices
    rows_ND = (hidden_TD[:, None] * scores_TE.gather(1, index_TK)[..., None]).flatten(0, 1)
    index_N1 = index_TK.reshape(-1, 1)
    routed_ND = block.experts(rows_ND, index_N1, torch.ones_like(index_N1, dtype=rows_ND.dtype))
    routed_TD = routed_ND.view(*index_TK.shape, -1).sum(1)
    return block.shared_expert(hidden_TD) + routed_TD, logits_TE


# --- DBRX: all experts' weights lie in flat matrices [E·F, D] --------------------------------------------------------
def _adapt_dbrx(block: Any, config: Any) -> None:
    mlp = block.experts.mlp
    shape = (mlp.moe_num_experts, mlp.ffn_hidden_size, mlp.hidden_size)
    gate_EFD, up_EFD, down_EFD = (weight.detach().view(shape) for weight in (mlp.w1, mlp.v1, mlp.w2))
    gate_up = nn.Parameter(torch.cat([gate_EFD, up_EFD], 1))
    down = nn.Parameter(down_EFD.transpose(1, 2).contiguous())
    block.experts = GatedExperts(config, gate_up, down, mlp.activation_fn)
    block.forward = MethodType(_dbrx_forward, block)


def _dbrx_forward(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[B, S, D] -> [B, S, D], as `DbrxFFN` does."""
    weight_TK, index_TK = block.route_tokens_to_experts(block.router(hidden))
    routed_TD: torch.Tensor = block.experts(hidden.flatten(0, -2), index_TK, weight_TK)
    return routed_TD.view(hidden.shape)


def _dbrx_conversions(config: Any) -> list[Any]:
    rows = config.ffn_config.ffn_hidden_size
    return [
        WeightConverter(
            ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1"],
            "ffn.experts.gate_up_proj",
            [SplitRows(rows), Concatenate(dim=1)],
        ),
        WeightConverter("ffn.experts.mlp.w2", "ffn.experts.down_proj", [SplitRows(rows), Transpose(1, 2)]),
    ]


class SplitRows(ConversionOps):
    """[n·rows, D] -> [n, rows, D]."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.unflatten(0, (-1, self._rows)) for name, tensor in _tensors(input_dict)}

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinRows(self._rows)


class JoinRows(ConversionOps):
    """[n, rows, D] -> [n·rows, D]."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.flatten(0, 1) for name, tensor in _tensors(input_dict)}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitRows(self._rows)


def _tensors(input_dict: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in input_dict.items():
        yield name, value[0] if isinstance(value, list) else value


# --- JetMoE: two stacks of matrices beside each other (its mixture of attention heads stays with the backbone) -------
def _adapt_jetmoe(block: Any, config: Any) -> None:
    block.experts = GatedExperts(config, block.input_linear.weight, block.output_linear.weight, block.activation)
    del block.input_linear, block.output_linear
    block.forward = MethodType(_jetmoe_forward, block)


def _jetmoe_forward(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[B, S, D] -> [B, S, D], as `JetMoeMoE` does."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    top_TK, index_TK = block.router.layer(hidden_TD).float().topk(block.router.top_k, dim=1)
    weight_TK = torch.softmax(top_TK, dim=1).type_as(hidden)
    out: torch.Tensor = block.experts(hidden_TD, index_TK, weight_TK).view(hidden.shape) + block.bias
    return out


def _jetmoe_conversions(config: Any) -> list[Any]:
    return [
        WeightRenaming("mlp.input_linear.weight", "mlp.experts.gate_up_proj"),
        WeightRenaming("mlp.output_linear.weight", "mlp.experts.down_proj"),
    ]


# --- Switch Transformers: a module for each expert, and a gate that answers a mask, of zeros where it drops a token ---
def _adapt_switch(block: Any, config: Any) -> None:
    every = [block.experts[f"expert_{number}"] for number in range(block.experts.num_experts)]
    up, down = (
        nn.Parameter(torch.stack([w.detach() for w in each]))
        for each in ([expert.wi.weight for expert in every], [expert.wo.weight for expert in every])
    )
    experts: Any = PlainExperts(config, up, down, every[0].act)
    experts._is_expert_parallel = True  # without it transformers takes every index for an expert
    block.experts = experts
    block._is_hf_initialized = True  # transformers would initialise experts that are no longer modules
    block.forward = MethodType(_switch_forward, block)


def _switch_forward(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[B, S, D] -> [B, S, D], as `SwitchTransformersSparseMLP` does. Capacity counts within each sequence."""
    lengths = _lengths.get()
    routed = [block.router(each)[:2] for each in (hidden.split(lengths, 1) if lengths else [hidden])]
    chosen_BSE, weight_BS1 = (torch.cat(each, 1) for each in zip(*routed, strict=True))
    is_kept = chosen_BSE.amax(-1, keepdim=True) > 0
    index_T1 = torch.where(is_kept, chosen_BSE.argmax(-1, keepdim=True), block.experts.num_experts).view(-1, 1)
    out: torch.Tensor = block.experts(hidden.flatten(0, -2), index_T1, weight_BS1.reshape(-1, 1))
    return out.view(hidden.shape)


def _switch_conversions(config: Any) -> list[Any]:
    return [
        WeightConverter(f"mlp.experts.expert_*.{name}.weight", f"mlp.experts.{stack}", [MergeModulelist(dim=0)])
        for name, stack in (("wi", "up_proj"), ("wo", "down_proj"))
    ]


# --- Step 3.7: the interface's own contract, only not declared ------------------------------------------------------
def _adapt_step3p7(block: Any, config: Any) -> None:
    with torch.device("meta"):
        experts = _on_interface(block.experts.__class__)(config, swiglu_limit=block.experts.limit)
    experts._parameters = block.experts._parameters
    block.experts = experts


@cache
def _on_interface(experts_class: Any, is_transposed: bool = False) -> Any:
    """A subclass that answers through the experts interface, and by itself with the interface's usual formula."""
    members = {"__module__": __name__, "forward": grouped_mm_experts_forward}
    subclass = type(experts_class.__name__, (experts_class,), members)
    return use_experts_implementation(subclass, is_transposed=is_transposed)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


_FAMILIES = {
    "llama4_text": _Family("Llama4TextMoe", _adapt_llama4),
    "dbrx": _Family("DbrxFFN", _adapt_dbrx, _dbrx_conversions),
    "jetmoe": _Family("JetMoeMoE", _adapt_jetmoe, _jetmoe_conversions),
    "switch_transformers": _Family("SwitchTransformersSparseMLP", _adapt_switch, _switch_conversions),
    "step3p7": _Family("Step3p7SparseMoeBlock", _adapt_step3p7),
}
