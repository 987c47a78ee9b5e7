"""What a method of training is: what it does before a step, and to what gates choose.

A method is told the number of the step and keeps no count of its own, so a step that is made again is the same again.
Whatever has become of the network (that experts were diversified, or are fewer) is seen in the network and saved with
its weights. `driver.py` calls methods in the order in which they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.base import Routing
from ray_moe.ops.methods.sites import Site

Shape = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """What methods work on."""

    model: nn.Module
    sites: Sequence[Site]
    optimizer: torch.optim.Optimizer | None
    """That of the model's parameters, whose state follows when parameters change; None if there is none."""


class Method:
    """Does nothing: what methods have in common."""

    def attach(self, network: Network) -> None:
        """Once, before anything else. Raises: `InvalidConfig` for a network that the method cannot work on."""

    def apply(self, network: Network, step: int) -> None:
        """Before each step (from 0), as often as one likes. Must be a function of the step and the network."""

    def route(self, site: Site, step: int, routing: Routing) -> Routing:
        """What becomes of what a gate chose, in training and outside (``site.gate.training``)."""
        return routing

    def remove(self, network: Network) -> None:
        """At the end: undo what is not the network's own."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """A number that goes from `first` to `last`. Raises `InvalidConfig` for numbers that cannot be."""

    first: float
    """Up to step `begin`."""
    last: float
    """From step ``begin + steps`` on."""
    steps: int
    begin: int = 0
    shape: Shape = "linear"
    """How it goes between: at constant speed, along half a cosine, or by a constant factor."""

    def __post_init__(self) -> None:
        for holds, said in (
            (math.isfinite(self.first) and math.isfinite(self.last), "first and last are finite"),
            (self.steps >= 1, "steps is 1 or more"),
            (self.begin >= 0, "begin is 0 or more"),
            (self.shape in get_args(Shape), f"shape is one of {', '.join(get_args(Shape))}"),
            (
                self.shape != "exponential" or min(self.first, self.last) > 0,
                "exponential goes between positive numbers",
            ),
        ):
            if not holds:
                raise InvalidConfig(f"{said}; got {self}")

    def at(self, step: int) -> float:
        """Of a step, from 0."""
        if step <= self.begin:
            return self.first
        if step >= self.begin + self.steps:
            return self.last
        done = (step - self.begin) / self.steps
        if self.shape == "exponential":
            return self.first * math.pow(self.last / self.first, done)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.first + (self.last - self.first) * done


def value_at(number: float | Ramp, step: int) -> float:
    return number.at(step) if isinstance(number, Ramp) else number


def check_rate(name: str, rate: float | Ramp) -> None:
    """Raises: `InvalidConfig` for a rate that is not always in [0, 1)."""
    for value in (rate.first, rate.last) if isinstance(rate, Ramp) else (rate,):
        if not 0 <= value < 1:
            raise InvalidConfig(f"{name} is {value}; it must be from 0 to below 1")
