"""Curricula: how many experts a token has, and how hard gates choose, as functions of the step.

Few experts first is cheap and many late is strong; many first lets all experts learn, and few late is cheap to serve
(arXiv:2303.01610 raises K step by step, arXiv:2112.14397 lowers it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ray_moe.errors import InvalidConfig, UnsupportedModel
from ray_moe.ops.methods.base import Method, Network, Ramp
from ray_moe.ops.methods.sites import Site, probe


@dataclass(frozen=True, slots=True)
class ActiveExperts(Method):
    """K by schedule, for gates and routers that have a `top_k`. What is left at the end stays.

    Training and evaluation have the same K, that of the last step applied.
    """

    schedule: Ramp
    """K, rounded to the nearest number; halves go to the greater."""

    def attach(self, network: Network) -> None:
        for site in network.sites:
            for top_k in (self.schedule.first, self.schedule.last):
                _check(site, int(top_k + 0.5))

    def apply(self, network: Network, step: int) -> None:
        for site in network.sites:
            set_top_k(site, int(self.schedule.at(step) + 0.5))


@dataclass(frozen=True, slots=True)
class Anneal(Method):
    """Tells gates with a temperature ("gumbel", "dense_to_sparse") the step. Other gates are left alone."""

    begin: int = 0
    """Step that is their first."""

    def attach(self, network: Network) -> None:
        if not any(hasattr(site.gate, "anneal") for site in network.sites):
            raise InvalidConfig('no gate here has a temperature; use "gumbel" or "dense_to_sparse"')

    def apply(self, network: Network, step: int) -> None:
        for site in network.sites:
            if hasattr(site.gate, "anneal"):
                site.gate.anneal(max(step - self.begin, 0))


def top_k_of(site: Site) -> int | None:
    """K of a gate or router; None where it has none."""
    settings = getattr(site.gate, "settings", None)
    top_k: Any = getattr(settings if settings is not None else site.gate, "top_k", None)
    return top_k if isinstance(top_k, int) else None


def set_top_k(site: Site, top_k: int) -> None:
    """Let the gate choose `top_k` experts, or all where there are fewer."""
    top_k = min(top_k, site.num_experts)
    if top_k == top_k_of(site):
        return
    settings = getattr(site.gate, "settings", None)
    if settings is not None:
        site.gate.settings = replace(settings, top_k=top_k)
    else:
        site.gate.top_k = top_k


def _check(site: Site, top_k: int) -> None:
    """Raises: `InvalidConfig` or `UnsupportedModel` where a gate cannot choose so many."""
    before = top_k_of(site)
    if before is None:
        raise InvalidConfig(f"the {type(site.gate).__name__} of {site.path or 'the layer'} has no top_k to change")
    if not 1 <= top_k <= site.num_experts:
        raise InvalidConfig(f"K becomes {top_k}; {site.path or 'the layer'} has {site.num_experts} experts")
    settings = getattr(site.gate, "settings", None)
    if settings is not None:
        with torch.device("meta"):  # what the options may be, the settings know
            replace(settings, top_k=top_k).build(8, site.num_experts)
        return
    try:
        set_top_k(site, top_k)
        if probe(site).index.shape[-1] != top_k:
            raise UnsupportedModel(f"the router of {site.path} does not choose by its top_k; it cannot be changed")
    finally:
        set_top_k(site, before)
