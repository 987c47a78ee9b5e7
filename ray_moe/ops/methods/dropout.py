"""Dropout of whole experts, and within experts.

Whole experts: for a step some do not answer, so that no token can rely on one alone (as NLLB's expert output masking
does for single tokens, arXiv:2207.04672). Within: units of the experts' hidden layer, as the Switch Transformer's
"expert dropout" for fine-tuning (arXiv:2101.03961, 2.4). Both in training only.

Shape legend: T tokens, F expert width, E experts, K experts per token, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.methods.base import Method, Network, Ramp, check_rate, value_at
from ray_moe.ops.methods.sites import Site


@dataclass(frozen=True, slots=True)
class ExpertDropout(Method):
    """Whole experts are left out of a step, each with probability `rate`, one at least is not.

    Which ones is drawn by seed, step and layer, so a step has the same ones however often it is computed. What a token
    has left is divided so that the sum of its weights stays; a token with none left has none.
    """

    rate: float | Ramp
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)

    def dropped(self, site: Site, step: int) -> list[int]:
        """Numbers of the experts that do not answer in a step."""
        draws = torch.rand(site.num_experts, generator=site.generator(self.seed, step))
        is_out = draws < value_at(self.rate, step)
        is_out[draws.argmax()] = False
        numbers: list[int] = is_out.nonzero().flatten().tolist()
        return numbers

    def route(self, site: Site, step: int, routing: Routing) -> Routing:
        dropped = self.dropped(site, step) if site.gate.training else []
        if not dropped:
            return routing
        is_out = torch.isin(routing.index, torch.tensor(dropped, device=routing.index.device))
        kept = routing.weight.masked_fill(is_out, 0)
        left = kept.sum(-1, keepdim=True)
        weight = kept * (routing.weight.sum(-1, keepdim=True) / left.masked_fill(left == 0, 1))
        return replace(routing, index=routing.index.masked_fill(is_out, site.num_experts), weight=weight)


@dataclass(frozen=True, slots=True)
class InnerDropout(Method):
    """Units of the experts' hidden layer [n, F] are dropped with probability `rate`, and the others scaled up.

    Drawn from torch's own generator, as all dropout is. Only for experts that are here.
    """

    rate: float | Ramp

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)

    def attach(self, network: Network) -> None:
        for site in network.sites:
            if not site.is_local:
                raise InvalidConfig(f"the experts of {site.path or 'the layer'} are elsewhere: no dropout reaches them")
            if not callable(getattr(site.experts, "act_fn", None)):
                raise InvalidConfig(f"a {type(site.experts).__name__} has no activation act_fn to drop units of")
        for site in network.sites:
            site.experts.act_fn = _Dropped(site.experts.act_fn, site.experts.training)

    def apply(self, network: Network, step: int) -> None:
        for site in network.sites:
            site.experts.act_fn.rate = value_at(self.rate, step)

    def remove(self, network: Network) -> None:
        for site in network.sites:
            inner = site.experts.act_fn.inner
            if not isinstance(inner, nn.Module):  # torch keeps modules apart from other attributes
                del site.experts.act_fn
            site.experts.act_fn = inner


class _Dropped(nn.Module):
    """An activation and dropout after it; what a gated expert multiplies it by makes no difference to what is zero."""

    def __init__(self, inner: Any, training: bool) -> None:
        super().__init__()
        self.inner, self.rate = inner, 0.0
        self.train(training)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.inner(values), self.rate, self.training)
