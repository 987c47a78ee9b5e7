"""Whether a gate has collapsed onto few experts, and bringing back those that it has left.

`UtilizationMonitor` looks at what the `MoELayer`s of a network chose, keeps how much each expert has been used of late,
says so in a `Report`, and revives experts (`ops/revival.py`) when told to. It changes nothing by itself.

Shape legend: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.layer import moe_layers
from ray_moe.ops.losses import expert_load
from ray_moe.ops.revival import RevivalSettings, revive


@dataclass(frozen=True, slots=True)
class CollapseSettings:
    """What counts as collapsed. Raises `InvalidConfig` for numbers out of range.

    An expert's *fair share* is 1/E of the slots. The thresholds are relative to it, so they mean the same for 8 and for
    256 experts; that an expert under a threshold counts as left is how dead codes of a codebook are told (Jukebox,
    arXiv:2005.00341, B), and the numbers are this package's own.
    """

    decay: float = 0.98
    """Of the moving average over observations: 0.98 looks back over about 50."""
    underused: float = 0.1
    """An expert with less than this part of its fair share is under-used."""
    dead: float = 0.02
    """An expert with less than this part of its fair share is dead."""
    max_underused: float = 0.25
    """A layer of whose experts a greater part is under-used has collapsed."""
    min_entropy: float = 0.5
    """So has one whose usage has less entropy than this, relative to an even one."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InvalidConfig(f"decay is {self.decay}; it must be from 0 to below 1")
        if not 0 <= self.dead <= self.underused <= 1:
            raise InvalidConfig(
                f"dead is {self.dead} and underused {self.underused}; they are parts of a fair share, "
                "0 <= dead <= underused <= 1"
            )
        for name in ("max_underused", "min_entropy"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be from 0 to 1")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How one layer's experts have been used of late."""

    utilization: tuple[float, ...]
    """The share of the slots of each expert; all together 1, or 0 before there was one."""
    settings: CollapseSettings

    @property
    def entropy(self) -> float:
        """Of the utilization, relative to that of an even one: 0 for one expert, 1 for all alike."""
        if len(self.utilization) == 1:
            return 1.0
        return -sum(share * math.log(share) for share in self.utilization if share) / math.log(len(self.utilization))

    @property
    def max_violation(self) -> float:
        """How far the most used expert is over its fair share, in fair shares: MaxVio of arXiv:2408.15664, 4.1."""
        return max(self.utilization) * len(self.utilization) - 1

    @property
    def underused(self) -> tuple[int, ...]:
        """Numbers of the experts that are under-used, dead ones among them."""
        return self._below(self.settings.underused)

    @property
    def dead(self) -> tuple[int, ...]:
        """Numbers of the experts that are dead."""
        return self._below(self.settings.dead)

    @property
    def collapsed(self) -> bool:
        is_few = len(self.underused) > self.settings.max_underused * len(self.utilization)
        return is_few or self.entropy < self.settings.min_entropy

    def _below(self, part: float) -> tuple[int, ...]:
        least = part / len(self.utilization)
        return tuple(expert for expert, share in enumerate(self.utilization) if share < least)

    def __str__(self) -> str:
        busiest = max(range(len(self.utilization)), key=self.utilization.__getitem__)
        return (
            f"{'collapsed' if self.collapsed else 'sound'}: {len(self.underused)} of {len(self.utilization)} experts "
            f"under-used{_numbers(self.underused)}, {len(self.dead)} dead{_numbers(self.dead)}; entropy "
            f"{self.entropy:.2f}; expert {busiest} has {self.utilization[busiest]:.0%} of the slots"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """How the experts of a network have been used of late."""

    layers: Mapping[str, LayerReport]
    """By path, in the network's order."""

    @property
    def underused_share(self) -> float:
        """Of all experts of all layers, the part that is under-used."""
        return self._share([layer.underused for layer in self.layers.values()])

    @property
    def dead_share(self) -> float:
        """Of all experts of all layers, the part that is dead."""
        return self._share([layer.dead for layer in self.layers.values()])

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Paths of the layers that have collapsed."""
        return tuple(path for path, layer in self.layers.items() if layer.collapsed)

    def _share(self, experts: Sequence[Sequence[int]]) -> float:
        return sum(map(len, experts)) / sum(len(layer.utilization) for layer in self.layers.values())

    def __str__(self) -> str:
        head = (
            f"{len(self.collapsed)} of {len(self.layers)} layers collapsed; of all experts {self.underused_share:.1%} "
            f"under-used, {self.dead_share:.1%} dead"
        )
        return "\n".join([head, *(f"  {path or '(the layer)'}: {layer}" for path, layer in self.layers.items())])


class UtilizationMonitor:
    """Keeps how the experts of a network are used.

    Call `observe` after each forward pass, and `report` whenever you like::

        monitor = UtilizationMonitor(model)
        ...
        monitor.observe()
        if step % 100 == 0 and monitor.report().collapsed:
            monitor.revive(optimizer)
    """

    def __init__(self, model: nn.Module, settings: CollapseSettings | None = None) -> None:
        """
        Args:
            model: any network with `MoELayer`s, or one of them.
            settings: what counts as collapsed.

        Raises: `InvalidConfig` for a network without a `MoELayer`.
        """
        self.settings = settings or CollapseSettings()
        self.layers = moe_layers(model)
        if not self.layers:
            raise InvalidConfig("the network has no ray_moe.MoELayer to look at")
        self._faded: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def observe(self, mask: torch.Tensor | None = None) -> None:
        """Take in what the layers chose in their last call. `mask`: [T], true where a token counts; None for all."""
        for path, layer in self.layers.items():
            if layer.routing is not None:
                self.add(path, expert_load(layer.routing, mask))

    @torch.no_grad()
    def add(self, path: str, load: torch.Tensor) -> None:
        """Take in a load [E] of one layer: of all workers, for example. A load of zeros says nothing and is ignored."""
        if path not in self.layers:
            raise InvalidRequest(f"no MoE layer at {path!r}; there are {', '.join(self.layers)}")
        total = load.sum()
        if total > 0:
            share, faded = load.float() / total, self._faded.get(path)
            # The sum of the weights so far is 1 - decay^n; `report` divides by it, so the first look is not a guess.
            faded = torch.zeros_like(share) if faded is None else faded
            self._faded[path] = self.settings.decay * faded + (1 - self.settings.decay) * share

    def report(self) -> Report:
        """How the experts have been used of late. Raises: `InvalidRequest` before the first observation."""
        if not self._faded:
            raise InvalidRequest("no routing was observed yet; call observe() after the forward pass")
        return Report(
            {
                path: LayerReport(tuple((faded / faded.sum()).tolist()), self.settings)
                for path, faded in self._faded.items()
            }
        )

    def forget(self, path: str | None = None) -> None:
        """Begin anew, for one layer or all: after its gate was changed, what was seen before says nothing."""
        for each in list(self._faded) if path is None else [path]:
            self._faded.pop(each, None)

    def revive(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        settings: RevivalSettings | None = None,
        report: Report | None = None,
    ) -> dict[str, dict[int, int]]:
        """Revive the under-used experts of every layer, and forget what was seen of these layers.

        Args:
            optimizer: that of the network, whose state of the revived experts becomes zero; None if it has none yet.
            settings: how.
            report: whose under-used experts; None is that of now.

        Returns: by path, for each revived expert the one that it is a copy of (itself if it was made anew). Layers
            without under-used experts are absent.

        Raises: `InvalidConfig` for experts that are not here, or for a gate that cannot give one a share; then nothing
            has changed in that layer. `InvalidRequest` before the first observation.
        """
        done = {}
        for path, layer in (report or self.report()).layers.items():
            if layer.underused:
                done[path] = revive(self.layers[path], layer.utilization, layer.underused, optimizer, settings)
                self.forget(path)
        return done


def _numbers(experts: Sequence[int], most: int = 8) -> str:
    """ " (1, 2, 3)", or nothing for none."""
    if not experts:
        return ""
    return f" ({', '.join(map(str, experts[:most]))}{', …' if len(experts) > most else ''})"
