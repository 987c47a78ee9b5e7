"""A Mixture-of-Experts layer for anyone's network: a gate, and experts that are here or somewhere else.

`MoELayer` is what `ray_moe.MoELayer` names. Its experts obey the one contract of this package: hidden [T, D], index
[T, K], weight [T, K] -> [T, D]. They are a module of `transformers`' experts interface, so whatever finds, cuts, loads,
hosts or trains the experts of a checkpoint does so with these (`models/experts.py`).

Shape legend: T tokens, D model width, F expert width, E experts, K experts per token, N = T*K slots, n slots that go to
an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.capacity import Capacity, CapacitySettings, Overflow
from ray_moe.ops.dispatch import combine
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.gates.base import Gate, GateSettings, Routing, TokenInfo, takes_info
from ray_moe.ops.gates.registry import make_gate, make_settings
from ray_moe.ops.losses import AuxiliaryLosses
from ray_moe.types import LayerPath

Handler = Callable[[LayerPath, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Answers for a layer's experts: (path, hidden [T, D], index [T, K], weight [T, K]) -> [T, D]."""

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
}


class RoutedExperts(nn.Module):
    """E experts of any kind behind the one contract. What they compute, its subclasses say.

    With a handler somebody else computes, and there are no weights here.
    """

    is_transposed, is_concatenated, has_post_expert_norm, _is_expert_parallel = False, True, False, False
    _ray_moe_handler: Handler | None = None
    _ray_moe_path: LayerPath = ""
    num_experts: int

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights. Raises: `InvalidConfig` for experts that cannot draw them."""
        raise InvalidConfig(f"{type(self).__name__} came with their weights, and cannot draw fresh ones")

    def answer_with(self, handler: Handler, path: LayerPath) -> None:
        """Let `handler` compute, under the name `path`, and give up the weights that are here."""
        # Not setattr: a handler that is a module must not become a part of this one.
        self.__dict__["_ray_moe_handler"] = handler
        self._ray_moe_path = path
        self._parameters.clear()

    # Not compiled: which rows meet in a product is different in every batch.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden: [T, D].
            index: [T, K] integers in 0..E; E means "no expert".
            weight: [T, K], used in its own dtype.

        Returns: [T, D] in the dtype of `hidden`, differentiable in `hidden`, `weight` and the parameters.

        Raises: `InvalidRequest` for an index that is none; whatever the handler raises.
        """
        if self._ray_moe_handler is not None:
            return self._ray_moe_handler(self._ray_moe_path, hidden, index, weight)
        return run_slots(self._run, hidden, index, weight, self._rows_per_expert(index.reshape(-1)))

    def _run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: the first ``counts[0]`` rows through ``experts[0]``, and so on."""
        return StackedExperts(self).run(rows, experts, counts)

    def _rows_per_expert(self, slots: torch.Tensor) -> list[int]:
        """[N] -> the number of slots that go to each of the E experts."""
        if slots.numel():
            low, high = (int(end) for end in slots.aminmax())
            if low < 0 or high > self.num_experts:
                wrong = low if low < 0 else high
                raise InvalidRequest(
                    f"a token is sent to expert {wrong}; there are 0 to {self.num_experts - 1}, and {self.num_experts} "
                    'for "no expert"'
                )
        counts: list[int] = slots.bincount(minlength=self.num_experts)[: self.num_experts].tolist()
        return counts


class Experts(RoutedExperts):
    """E feed-forward experts: ``down(act(gate(x)) * up(x))`` if `gated`, else ``down(act(up(x)))``.

    Parameters, as `transformers` names them: `gate_up_proj` [E, 2F, D] (or `up_proj` [E, F, D]), `down_proj` [E, D, F],
    and with `bias` the same with ``_bias``, [E, 2F] (or [E, F]) and [E, D]. With a handler there are none.
    """

    down_proj: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        activation: str | Activation = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        """
        Args:
            hidden_size: D.
            expert_size: F.
            num_experts: E.
            activation: a name of `ACTIVATIONS`, or any function of one tensor.
            gated: whether the activation is multiplied by a second projection (SwiGLU with "silu").
            bias: whether the projections have one.

        Raises: `InvalidConfig` for a size below 1 or an unknown activation.
        """
        super().__init__()
        for name, value in {"hidden_size": hidden_size, "expert_size": expert_size, "num_experts": num_experts}.items():
            if value < 1:
                raise InvalidConfig(f"{name} is {value}; it must be 1 or more")
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, expert_size
        self.has_gate, self.has_bias = gated, bias
        self.act_fn = activation_of(activation)
        width, up = (2 * expert_size, "gate_up_proj") if gated else (expert_size, "up_proj")
        shapes: dict[str, tuple[int, ...]] = {up: (width, hidden_size), "down_proj": (hidden_size, expert_size)}
        if bias:
            shapes |= {f"{up}_bias": (width,), "down_proj_bias": (hidden_size,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: uniform within ±1/√(what goes in), as `torch.nn.Linear` has them."""
        for name, parameter in self.named_parameters(recurse=False):
            bound = (self.intermediate_dim if name.startswith("down") else self.hidden_dim) ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def extra_repr(self) -> str:
        where = "" if self._ray_moe_handler is None else f", elsewhere as {self._ray_moe_path!r}"
        return f"{self.num_experts} experts {self.hidden_dim}-{self.intermediate_dim}-{self.hidden_dim}{where}"


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


def run_slots(
    run: Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor],
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """The weighted sum of each token's experts, [T, D], by those that are touched alone.

    Args:
        run: computes rows that are grouped by expert, as `ExpertGroup.run` does.
        hidden: [T, D].
        index: [T, K] integers in 0..E; E means "no expert".
        weight: [T, K].
        counts: how many slots go to each of the E experts.
    """
    slots, top_k = index.reshape(-1), index.shape[-1]
    order = slots.argsort(stable=True)[: sum(counts)]  # "no expert" is last
    touched = [expert for expert, count in enumerate(counts) if count]
    rows = hidden.new_zeros(len(slots), hidden.shape[-1])
    if touched:
        grouped = hidden.index_select(0, order // top_k)
        out = run(grouped, touched, [counts[expert] for expert in touched])
        rows = rows.index_copy(0, order, out)
    return combine(rows, weight)


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a network by path, in its order; of one `MoELayer` itself, under ""."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}


def _own_experts(experts: Any) -> RoutedExperts | None:
    """The experts that a layer was given as modules; None where they are weights of its own, or somebody else's."""
    if isinstance(experts, RoutedExperts):
        return experts
    if isinstance(experts, (list, tuple, nn.ModuleList)):
        from ray_moe.ops.architectures.module_experts import module_experts  # which needs this module

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


def activation_of(activation: str | Activation) -> Activation:
    """The function of that name. Raises: `InvalidConfig` for an unknown one."""
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise InvalidConfig(
            f"unknown activation {activation!r}; give one of {', '.join(ACTIVATIONS)}, or a function of one tensor"
        )
    return ACTIVATIONS[activation]
