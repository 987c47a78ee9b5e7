"""What a gate is: the learned choice of experts for each token.

Every gate, of this package (`registry.py`) or of a user's own, is a module that takes hidden [T, D] and answers a
`Routing`. A gate that needs to know more about the tokens takes a `TokenInfo` as its second argument, named `info`.

A gate that draws at random draws from torch's own generator of the device, and only in training mode. So
`torch.manual_seed` decides it, and `torch.utils.checkpoint`, which restores that generator, computes the same routing
again. No gate counts its calls, for the same reason: what changes with the step is told from outside.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ray_moe.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the tokens of a batch go."""

    index: torch.Tensor
    """[T, K] integers in 0..E; E means "no expert"."""
    weight: torch.Tensor
    """[T, K] what each chosen expert's output is multiplied by; through it the gate learns."""
    logits: torch.Tensor
    """[T, E] what the choice was made from, for the auxiliary losses (`ops/losses.py`)."""
    losses: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Scalars that this gate wants to be minimised beside, by name; to be scaled by who adds them up."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What is known about the tokens beside their hidden states."""

    task: torch.Tensor | None = None
    """[T] integers: whose gate a token is asked of, for gates of several tasks."""
    modality: torch.Tensor | None = None
    """[T] integers: what kind of thing a token is of, for gates with experts of each kind."""
    ids: torch.Tensor | None = None
    """[T] integers: which token of the vocabulary it is, for gates that hash."""

    def flat(self, num_tokens: int) -> TokenInfo:
        """The same with each field as [T], whatever its leading shape was.

        Raises: `InvalidRequest` for a field that is not about `num_tokens` tokens.
        """
        return TokenInfo(*(_flat(name, getattr(self, name), num_tokens) for name in ("task", "modality", "ids")))


class Gate(Protocol):
    """A `torch.nn.Module` with this call, or with ``(hidden, info: TokenInfo | None)``."""

    def __call__(self, hidden: torch.Tensor) -> Routing: ...


class GateSettings(Protocol):
    """Which gate it is, and its options: a frozen dataclass (those of this package are in `registry.py`)."""

    def build(self, hidden_size: int, num_experts: int) -> Any:
        """A `Gate` for D and E that has drawn its first weights, and does again with `reset_parameters(generator)`.

        Raises: `InvalidConfig` where the options do not fit E.
        """
        ...


def takes_info(gate: Any) -> bool:
    """Whether a gate has an argument named `info`."""
    return "info" in inspect.signature(getattr(gate, "forward", gate)).parameters


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float32, or what is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def known(info: TokenInfo | None, name: str, number: int) -> torch.Tensor:
    """[T] a field of `info`, for a gate that has to know it.

    Raises: `InvalidRequest` where it is not there, or not in 0..number-1.
    """
    values: torch.Tensor | None = getattr(info, name, None)
    if values is None:
        raise InvalidRequest(f"this gate has to know the {name} of each token; give TokenInfo({name}=...)")
    if values.numel():
        low, high = (int(end) for end in values.aminmax())
        if low < 0 or high >= number:
            raise InvalidRequest(f"a token has the {name} {low if low < 0 else high}; there are 0 to {number - 1}")
    return values.long()


def _flat(name: str, values: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    if values is None:
        return None
    if values.numel() != num_tokens:
        raise InvalidRequest(
            f"{name} has the shape {list(values.shape)} and is about {values.numel()} tokens; there are {num_tokens}"
        )
    if values.is_floating_point() or values.is_complex():
        raise InvalidRequest(f"{name} is of {values.dtype}; give integers")
    return values.reshape(-1)
