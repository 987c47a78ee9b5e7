"""A Mixture-of-Experts layer for anyone's network: a gate, and experts that are here or somewhere else.

`MoELayer` is what `ray_moe.MoELayer` names; what its experts are is in `routed_experts.py`.

Shape legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.architectures.module_experts import module_experts
from ray_moe.ops.capacity import Capacity, CapacitySettings, Overflow
from ray_moe.ops.gates.base import Gate, GateSettings, Routing, TokenInfo, takes_info
from ray_moe.ops.gates.registry import make_gate, make_settings
from ray_moe.ops.losses import AuxiliaryLosses
from ray_moe.ops.routed_experts import Activation, Experts, Handler, RoutedExperts
from ray_moe.types import LayerPath


class MoELayer(nn.Module):
    """A gate, and the experts that it chooses from. Takes and gives [..., D].

    Of the last call, and None before the first: `routing`, what the gate chose (`ray_moe.ops.losses` takes it), and
    `overflow`, what a capacity then did to that.
    """

    def __init__(  # noqa: PLR0913  (as many options as there are)
        self,
        hidden_size: int,
        expert_size: int | None,
        num_experts: int,
        top_k: int | None = None,
        *,
        gate: str | GateSettings | Gate = "topk",
        activation: str | Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        capacity: CapacitySettings | None = None,
        auxiliary: Mapping[str, float] | None = None,
        experts: Literal["local"] | Handler | Sequence[nn.Module] | nn.ModuleList | RoutedExperts = "local",
        path: LayerPath = "experts",
        seed: int | None = None,
    ) -> None:
        """
        Args:
            hidden_size: D.
            expert_size: F; None where the experts are modules.
            num_experts: E.
            top_k: K, of a gate that is made by its name; None for that gate's own default.
            gate: the name of one in `ops/gates/registry.py`, settings of one (`SwitchSettings(jitter=0.01)`), or a
                module, hidden [T, D] -> `Routing`, or (hidden, info) -> `Routing`.
            activation: "silu", "gelu", "gelu_tanh" or "relu", or any function of one tensor.
            gated: whether experts multiply the activation by a second projection (SwiGLU with "silu").
            bias: whether the experts' projections have one. None of the three is of experts that are modules.
            capacity: how many slots each expert takes of a batch, and what becomes of the others; None is no limit.
            auxiliary: what each auxiliary loss is multiplied by, by name (`ray_moe.ops.losses.LOSSES`, and those of the
                gate), such as ``{"load_balancing": 0.01}``; `ray_moe.ops.losses.auxiliary_loss` adds them up.
            experts: "local", weights of this layer; or a list of E modules, [n, D] -> [n, D], of any kind
                (`ops/architectures/module_experts.py`); or who computes them: a `Handler`, through which gradients flow
                as it lets them. The layer has no weights of experts then.
            path: what the handler calls these experts.
            seed: makes the first weights (not those of a gate or of experts that are modules) the same each time; None
                to draw them from torch's own generator.

        Raises: `InvalidConfig` for sizes or names that cannot be.
        """
        super().__init__()
        self.hidden_size = hidden_size
        stack = _own_experts(experts)
        if stack is None:
            if expert_size is None:
                raise InvalidConfig("expert_size is None, which is for experts that are modules (experts=[...])")
            # What a handler answers for needs no memory, not even for a moment.
            with nullcontext() if isinstance(experts, str) else torch.device("meta"):
                stack = Experts(hidden_size, expert_size, num_experts, activation=activation, gated=gated, bias=bias)
            if not isinstance(experts, str):
                stack.answer_with(cast(Handler, experts), path)
        elif stack.num_experts != num_experts or expert_size is not None:
            raise InvalidConfig(
                f"experts are {stack.num_experts} modules; num_experts is {num_experts} and has to be as many, "
                f"expert_size is {expert_size} and has to be None"
            )
        own_gate: Any = _own_gate(gate, top_k, hidden_size, num_experts)
        self.gate: Any = gate if own_gate is None else own_gate
        self._gate_takes_info = takes_info(self.gate)
        self.experts: Any = stack  # `Experts`, or `RoutedExperts` of another kind
        if seed is not None:
            device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
            generator = torch.Generator(device).manual_seed(seed)
            if own_gate is not None:
                own_gate.reset_parameters(generator)
            if isinstance(stack, Experts):
                stack.reset_parameters(generator)
        self.capacity = None if capacity is None else Capacity(capacity)
        self.auxiliary = None if auxiliary is None else AuxiliaryLosses(auxiliary, num_experts)
        self.routing: Routing | None = None
        self.overflow: Overflow | None = None

    def forward(self, hidden: torch.Tensor, info: TokenInfo | None = None) -> torch.Tensor:
        """[..., D] -> [..., D].

        Args:
            hidden: of the tokens.
            info: what else is known about them, each field [...] or [T]; gates that do not ask for it do without.

        Raises: `InvalidRequest` for an `info` that is about other tokens, or lacks what the gate needs.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])
        routing = self.route(tokens, info)
        out: torch.Tensor = self.experts(tokens, routing.index, routing.weight)
        return out.view(hidden.shape)

    def route(self, tokens: torch.Tensor, info: TokenInfo | None = None) -> Routing:
        """[T, D] -> where they go: what the gate chose, and a capacity has room for. Arguments and errors as above."""
        if self._gate_takes_info:
            routing: Routing = self.gate(tokens, None if info is None else info.flat(len(tokens)))
        else:
            routing = self.gate(tokens)
        self.routing = routing
        if self.capacity is not None:
            routing, self.overflow = self.capacity(routing, self.experts.num_experts)
        return routing

    def __getstate__(self) -> dict[str, Any]:
        """A copy has routed nothing yet; besides, torch does not copy tensors that have a history."""
        return {**self.__dict__, "routing": None, "overflow": None}


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a network by path, in its order; of one `MoELayer` itself, under ""."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}


def _own_experts(experts: Any) -> RoutedExperts | None:
    """The experts that a layer was given as modules; None where they are weights of its own, or somebody else's."""
    if isinstance(experts, RoutedExperts):
        return experts
    if isinstance(experts, (list, tuple, nn.ModuleList)):
        return module_experts(experts)
    return None


def _own_gate(
    gate: str | GateSettings | Gate, top_k: int | None, hidden_size: int, num_experts: int
) -> nn.Module | None:
    """The gate that a layer makes for itself; None where it was given one."""
    if isinstance(gate, str):
        gate = make_settings(gate, **({} if top_k is None else {"top_k": top_k}))
    elif isinstance(gate, nn.Module):
        return None
    elif isinstance(gate, type) or not (hasattr(gate, "build") or callable(gate)):
        raise InvalidConfig(f"gate is {gate!r}; give a name, settings (not their class), or a module")
    elif not hasattr(gate, "build"):
        return None
    elif top_k is not None:
        raise InvalidConfig(f"top_k is {top_k} beside gate={gate}; say it there")
    made: nn.Module = make_gate(cast("GateSettings", gate), hidden_size, num_experts)
    return made
