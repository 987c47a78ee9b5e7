"""What a gate is: the learned choice of experts for each token.

Every gate, of this package or of a user's own, is a module that takes hidden [T, D] and answers a `Routing`.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the tokens of a batch go."""

    index: torch.Tensor
    """[T, K] integers in 0..E; E means "no expert"."""
    weight: torch.Tensor
    """[T, K] what each chosen expert's output is multiplied by; through it the gate learns."""
    logits: torch.Tensor
    """[T, E] what the choice was made from, for the auxiliary losses (`ops/losses.py`)."""


class Gate(Protocol):
    """A `torch.nn.Module` with this call."""

    def __call__(self, hidden: torch.Tensor) -> Routing: ...
