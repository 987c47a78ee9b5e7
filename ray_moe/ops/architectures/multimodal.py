"""One stack over tokens of several modalities, whose MoE layers know which is which.

As MoMa (arXiv:2407.21770) and LIMoE (arXiv:2206.02770): tokens of vision and text are one sequence, and a gate such as
"modality" (experts of each modality beside shared ones) or any other routes them. Of which modality a token is, the
layers hear through `TokenInfo`.

Shape legend: B examples, S_m tokens of modality m, S all tokens, D model width, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ray_moe.errors import InvalidRequest
from ray_moe.ops.gates.base import TokenInfo


class MultimodalStack(nn.Module):
    """An encoder for each modality, and one stack over all their tokens."""

    def __init__(self, hidden_size: int, encoders: Iterable[nn.Module], stack: nn.Module) -> None:
        """
        Args:
            hidden_size: D.
            encoders: of each modality, in the order of the gates' modalities: what it takes -> [B, S_m, D].
            stack: (hidden [B, S, D], info) -> [B, S, D], such as a `Stack`.
        """
        super().__init__()
        self.encoders, self.stack = nn.ModuleList(encoders), stack
        self.modality = nn.Parameter(torch.empty(len(self.encoders), hidden_size).normal_(std=0.02))

    def forward(self, inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What the stack makes of each modality's tokens, [B, S_m, D].

        Args: inputs: of each modality; None for those that are not there.

        Raises: `InvalidRequest` for another number of modalities, or none at all.
        """
        if len(inputs) != len(self.encoders):
            raise InvalidRequest(
                f"{len(inputs)} modalities are given; there are {len(self.encoders)} (None for absent)"
            )
        parts = {
            number: encoder(given) + self.modality[number]
            for number, (encoder, given) in enumerate(zip(self.encoders, inputs, strict=True))
            if given is not None
        }
        hidden, info = joined(parts)
        outs = self.stack(hidden, info).split([part.shape[1] for part in parts.values()], dim=1)
        out_of = dict(zip(parts, outs, strict=True))
        return [out_of.get(number) for number in range(len(inputs))]


def joined(parts: dict[int, torch.Tensor]) -> tuple[torch.Tensor, TokenInfo]:
    """Tokens [B, S_m, D] by modality -> all of them, [B, S, D], and of which modality each is, [B, S].

    Raises: `InvalidRequest` for none, or for parts of different batches.
    """
    shapes = {number: list(part.shape) for number, part in parts.items()}
    if len({(shape[0], shape[-1]) for shape in shapes.values()}) != 1:
        raise InvalidRequest(f"tokens are [B, S, D] with one B and D, of one modality at least; got {shapes}")
    hidden = torch.cat(list(parts.values()), dim=1)
    numbers = torch.cat([torch.full(part.shape[1:2], number) for number, part in parts.items()]).to(hidden.device)
    return hidden, TokenInfo(modality=numbers.expand(hidden.shape[:2]))
