"""Fewer experts in stages: at given steps those that are used least go, K shrinks, and training goes on.

What is used is measured then, on data of the caller's, so a stage that is made again takes out the same experts; that a
stage has been made is seen from the number of experts. In the spirit of task-specific expert pruning
(arXiv:2206.00277).

Shape legend: E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ray_moe.errors import InvalidConfig
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.methods.base import Method, Network
from ray_moe.ops.methods.curriculum import set_top_k, top_k_of
from ray_moe.ops.methods.pruning import check_prunable, keep_experts
from ray_moe.ops.methods.sites import Site, Use, measure_use

By = Literal["slots", "weight"]


@dataclass(frozen=True, slots=True)
class Stage:
    """What layers become at a step."""

    step: int
    num_experts: int
    """How many of each layer stay, at the most."""
    top_k: int | None = None
    """K from then on; None leaves it (or makes it `num_experts`, if that is fewer)."""


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage did. Losses are what `evaluate` returned, FLOPs those of all MoE layers for one token."""

    step: int
    kept: Mapping[str, Sequence[int]]
    """By path of the layer, the experts that stayed, by their numbers before."""
    loss_before: float
    loss_after: float
    """At once, before any training."""
    flops_before: float
    flops_after: float
    parameters_before: int
    parameters_after: int
    """Of gates and experts."""

    def __str__(self) -> str:
        number = min(map(len, self.kept.values()), default=0)
        return (
            f"step {self.step}: {number} experts stay; loss {self.loss_before:.4f} -> {self.loss_after:.4f}, "
            f"{self.flops_before / 1e3:,.0f} -> {self.flops_after / 1e3:,.0f} kFLOPs a token, "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        )


class Sparsify(Method):
    """Stages of pruning. Give `Methods` the optimizer, too."""

    def __init__(self, stages: Sequence[Stage], evaluate: Callable[[], float], by: By = "slots") -> None:
        """
        Args:
            stages: steps ascending, numbers of experts not.
            evaluate: runs the network on data that is the same each time and returns the loss. It is called before and
                after each stage, without gradients and in evaluation mode; experts are judged by what it sends them.
            by: whether the experts that stay are those with most slots, or with most weight.

        Raises: `InvalidConfig` for stages that cannot be.
        """
        self.stages, self.evaluate, self.by = tuple(stages), evaluate, by
        self.reports: list[StageReport] = []
        """Of the stages made by this object, in order."""
        if by not in get_args(By):
            raise InvalidConfig(f"by is {by!r}; give one of {', '.join(get_args(By))}")
        if not self.stages:
            raise InvalidConfig("there are no stages; give some")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.step <= before.step or after.num_experts > before.num_experts:
                raise InvalidConfig(f"a stage comes later and has no more experts than the one before; got {stages}")
        for stage in self.stages:
            if stage.num_experts < 1 or not 1 <= (stage.top_k or 1) <= stage.num_experts:
                raise InvalidConfig(f"a stage has 1 expert or more and top_k of 1 to that many; got {stage}")

    def attach(self, network: Network) -> None:
        for site in network.sites:
            if site.layer is None:
                raise InvalidConfig(f"{site.path} is no ray_moe.MoELayer: only those can lose experts")
            for stage in self.stages:
                check_prunable(site.layer, min(stage.num_experts, site.num_experts), stage.top_k)

    def apply(self, network: Network, step: int) -> None:
        """Make the newest stage that is due, if it has not been made."""
        due = [stage for stage in self.stages if stage.step <= step]
        if not due:
            return
        if any(site.num_experts > due[-1].num_experts for site in network.sites):
            self.reports.append(self._shrink(network, due[-1]))
        elif due[-1].top_k is not None:  # after a restart the gates are as they were made
            for site in network.sites:
                set_top_k(site, due[-1].top_k)

    def _shrink(self, network: Network, stage: Stage) -> StageReport:
        uses, loss_before = measure_use(network.model, network.sites, self.evaluate)
        flops_before, parameters_before = _size(network.sites, uses)
        kept: dict[str, list[int]] = {}
        for site in network.sites:
            if site.layer is not None and site.num_experts > stage.num_experts:
                order = getattr(uses[site.path], self.by).argsort(descending=True, stable=True)
                kept[site.path] = sorted(order[: stage.num_experts].tolist())
                keep_experts(site.layer, kept[site.path], network.optimizer)
            if stage.top_k is not None and top_k_of(site) is not None:
                set_top_k(site, stage.top_k)
        uses, loss_after = measure_use(network.model, network.sites, self.evaluate)
        flops_after, parameters_after = _size(network.sites, uses)
        return StageReport(
            stage.step, kept, loss_before, loss_after, flops_before, flops_after, parameters_before, parameters_after
        )


def _size(sites: Sequence[Site], uses: Mapping[str, Use]) -> tuple[float, int]:
    """FLOPs of a token as measured, and parameters, of gates and experts."""
    flops, parameters = 0.0, 0
    for site in sites:
        of_gate = sum(parameter.numel() for parameter in site.gate.parameters())
        flops += 2 * of_gate + uses[site.path].experts_per_token * StackedExperts(site.experts).flops_per_row
        parameters += of_gate + sum(parameter.numel() for parameter in site.experts.parameters())
    return flops, parameters
