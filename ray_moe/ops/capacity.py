"""How many tokens an expert takes of one batch, and what becomes of those it has no room for.

`limit` stands between a gate and the experts: the gate's `Routing` goes in, one that no expert is overrun by comes out,
beside an `Overflow` that counts whatever was dropped or moved. It is a function of its arguments (and, for policy
"random", of torch's generator of the device), so a forward pass that is computed again gives the same. `Capacity` is
what a `MoELayer` holds: the settings, and the one thing that may change, an adaptive factor. Knows nothing of how
experts compute.

Shape legend: T tokens, E experts, K experts per token, N = T*K slots, n slots of some kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.gates.base import Routing, wide
from ray_moe.ops.rerouting import count_slots, find_room, rank

Policy = Literal["drop", "next", "random", "none"]
Priority = Literal["position", "probability"]

UNIT = 1e-6
"""Capacities are rounded up, but not for what is only an error of floating point: 1.1 times 10 is 11."""


@dataclass(frozen=True, slots=True)
class CapacitySettings:
    """Of one layer. Raises `InvalidConfig` for numbers out of range and names that are none."""

    factor: float = 1.25
    """An expert takes ``factor * slots / E`` slots of a batch, rounded up; ``math.inf`` is no limit."""
    eval_factor: float | None = None
    """The factor outside of training; None is that of training, as it is then."""
    min_capacity: int = 1
    """What every expert takes at least, which matters in small batches."""
    policy: Policy = "drop"
    """What becomes of a slot that its expert has no room for. "drop": nothing computes it (Switch, arXiv:2101.03961).
    "next": the token's next most probable expert that has room takes it. "random": any expert that has room does
    (outside of training, where nothing is random, the next most probable). "none": its expert does, and the overflow is
    only counted. An expert never takes a token twice; with no expert left, the slot is dropped."""
    priority: Priority = "position"
    """Who comes first. "position": first choices before second ones, and of these earlier tokens before later
    (GShard, arXiv:2006.16668). "probability": the same, but tokens whose greatest probability is higher before others
    (batch prioritised routing, arXiv:2106.05974)."""
    adaptive: bool = False
    """Whether `Capacity.adapt` changes the factor of training."""
    target: float = 0.01
    """Adaptive: the share of the slots that may find no room."""
    rate: float = 0.1
    """Adaptive: how far one step goes towards the factor that would have met the target."""
    min_factor: float = 1.0
    max_factor: float = 4.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("policy", self.policy, get_args(Policy)),
            ("priority", self.priority, get_args(Priority)),
        ):
            if value not in known:
                raise InvalidConfig(f"unknown {name} {value!r} of a capacity; give one of {', '.join(known)}")
        for name in ("factor", "eval_factor", "min_factor", "max_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidConfig(f"{name} of a capacity is {value}; it must be more than 0 (math.inf is no limit)")
        if self.min_capacity < 0:
            raise InvalidConfig(f"min_capacity is {self.min_capacity}; it must be 0 or more")
        if not 0 <= self.target < 1:
            raise InvalidConfig(f"target of a capacity is {self.target}; it is a share of the slots, from 0 to below 1")
        if not 0 < self.rate <= 1:
            raise InvalidConfig(f"rate of a capacity is {self.rate}; it must be more than 0 and at most 1")
        if self.adaptive and not self.min_factor <= self.factor <= self.max_factor < math.inf:
            raise InvalidConfig(
                f"factor {self.factor} of an adaptive capacity is not within {self.min_factor} (min_factor) and "
                f"{self.max_factor} (max_factor), both finite"
            )


@dataclass(frozen=True, slots=True)
class Overflow:
    """What a capacity did to one batch: ``wanted.sum() == computed.sum() + dropped.sum()``, always."""

    capacity: float
    """Slots that an expert has room for; infinite without a limit."""
    wanted: torch.Tensor
    """[E] slots that the gate sent to each expert."""
    computed: torch.Tensor
    """[E] slots that each expert computes, those of others that were moved to it included."""
    dropped: torch.Tensor
    """[E] slots of each expert that nothing computes."""
    moved: torch.Tensor
    """[E] slots of each expert that another one computes."""

    @property
    def over(self) -> torch.Tensor:
        """[E] slots that found no room: dropped, moved, or (policy "none") computed nevertheless."""
        return (self.wanted - self.capacity).clamp(min=0).to(self.wanted.dtype)

    @property
    def over_share(self) -> float:
        """The part of the slots that found no room."""
        return _share(self.over, self.wanted)

    @property
    def dropped_share(self) -> float:
        """The part of the slots that nothing computes."""
        return _share(self.dropped, self.wanted)

    def __str__(self) -> str:
        return (
            f"{int(self.wanted.sum())} slots, room for {self.capacity:g} an expert: {int(self.over.sum())} over, "
            f"{int(self.moved.sum())} moved, {int(self.dropped.sum())} dropped ({self.dropped_share:.1%})"
        )


class Capacity(nn.Module):
    """The capacity of a layer: its settings and, if adaptive, the factor as it is now (a buffer, so it is saved)."""

    factor: float | torch.Tensor

    def __init__(self, settings: CapacitySettings) -> None:
        super().__init__()
        self.settings = settings
        if settings.adaptive:
            self.register_buffer("factor", torch.tensor(settings.factor, dtype=torch.float64))
        else:
            self.factor = settings.factor

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the counts decide how far it goes
    def forward(self, routing: Routing, num_experts: int) -> tuple[Routing, Overflow]:
        """`limit` with the factor of training or of evaluation, whichever this module is in."""
        factor = self.settings.eval_factor if not self.training else None
        return limit(
            routing, num_experts, self.settings, float(self.factor) if factor is None else factor, self.training
        )

    @torch.no_grad()
    def adapt(self, wanted: torch.Tensor) -> float:
        """Go towards the factor with which no more than `target` of the slots would have found no room.

        To be called once a step, by `adapt_capacity` or a loop of one's own, not by the forward pass: a pass that is
        computed again for its gradient has to find the same capacity.

        Args:
            wanted: [E] slots that gates sent to each expert (`Overflow.wanted`). Sums over micro-batches and workers
                will do; with those of all workers, all keep the same factor.

        Returns: the factor from now on.

        Raises: `InvalidConfig` when the settings are not adaptive; `InvalidRequest` for a load that is none.
        """
        settings = self.settings
        if not isinstance(self.factor, torch.Tensor):
            raise InvalidConfig("this capacity is not adaptive; make it with CapacitySettings(adaptive=True)")
        if wanted.ndim != 1 or not torch.isfinite(wanted).all() or (wanted < 0).any():
            raise InvalidRequest(f"a load is a vector [E] of counts; this one is {wanted}")
        if wanted.sum() > 0:
            needed = factor_for(wanted, settings.target)
            now = float(self.factor) + settings.rate * (needed - float(self.factor))
            # Not in place: `module.to(dtype)` may have made the buffer one of a low precision.
            self.factor = torch.tensor(
                min(max(now, settings.min_factor), settings.max_factor), dtype=torch.float64, device=self.factor.device
            )
        return float(self.factor)

    def extra_repr(self) -> str:
        return f"factor={float(self.factor):g}, policy={self.settings.policy}, priority={self.settings.priority}"


def adapt_capacity(model: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
    """Adapt every adaptive capacity in a network to the last batch. Call it once a step.

    Args:
        model: any network, or one `MoELayer`.
        reduce: [E] -> [E], the sum of a load over all workers; None with one worker.

    Returns: the new factors, by path of the layer; those that have seen no batch are absent.
    """
    factors = {}
    for path, layer in model.named_modules():
        capacity, overflow = getattr(layer, "capacity", None), getattr(layer, "overflow", None)
        if isinstance(capacity, Capacity) and capacity.settings.adaptive and isinstance(overflow, Overflow):
            factors[path] = capacity.adapt(overflow.wanted if reduce is None else reduce(overflow.wanted))
    return factors


def factor_for(wanted: torch.Tensor, target: float) -> float:
    """The least capacity factor with which at most `target` of the slots find no room.

    What is over a capacity C is the greatest of (sum of the j greatest loads) - j C, for j = 0..E. So C must be at
    least ((sum of the j greatest) - allowed) / j for every j.

    Args:
        wanted: [E] slots of each expert, some of them more than 0.
    """
    greatest = wanted.double().sort(descending=True).values.cumsum(0)
    total, number = greatest[-1], torch.arange(1, len(wanted) + 1, device=wanted.device)
    return float(((greatest - target * total) / number).max() * len(wanted) / total)


def limit(
    routing: Routing,
    num_experts: int,
    settings: CapacitySettings,
    factor: float | None = None,
    training: bool = True,
) -> tuple[Routing, Overflow]:
    """Make room: no expert gets more slots than its capacity (but with policy "none").

    Own choices come before moved ones: a slot that was moved takes only room that is left. Moved slots go, in order of
    priority, each to the best expert for it that still has room. A slot moved by "next" has the weight that it had,
    times how much less probable its new expert is (softmax of the logits; never more): with weights that are such
    probabilities, this is the new expert's. By "random" it keeps its weight. What is dropped has the weight 0 and the
    index E.

    Args:
        routing: the gate's.
        num_experts: E.
        settings: see there.
        factor: in place of that of the settings.
        training: false for no randomness.

    Returns: the routing for the experts, and what was counted.
    """
    num_tokens, top_k = routing.index.shape
    wanted = count_slots(routing.index, num_experts)
    capacity = _capacity(int(wanted.sum()), num_experts, settings, settings.factor if factor is None else factor)
    nothing = torch.zeros_like(wanted)
    if settings.policy == "none" or not bool((wanted > capacity).any()):
        return routing, Overflow(capacity, wanted, wanted, nothing, nothing)
    room = int(capacity)
    order = _token_order(routing, settings.priority)
    # Choice by choice: [K, T] -> N slots in order of priority.
    index = routing.index[order].t().long()
    has_room = (rank(index.reshape(-1), num_experts) < room).view(top_k, num_tokens)
    new = torch.where(has_room, index, num_experts)
    if settings.policy != "drop":
        logits = routing.logits.detach()[order]
        if settings.policy == "random" and training:
            logits = torch.rand_like(logits).masked_fill(logits.isneginf(), -math.inf)
        new = find_room(index, new, logits, room)
    new_index = torch.empty_like(routing.index)
    new_index[order] = new.t().to(new_index.dtype)
    lost = (new_index == num_experts) & (routing.index != num_experts)
    moved = (new_index != routing.index) & ~lost
    weight = routing.weight.masked_fill(lost, 0)
    if settings.policy == "next" or (settings.policy == "random" and not training):
        weight = weight * _ratio(routing, new_index, moved).to(weight.dtype)
    overflow = Overflow(
        capacity,
        wanted,
        count_slots(new_index, num_experts),
        count_slots(routing.index.where(lost, num_experts), num_experts),
        count_slots(routing.index.where(moved, num_experts), num_experts),
    )
    return replace(routing, index=new_index, weight=weight), overflow


def _capacity(num_slots: int, num_experts: int, settings: CapacitySettings, factor: float) -> float:
    if math.isinf(factor):
        return math.inf
    return max(math.ceil(factor * num_slots / num_experts - UNIT), settings.min_capacity)


def _token_order(routing: Routing, priority: Priority) -> torch.Tensor:
    """[T] the tokens, those who come first first."""
    if priority == "position":
        return torch.arange(len(routing.index), device=routing.index.device)
    return wide(routing.logits.detach()).softmax(-1).amax(-1).argsort(descending=True, stable=True)


def _ratio(routing: Routing, new_index: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """[T, K] how much less probable the expert of a moved slot is than the one that had no room; 1 elsewhere."""
    logits = wide(routing.logits)

    def of(index: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, index.long().where(moved, 0))

    return (of(new_index) - of(routing.index)).clamp(max=0).masked_fill(~moved, 0).exp()


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return float(part.sum()) / max(float(whole.sum()), 1.0)
