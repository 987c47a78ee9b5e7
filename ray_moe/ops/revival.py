"""Giving experts that a gate has left a part of what others do.

As dead codes of a codebook are put where there is data (Jukebox, arXiv:2005.00341, B) and dead neurons where the loss
is (with their optimizer state set to zero), a dead expert becomes a copy of a busy one, and its gate's row a copy of
that one's with noise, so that the tokens of the busy one are divided between the two, and training makes them differ.
Called by `ops/utilization.py`.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.layer import MoELayer
from ray_moe.ops.routed_experts import Experts

Source = Literal["busiest", "fresh"]


@dataclass(frozen=True, slots=True)
class RevivalSettings:
    """How experts are revived. Raises `InvalidConfig` for numbers out of range and names that are none."""

    source: Source = "busiest"
    """What a revived expert's weights are: those of the most used expert plus noise, or fresh ones."""
    noise: float = 0.05
    """Standard deviation of the noise of an expert's weights, relative to that of the weights it is copied from."""
    gate_noise: float = 0.3
    """The same of the gate's row."""

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise InvalidConfig(f"unknown source {self.source!r}; give one of {', '.join(get_args(Source))}")
        for name in ("noise", "gate_noise"):
            if not getattr(self, name) >= 0:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be 0 or more")


@torch.no_grad()
def revive(
    layer: MoELayer,
    utilization: Sequence[float],
    experts: Sequence[int],
    optimizer: torch.optim.Optimizer | None = None,
    settings: RevivalSettings | None = None,
) -> dict[int, int]:
    """Revive some experts of a layer, in place.

    Each takes half of what the busiest expert has, one after the other: when one expert has everything and seven are
    revived, it is copied first, then both of these, then the four. Whatever of the gate has a row for each expert (its
    weight, a noise weight, a selection bias) gets the busy expert's row. Noise is drawn from torch's own generator.

    Args:
        layer: with its experts in it.
        utilization: [E] share of the slots of each expert.
        experts: which to revive.
        optimizer: whose state of what is revived becomes zero.
        settings: how.

    Returns: for each revived expert the one it is a copy of; itself for a fresh one.

    Raises: `InvalidConfig`, and changes nothing, for experts that are elsewhere or a gate without rows for experts.
    """
    settings = settings or RevivalSettings()
    if not list(layer.experts.parameters()):
        raise InvalidConfig("these experts are elsewhere, so they cannot be revived here; bring them home first")
    num_experts = len(utilization)
    tensors = [*layer.gate.parameters(), *layer.gate.buffers()] if isinstance(layer.gate, nn.Module) else []
    rows = [tensor for tensor in tensors if tensor.ndim and tensor.shape[0] == num_experts]
    if not rows:
        raise InvalidConfig(
            f"a {type(layer.gate).__name__} has no row for each of {num_experts} experts: none can be given a share"
        )
    sources = _sources(utilization, experts)
    fresh = _fresh(layer.experts) if settings.source == "fresh" else {}
    for expert, source in sources.items():
        for name, parameter in layer.experts.named_parameters():
            if fresh:
                parameter[expert] = fresh[name][expert]
            else:
                parameter[expert] = parameter[source] + _noise(parameter[source], settings.noise)
        for row in rows:
            amount = settings.gate_noise if isinstance(row, nn.Parameter) else 0.0
            row[expert] = row[source] + _sideways(_noise(row[source], amount), row[source])
    if optimizer is not None:
        for parameter in [*layer.experts.parameters(), *(row for row in rows if isinstance(row, nn.Parameter))]:
            _zero_state(optimizer, parameter, experts)
    return sources if settings.source == "busiest" else {expert: expert for expert in sources}


def _sources(utilization: Sequence[float], experts: Sequence[int]) -> dict[int, int]:
    """Which expert each is copied from: the one with the greatest share, which it halves."""
    shares = [0.0 if expert in experts else share for expert, share in enumerate(utilization)]
    sources = {}
    for expert in experts:
        source = max(range(len(shares)), key=shares.__getitem__)
        sources[expert] = source
        shares[source] /= 2
        shares[expert] = shares[source]
    return sources


def _noise(values: torch.Tensor, amount: float) -> torch.Tensor:
    """Normal, with `amount` times the root mean square of `values`; nothing is drawn for 0."""
    return torch.randn_like(values) * (amount * values.square().mean().sqrt()) if amount else torch.zeros_like(values)


def _sideways(noise: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """What of the noise is at right angles to the row.

    Busy rows lie where most tokens are: with noise along it the copy would take all of its tokens, or none.
    """
    flat, along = noise.flatten(), row.flatten()
    if flat.numel() == 1:
        return noise
    return (flat - along * (flat @ along / along.square().sum().clamp(min=torch.finfo(row.dtype).tiny))).view_as(row)


def _fresh(experts: Experts) -> dict[str, torch.Tensor]:
    """Weights as new experts have them, by name."""
    old = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    experts.reset_parameters()
    fresh = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    for name, parameter in experts.named_parameters():
        parameter.copy_(old[name])
    return fresh


def _zero_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, experts: Sequence[int]) -> None:
    """Momenta that were those of other weights would drive the new ones away; the count of steps is the parameter's."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value[list(experts)] = 0
