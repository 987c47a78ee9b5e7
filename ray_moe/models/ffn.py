"""The feed-forward network of a dense layer, and what becomes of it as an expert.

Pure functions on its three matrices: down(act(gate(x)) * up(x)), whose F neurons are independent of each other, so that
the sum of the parts along F is the whole. Called by `models/upcycle.py`.

Shape legend: D model width, F width of the network or of the part of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class FFN:
    """The matrices of one network, or of some of its neurons."""

    gate: torch.Tensor
    """[F, D]."""
    up: torch.Tensor
    """[F, D]."""
    down: torch.Tensor
    """[D, F]."""


def scaled(ffn: FFN, factor: float) -> FFN:
    """`factor` times the output. A power of two changes no bit of the mantissa, so it is exact in every dtype."""
    return ffn if factor == 1 else FFN(ffn.gate, ffn.up, ffn.down * factor)


def noisy(ffn: FFN, ratio: float, generator: torch.Generator) -> FFN:
    """With Gaussian noise on every weight, its deviation `ratio` times that of the matrix.

    In float32, so that whatever dtype is written rounds once.
    """

    def with_noise(weight: torch.Tensor) -> torch.Tensor:
        exact = weight.float()
        return exact + ratio * _deviation(exact) * torch.randn(exact.shape, generator=generator)

    return ffn if ratio == 0 else FFN(with_noise(ffn.gate), with_noise(ffn.up), with_noise(ffn.down))


def reinitialised(ffn: FFN, share: float, generator: torch.Generator) -> FFN:
    """With a random `share` of the neurons drawn anew (drop-upcycling, arXiv:2502.19261).

    The same neurons in all three matrices; each matrix's new weights are Gaussian with the mean and the deviation of
    those they replace, as in the authors' program (which draws other neurons for each matrix). Share 0 is a copy, 1
    keeps statistics only.
    """
    width = len(ffn.gate)
    dropped = torch.randperm(width, generator=generator)[: int(share * width)]
    if len(dropped) == 0:
        return ffn

    def redrawn(weight_FD: torch.Tensor) -> torch.Tensor:
        fresh_FD = weight_FD.float()
        old = fresh_FD[dropped]
        new = old.mean() + _deviation(old) * torch.randn(old.shape, generator=generator)
        return fresh_FD.index_copy(0, dropped, new)

    return FFN(redrawn(ffn.gate), redrawn(ffn.up), redrawn(ffn.down.T).T)


def seeded(seed: int, *what: object) -> torch.Generator:
    """A generator of its own for each thing that is drawn, so that results do not depend on the order of drawing."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def gate_rows(num_experts: int, group: int, width: int, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """[E, D] for a new gate: Gaussian rows, the same one for the `group` experts that are parts of one network.

    Experts with one row have one logit, so they are chosen together: the virtual groups of arXiv:2410.07524.
    """
    rows = torch.randn(num_experts // group, width, generator=generator) * deviation
    return rows.repeat_interleave(group, dim=0)


def _deviation(weight: torch.Tensor) -> torch.Tensor:
    return weight.std(correction=0)
