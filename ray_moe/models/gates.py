"""Putting another gate into a model of `transformers`, in place of the routers beside its experts.

Works on every family whose block calls its router with hidden [T, D] alone and takes (logits, weight, index) from it,
which is asked of each router before it goes. The gate takes the router's place and name, so a checkpoint of the model
has the gate's weights where the router's were. Loads nothing; called by who trains or studies a model.

The model's own auxiliary loss (`output_router_logits`) knows routers alone, and is 0 afterwards: add those of
`routings`. A router's own bias of its logits (gpt-oss) goes with it.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ray_moe.errors import UnsupportedModel
from ray_moe.models.experts import experts_modules
from ray_moe.ops.gates.base import GateSettings, Routing, TokenInfo, takes_info
from ray_moe.ops.gates.registry import GATES, make_gate, make_settings
from ray_moe.types import LayerPath

SAME = {"weight": "weight", "bias": "e_score_correction_bias"}
"""What a router calls what a gate has."""

_ROUTING, _INFO = "_ray_moe_routing", "_ray_moe_info"


def replace_gates(model: nn.Module, settings: GateSettings | str, *, seed: int = 0) -> list[LayerPath]:
    """Give every MoE block of `model` a gate.

    Weights that the router has, too, are kept where shapes agree, so "topk" with the model's own options changes
    nothing; all others are drawn. Gates have the dtype and device of the routers.

    Args:
        model: of `transformers`, with its weights. It is changed.
        settings: of the gates; or a name, with the model's own K where the gate has an option `top_k`.
        seed: of the weights that are drawn.

    Returns: paths of the gates, in model order.

    Raises:
        UnsupportedModel: a router has another form; nothing has been changed.
        InvalidConfig: the options do not fit the model's experts; nothing has been changed.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = experts_modules(model)
    found = [_router(model, path) for path in modules]
    if not found:
        raise UnsupportedModel("the model has no experts of transformers' experts interface beside a router")
    gates = [(path, _made(router, settings, generator)) for path, router in found]
    for path, gate in gates:
        model.set_submodule(path, gate)
    for experts in modules.values():
        # Without expert parallelism transformers takes every index for an expert, also the one that means "none".
        marked: Any = experts
        marked._is_expert_parallel = True
    return [path for path, _ in gates]


def routings(model: nn.Module) -> dict[LayerPath, Routing]:
    """What the gates of `replace_gates` have decided in the last call, by path; with its history, for losses."""
    return {path: module.__dict__[_ROUTING] for path, module in model.named_modules() if _ROUTING in module.__dict__}


@contextmanager
def told(model: nn.Module, info: TokenInfo) -> Iterator[None]:
    """While inside, the gates of `replace_gates` hear of the tokens what `info` says: fields of [...] or [T]."""
    gates = [module for module in model.modules() if _INFO in module.__dict__]
    for gate in gates:
        gate.__dict__[_INFO] = info
    try:
        yield
    finally:
        for gate in gates:
            gate.__dict__[_INFO] = None


def _router(model: nn.Module, experts_path: LayerPath) -> tuple[LayerPath, nn.Module]:
    """The path and module of the router beside some experts. Raises: `UnsupportedModel`."""
    block_path, experts = experts_path.rpartition(".")[0], model.get_submodule(experts_path)
    block = model.get_submodule(block_path)
    number: Any = experts.num_experts
    for name, child in block.named_children():
        weight = getattr(child, "weight", None)
        if child is not experts and isinstance(weight, torch.Tensor) and weight.shape[:-1] == (int(number),):
            if not _answers_as_expected(child, weight):
                raise UnsupportedModel(
                    f"the router {block_path}.{name} ({type(child).__name__}) does not answer hidden states with "
                    "(logits, weight, index); no other gate can take its place"
                )
            return f"{block_path}.{name}", child
    raise UnsupportedModel(f"there is no router of {number} experts beside {experts_path}; no gate can take its place")


@torch.no_grad()
def _answers_as_expected(router: nn.Module, weight: torch.Tensor) -> bool:
    """Whether two tokens get logits [2, E], weights [2, K] and an index [2, K]."""
    try:
        answer = router(weight.new_zeros(2, weight.shape[1]))
    except (TypeError, RuntimeError, ValueError):  # it wants more than hidden states, or in another shape
        return False
    if not isinstance(answer, tuple) or len(answer) != 3:
        return False
    logits, weights, index = answer
    is_int = not index.is_floating_point() and index.dtype is not torch.bool
    return logits.shape == (2, len(weight)) and weights.shape == index.shape and index.ndim == 2 and is_int


def _made(router: Any, settings: GateSettings | str, generator: torch.Generator) -> nn.Module:
    """A gate with what it shares with the router, that answers as the router did."""
    if isinstance(settings, str):
        has_top_k = settings in GATES and "top_k" in GATES[settings].__dataclass_fields__
        settings = make_settings(settings, **({"top_k": int(router.top_k)} if has_top_k else {}))
    num_experts, hidden_size = router.weight.shape
    gate: nn.Module = make_gate(settings, hidden_size, num_experts)
    gate.reset_parameters(generator)  # type: ignore[operator]
    mine, theirs = gate.state_dict(), router.state_dict()
    kept = {name: theirs[other] for name, other in SAME.items() if name in mine and other in theirs}
    gate.load_state_dict({name: kept[name] for name in kept if kept[name].shape == mine[name].shape}, strict=False)
    gate.to(router.weight.device, router.weight.dtype).train(router.training)
    if takes_info(gate):
        gate.__dict__[_INFO] = None
        gate.register_forward_pre_hook(_with_info)
    gate.register_forward_hook(_as_router)
    return gate


def _with_info(gate: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    (hidden,) = given
    info: TokenInfo | None = gate.__dict__[_INFO]
    return hidden, None if info is None else info.flat(hidden.shape[:-1].numel())


def _as_router(gate: nn.Module, given: Any, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the block expects, from what the gate says."""
    gate.__dict__[_ROUTING] = routing
    return routing.logits, routing.weight, routing.index
