"""The experts of a layer for anyone's network, behind the one contract: hidden [T, D], index [T, K], weight [T, K] ->
[T, D].

They are modules of `transformers`' experts interface, so whatever finds, cuts, loads, hosts or trains the experts of a
checkpoint does so with these (`models/experts.py`). Made by `ops/layer.py` and `ops/architectures/`; chooses nothing.

Shape legend: T tokens, D model width, F expert width, E experts, K experts per token, N = T*K slots, n slots that go to
an expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.dispatch import FEW_SLOTS, combine
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.slots import combine_grouped, group
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
        return run_slots(self._run, hidden, index, weight, self.num_experts)

    def _run(self, rows: torch.Tensor, experts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[n, D] -> [n, D]: the first ``counts[0]`` rows through ``experts[0]``, and so on."""
        return StackedExperts(self).run(rows, experts, counts)


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


def run_slots(
    run: Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor],
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    num_experts: int,
) -> torch.Tensor:
    """The weighted sum of each token's experts, [T, D], by those that are touched alone.

    Args:
        run: computes rows that are grouped by expert, as `ExpertGroup.run` does.
        hidden: [T, D].
        index: [T, K] integers in 0..E; E means "no expert".
        weight: [T, K].
        num_experts: E.

    Raises: `InvalidRequest` for an index that is none.
    """
    slots, top_k = index.reshape(-1), index.shape[-1]
    if len(slots) <= FEW_SLOTS and slots.is_cpu and not torch.is_grad_enabled():
        return _run_few(run, hidden, slots.tolist(), weight, num_experts)
    counts = _rows_per_expert(slots, num_experts)
    order = slots.argsort(stable=True)
    touched = [expert for expert, count in enumerate(counts) if count]
    if not touched:
        return combine(hidden.new_zeros(len(slots), hidden.shape[-1]), weight)
    rows_of_touched = [counts[expert] for expert in touched]
    if sum(counts) == len(slots) and slots.is_cpu:
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        out = run(group(hidden, order, place, top_k), touched, rows_of_touched)
        return combine_grouped(out, place, weight)
    order = order[: sum(counts)]  # "no expert" is last
    out = run(hidden.index_select(0, order // top_k), touched, rows_of_touched)
    return combine(hidden.new_zeros(len(slots), hidden.shape[-1]).index_copy(0, order, out), weight)


def _run_few(
    run: Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor],
    hidden: torch.Tensor,
    slots: list[int],
    weight: torch.Tensor,
    num_experts: int,
) -> torch.Tensor:
    """The same for a handful of slots (decoding), where calls of torch take longer than what they do."""
    order = sorted(range(len(slots)), key=slots.__getitem__)
    counts = Counter(slots[slot] for slot in order)
    for expert in (slots[order[0]], slots[order[-1]]) if slots else ():
        _check(expert, num_experts)
    kept = order[: len(order) - counts.pop(num_experts, 0)]
    if not kept:
        return torch.zeros_like(hidden)
    tokens = [slot // weight.shape[-1] for slot in kept]
    grouped = hidden.expand(len(kept), -1) if len(hidden) == 1 else hidden[tokens]
    rows = run(grouped, list(counts), list(counts.values()))
    if kept != list(range(len(slots))):
        rows = hidden.new_zeros(len(slots), rows.shape[-1]).index_copy_(0, torch.tensor(kept), rows)
    return combine(rows, weight)


def _rows_per_expert(slots: torch.Tensor, num_experts: int) -> list[int]:
    """[N] -> the number of slots that go to each of the E experts."""
    if slots.numel():
        for end in slots.aminmax():
            _check(int(end), num_experts)
    counts: list[int] = slots.bincount(minlength=num_experts)[:num_experts].tolist()
    return counts


def _check(expert: int, num_experts: int) -> None:
    if not 0 <= expert <= num_experts:
        raise InvalidRequest(
            f'a token is sent to expert {expert}; there are 0 to {num_experts - 1}, and {num_experts} for "no expert"'
        )


def activation_of(activation: str | Activation) -> Activation:
    """The function of that name. Raises: `InvalidConfig` for an unknown one."""
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise InvalidConfig(
            f"unknown activation {activation!r}; give one of {', '.join(ACTIVATIONS)}, or a function of one tensor"
        )
    return ACTIVATIONS[activation]
