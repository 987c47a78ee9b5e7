"""Low-rank adapters of experts: two small matrices beside each matrix of an expert, which alone learn.

They are tensors of the expert like any other (``gate_up_proj_lora_A`` beside ``gate_up_proj``), so they are stepped,
moved and saved as these are. The mathematics is that of `peft`'s `target_parameters`.

Shape legend: r rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ray_moe.errors import InvalidConfig

Tensors = Mapping[str, torch.Tensor]

_A, _B = "_lora_A", "_lora_B"


def is_adapter(name: str) -> bool:
    """Whether a tensor of an expert is a part of an adapter."""
    return name.endswith((_A, _B))


@dataclass(frozen=True, slots=True)
class ExpertAdapters:
    """What adapters the experts of a run have."""

    rank: int
    alpha: float
    """Times ``1 / rank`` it is what the product of the two is multiplied by."""
    seed: int = 0
    """Of the first weights, which change nothing yet."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def added(self, tensors: Tensors, is_transposed: bool, name: str) -> dict[str, torch.Tensor]:
        """An expert with adapters: those that it has, else new ones, which are the same wherever they are made.

        Args:
            tensors: of the expert.
            is_transposed: whether its matrices are [in, out].
            name: of the expert, unlike that of any other.

        Raises: `InvalidConfig` for adapters of another rank.
        """
        added = dict(tensors)
        for matrix, weight in tensors.items():
            if weight.ndim != 2 or is_adapter(matrix):
                continue
            num_out, num_in = reversed(weight.shape) if is_transposed else weight.shape
            if f"{matrix}{_A}" not in added:
                digest = hashlib.sha256(f"{self.seed}/{name}/{matrix}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                down = torch.empty(self.rank, num_in).uniform_(-(num_in**-0.5), num_in**-0.5, generator=generator)
                added[f"{matrix}{_A}"] = down.to(weight)
                added[f"{matrix}{_B}"] = weight.new_zeros(num_out, self.rank)
            elif (rank := len(added[f"{matrix}{_A}"])) != self.rank:
                raise InvalidConfig(f"the adapters of {name} have rank {rank}, and {self.rank} is asked for")
        return added

    def merged(self, tensors: Tensors, is_transposed: bool) -> dict[str, torch.Tensor]:
        """The expert's own tensors with what its adapters add; differentiable in these."""
        return merged(tensors, is_transposed, self.scale)


def merged(tensors: Tensors, is_transposed: bool, scale: float) -> dict[str, torch.Tensor]:
    """As `ExpertAdapters.merged`."""
    whole = {}
    for name, weight in tensors.items():
        if is_adapter(name):
            continue
        down, up = tensors.get(f"{name}{_A}"), tensors.get(f"{name}{_B}")
        if down is None or up is None:
            whole[name] = weight
        else:
            update = up @ down
            whole[name] = weight + scale * (update.t() if is_transposed else update)
    return whole
