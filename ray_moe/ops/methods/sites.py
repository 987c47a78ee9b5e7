"""Where a network chooses experts, as methods of training see it: the gate and the experts of each MoE layer.

`MoELayer`s, and the blocks of `transformers` models whose router answers (logits, weight, index); those are known by
their attributes, so `transformers` is not needed. Changes nothing by itself. Called by `driver.py`.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, UnsupportedModel
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.gates.routers import Answer, allow_no_expert, routers_beside
from ray_moe.ops.layer import MoELayer


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One MoE layer of a network."""

    path: str
    """Of the layer or block; "" where the network is the layer."""
    gate: Any
    """A module that answers a `Routing`, or (logits [T, E], weight [T, K], index [T, K])."""
    experts: Any
    """The module of all experts; without parameters where they are elsewhere."""
    layer: MoELayer | None
    """None in a model of `transformers`."""
    learned: tuple[str, ...]
    """Names of the gate's parameters that learned when the site was found."""

    @property
    def learnable(self) -> list[nn.Parameter]:
        """These parameters, as far as they still are some (pruning makes new ones)."""
        return [parameter for name, parameter in self.gate.named_parameters() if name in self.learned]

    @property
    def num_experts(self) -> int:
        """E, which pruning changes."""
        return int(self.experts.num_experts)

    @property
    def is_local(self) -> bool:
        """Whether the experts' weights are here."""
        return any(True for _ in self.experts.parameters())

    def generator(self, seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
        """One that draws the same for the same seed, step and layer, whatever else was drawn."""
        digest = hashlib.blake2b(f"{seed}/{step}/{self.path}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def find_sites(model: nn.Module) -> list[Site]:
    """The MoE layers of a network, in its order.

    Raises:
        InvalidConfig: there are none, or a gate is no `torch.nn.Module`.
        UnsupportedModel: experts of `transformers` without a router beside them that a method could work on.
    """
    found: list[Site] = []
    of_layers: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, MoELayer):
            if not isinstance(module.gate, nn.Module):
                raise InvalidConfig(
                    f"the gate of {path or 'the layer'} is a {type(module.gate).__name__}; make it a module"
                )
            found.append(_site(path, module.gate, module.experts, module))
            of_layers.add(id(module.experts))
        elif hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate") and id(module) not in of_layers:
            block = path.rpartition(".")[0]
            found.append(_site(block, _router(model.get_submodule(block), module, path), module, None))
    if not found:
        raise InvalidConfig("the network has no MoE layer: neither a ray_moe.MoELayer nor experts of transformers")
    return found


def _site(path: str, gate: nn.Module, experts: nn.Module, layer: MoELayer | None) -> Site:
    return Site(path, gate, experts, layer, tuple(name for name, p in gate.named_parameters() if p.requires_grad))


def _router(block: nn.Module, experts: Any, path: str) -> nn.Module:
    """What in a block of `transformers` is its router. Raises: `UnsupportedModel`."""
    for _, child in routers_beside(block, experts):
        allow_no_expert(experts)
        return child
    raise UnsupportedModel(f"there is no router of {int(experts.num_experts)} experts beside {path}")


def probe(site: Site) -> Routing:
    """What a router of `transformers` answers for two tokens. Raises: `UnsupportedModel` for another form."""
    with evaluating(site.gate):
        return as_routing(site.gate(site.gate.weight.new_zeros(2, site.gate.weight.shape[-1])), site.path)


def as_routing(output: Any, path: str = "") -> Routing:
    """What a gate answered. Raises: `UnsupportedModel` for a router that answers in another form."""
    if isinstance(output, Routing):
        return output
    if isinstance(output, Answer):
        return output.routing
    is_three = isinstance(output, tuple) and len(output) == 3 and all(isinstance(o, torch.Tensor) for o in output)
    if not is_three or output[2].is_floating_point() or output[1].shape != output[2].shape:
        raise UnsupportedModel(f"the router of {path} does not answer (logits [T, E], weight [T, K], index [T, K])")
    return Routing(output[2], output[1], output[0])


def as_answer(routing: Routing, output: Any) -> Any:
    """The routing in the form of the answer that it was made of."""
    if isinstance(output, Routing):
        return routing
    return Answer(routing) if isinstance(output, Answer) else (routing.logits, routing.weight, routing.index)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(slots=True)
class Use:
    """How the experts of a layer were used."""

    slots: torch.Tensor
    """[E] in float64: how many slots went to each."""
    weight: torch.Tensor
    """[E] in float64: the sum of their weights."""
    num_tokens: int = 0

    @property
    def experts_per_token(self) -> float:
        return float(self.slots.sum()) / max(self.num_tokens, 1)


def measure_use(model: nn.Module, sites: Iterable[Site], evaluate: Callable[[], float]) -> tuple[dict[str, Use], float]:
    """How each layer's experts are used while `evaluate` runs the network, in evaluation mode; and what it returns."""
    uses: dict[str, Use] = {}
    hooks = []
    for site in sites:
        none = torch.zeros(site.num_experts, dtype=torch.float64)
        uses[site.path] = use = Use(none.clone(), none.clone())
        hooks.append(site.gate.register_forward_hook(_Counting(use, site.path)))
    try:
        with evaluating(model):
            value = float(evaluate())
    finally:
        for hook in hooks:
            hook.remove()
    if not any(use.num_tokens for use in uses.values()):
        raise InvalidConfig("evaluate() did not run the network: no gate of it was asked")
    return uses, value


class _Counting:
    def __init__(self, use: Use, path: str) -> None:
        self.use, self.path = use, path

    def __call__(self, gate: nn.Module, given: Any, output: Any) -> None:
        routing = as_routing(output, self.path)
        index, weight = routing.index.reshape(-1).cpu(), routing.weight.detach().double().reshape(-1).cpu()
        number = len(self.use.slots)
        self.use.slots += torch.bincount(index, minlength=number + 1)[:number]
        self.use.weight += torch.bincount(index, weight, minlength=number + 1)[:number]
        self.use.num_tokens += len(routing.index)
