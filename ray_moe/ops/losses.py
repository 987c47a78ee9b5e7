"""Auxiliary losses of a gate. Add them, times a small coefficient, to what a network is trained for.

Each is a function of a layer's `Routing`; a `MoELayer` that is told names and coefficients (`auxiliary=`) holds them as
`AuxiliaryLosses`, and `auxiliary_loss` adds up those of all layers of a network. Nothing here chooses experts.

Shape legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.gates.base import Routing, wide

TINY = 1e-12


def load_balancing_loss(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly a gate spreads the tokens: the loss of GShard and the Switch Transformer (arXiv:2101.03961, 4-6).

    E times the sum over the experts of (slots sent there / tokens) times (mean probability); K when all are alike, more
    when few experts are preferred. The counts have no gradient, the probabilities do. For one layer it equals
    `transformers`' `load_balancing_loss_func`, which counts those of all layers as if they were one: what one layer has
    too much of then makes up for what another has too little of. Call this for each layer and take the mean.

    Args:
        routing: of one layer; choices of "no expert" are not counted.
        mask: [T], true where a token counts (no padding); None for all.

    Returns: scalar, float32 or wider.
    """
    probability = _mean(wide(routing.logits).softmax(-1), mask)
    load = expert_load(routing, mask).to(probability)
    return len(load) * torch.dot(load / _num_tokens(routing.logits, mask), probability)


def router_z_loss(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How large the logits are, which makes low precision unstable: the mean of log(sum(exp))².

    From ST-MoE (arXiv:2202.08906, 5).

    Args:
        logits: [T, E].
        mask: [T], true where a token counts (no padding); None for all.

    Returns: scalar, float32 or wider.
    """
    return _mean(wide(logits).logsumexp(-1).square(), mask)


def importance_loss(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly the experts matter: the squared coefficient of variation of the sums of their weights.

    That of the first sparsely gated layer (arXiv:1701.06538, 4): 0 when the weights of all experts have the same sum,
    E - 1 when one has everything. What it says nothing of is how many tokens an expert gets (`load_loss`).

    Args:
        routing: of one layer; its weights are what the gradient goes through.
        mask: [T], true where a token counts (no padding); None for all.

    Returns: scalar, float32 or wider.
    """
    weight = wide(routing.weight)
    if mask is not None:
        weight = weight.masked_fill(~mask.reshape(-1, 1).bool(), 0)
    return squared_variation(_sum_by_expert(routing, weight))


def load_loss(
    clean_logits: torch.Tensor,
    noisy_logits: torch.Tensor,
    noise_std: torch.Tensor,
    top_k: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the tokens are spread, of a gate that adds noise: differentiable where a count is not.

    The squared coefficient of variation of `smooth_load` (arXiv:1701.06538, A). A gate with noise makes it one of
    its `Routing.losses`, under the name "load". Arguments as of `smooth_load`.

    Returns: scalar, float32 or wider.
    """
    return squared_variation(smooth_load(clean_logits, noisy_logits, noise_std, top_k, mask))


def smooth_load(
    clean_logits: torch.Tensor,
    noisy_logits: torch.Tensor,
    noise_std: torch.Tensor,
    top_k: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many tokens each expert gets, as an expectation (arXiv:1701.06538, equations 8 to 10).

    For each token and expert the probability that the expert is among the K greatest if its own noise is drawn again,
    and that of the others stays: that its clean logit plus noise exceeds the K-th greatest of the other noisy logits.

    Args:
        clean_logits: [T, E] before the noise.
        noisy_logits: [T, E] after it: what the K greatest were taken from.
        noise_std: standard deviation of the (normal) noise: [T, E], or what broadcasts to it; more than 0.
        top_k: K. With K = E all tokens go to all.
        mask: [T], true where a token counts; None for all.

    Returns: [E], float32 or wider.
    """
    clean, noisy, std = wide(clean_logits), wide(noisy_logits), wide(noise_std)
    num_experts = clean.shape[-1]
    if top_k >= num_experts:
        probabilities = torch.ones_like(clean)
    else:
        greatest = noisy.topk(top_k + 1, dim=-1).values
        kth, next_one = greatest[:, top_k - 1, None], greatest[:, top_k, None]
        # Without the expert itself, the K-th of the others is one further down if it is among the first K.
        threshold = torch.where(noisy > next_one, next_one, kth)
        probabilities = torch.special.ndtr((clean - threshold) / std)
    if mask is not None:
        probabilities = probabilities.masked_fill(~mask.reshape(-1, 1).bool(), 0)
    return probabilities.sum(0)


class UsageLoss(nn.Module):
    """How unevenly the experts have been used for a while: the coefficient of variation of an average that fades.

    The usage of an expert is its share of the slots as an exponential moving average over the calls in training. The
    loss is the standard deviation of the usages over their mean, 1 / E: 0 when all are alike, sqrt(E - 1) when one has
    everything. A small batch that is uneven by chance costs little then, and an expert that has long been without
    tokens is helped. The counts have no gradient; it goes, whole, to this batch's mean probabilities (straight through,
    arXiv:1308.3432): `decay` smooths its direction and does not make it smaller. As the gradient of a root does not
    vanish near balance, and an average lags, a great coefficient overshoots.
    """

    usage: torch.Tensor

    def __init__(self, num_experts: int, decay: float = 0.95) -> None:
        """
        Args:
            num_experts: E.
            decay: from 0, only this batch, to below 1.

        Raises: `InvalidConfig` for a decay out of range.
        """
        super().__init__()
        if not 0 <= decay < 1:
            raise InvalidConfig(f"decay is {decay}; it must be from 0 to below 1")
        self.decay = decay
        self.register_buffer("usage", torch.full((num_experts,), 1 / num_experts))

    def forward(self, routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scalar, float32 or wider. In training the usage goes on by this batch, so call it once for each."""
        load = expert_load(routing, mask)
        share = load / load.sum().clamp(min=1)
        usage = self.usage.to(share)
        if load.any():
            usage = self.decay * usage + (1 - self.decay) * share
        if self.training and torch.is_grad_enabled():
            # Not in place: `module.to(dtype)` may have made the buffer one of a low precision.
            self.usage = usage.detach()
        probability = _mean(wide(routing.logits).softmax(-1), mask)
        usage = usage + probability - probability.detach()
        return (squared_variation(usage) + TINY).sqrt()  # at 0 a root has no gradient


AuxiliaryLoss = Callable[[Routing, torch.Tensor | None], torch.Tensor]
"""(routing of one layer, mask [T] or None) -> scalar, unscaled."""

LOSSES: dict[str, Callable[[int], AuxiliaryLoss]] = {
    "load_balancing": lambda _: load_balancing_loss,
    "router_z": lambda _: lambda routing, mask: router_z_loss(routing.logits, mask),
    "importance": lambda _: importance_loss,
    "usage": UsageLoss,
}
"""What makes each loss that any gate can have, from E. Those of one kind of gate are in its `Routing.losses`."""


class AuxiliaryLosses(nn.Module):
    """The auxiliary losses of one layer, each with its coefficient."""

    def __init__(self, coefficients: Mapping[str, float], num_experts: int) -> None:
        """
        Args:
            coefficients: what each loss is multiplied by, by name: of `LOSSES`, or of the gate's `Routing.losses`.
            num_experts: E.

        Raises: `InvalidConfig` for none at all, or a coefficient that is not a finite number.
        """
        super().__init__()
        if not coefficients:
            raise InvalidConfig(f"auxiliary names no loss; give some of {', '.join(LOSSES)}, each with a coefficient")
        for name, coefficient in coefficients.items():
            if not math.isfinite(coefficient):
                raise InvalidConfig(f"the coefficient of {name} is {coefficient}; it must be a finite number")
        self.coefficients = dict(coefficients)
        made = {name: LOSSES[name](num_experts) for name in coefficients if name in LOSSES}
        self._functions = {name: loss for name, loss in made.items() if not isinstance(loss, nn.Module)}
        self.stateful = nn.ModuleDict({name: loss for name, loss in made.items() if isinstance(loss, nn.Module)})

    def forward(self, routing: Routing, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Each loss times its coefficient, by name; without those of a gate that tells them in training only.

        Raises: `InvalidConfig` in training for a name that neither `LOSSES` nor the gate knows.
        """
        return {
            name: factor * self._loss(name, routing, mask)
            for name, factor in self.coefficients.items()
            if self.training or name in LOSSES or name in routing.losses
        }

    def _loss(self, name: str, routing: Routing, mask: torch.Tensor | None) -> torch.Tensor:
        if name in routing.losses:
            return routing.losses[name]
        if name in self._functions:
            return self._functions[name](routing, mask)
        if name in self.stateful:
            loss: torch.Tensor = self.stateful[name](routing, mask)
            return loss
        raise InvalidConfig(
            f"no auxiliary loss is named {name!r}; there are {', '.join(LOSSES)}, and from this gate "
            f"{', '.join(routing.losses) or 'none'}"
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={factor:g}" for name, factor in self.coefficients.items())


def auxiliary_loss(model: nn.Module, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What all MoE layers of a network cost beside its own loss: add it to that before `backward`.

    The sum over the layers that were made with `auxiliary`, of the routing of their last call; so the coefficients are
    those of one layer. Call it once for each forward pass.

    Args:
        model: any network with `MoELayer`s, or one of them.
        mask: of any shape with T elements, true where a token counts (no padding); None for all.

    Returns: scalar.

    Raises: `InvalidConfig` when no layer has an auxiliary loss, or for a name that is none; `InvalidRequest` when none
    has been called.
    """
    losses = list(auxiliary_losses(model, mask).values())
    return torch.stack(losses).sum() if losses else torch.zeros(())


def auxiliary_losses(model: nn.Module, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The same by name, each summed over the layers and times its coefficient: what to look at while training."""
    layers: list[Any] = [
        each for each in model.modules() if isinstance(getattr(each, "auxiliary", None), AuxiliaryLosses)
    ]
    if not layers:
        raise InvalidConfig(
            'no MoE layer here has an auxiliary loss; make them with MoELayer(auxiliary={"load_balancing": 0.01})'
        )
    routings = [(layer.auxiliary, layer.routing) for layer in layers if layer.routing is not None]
    if not routings:
        raise InvalidRequest("no MoE layer here has been called yet; compute the network's output first")
    sums: dict[str, torch.Tensor] = {}
    for losses, routing in routings:
        for name, loss in losses(routing, mask).items():
            sums[name] = sums[name] + loss if name in sums else loss
    return sums


def expert_load(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[E] in float32: how many slots go to each expert, without choices of "no expert" and tokens that do not count."""
    ones = torch.ones_like(routing.index, dtype=torch.float32)
    return _sum_by_expert(routing, ones if mask is None else ones * mask.reshape(-1, 1))


def squared_variation(values: torch.Tensor) -> torch.Tensor:
    """[E] -> scalar: the squared coefficient of variation, variance over squared mean; 0 for all zeros."""
    return values.var(correction=0) / (values.mean().square() + TINY)


def _sum_by_expert(routing: Routing, values: torch.Tensor) -> torch.Tensor:
    """[T, K] -> [E]."""
    num_experts = routing.logits.shape[-1]
    sums = values.new_zeros(num_experts + 1)
    return sums.scatter_add(0, routing.index.reshape(-1).long(), values.reshape(-1))[:num_experts]


def _num_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | int:
    """At least one, so that a batch that is all padding (or none) has no NaN."""
    return max(len(values), 1) if mask is None else mask.count_nonzero().clamp(min=1)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[T, ...] -> [...]: the mean over the tokens that count."""
    if mask is not None:
        mask = mask.reshape(-1, *(1,) * (values.ndim - 1)).bool()
        values = values.masked_fill(~mask, 0)
    return values.sum(0) / _num_tokens(values, mask)
