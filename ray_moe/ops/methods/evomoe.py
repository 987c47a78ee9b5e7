"""EvoMoE (arXiv:2112.14397): one expert is trained, becomes many, and a dense gate becomes a sparse one.

First all tokens go to the first expert, so the network learns as a dense one does, and as cheaply. Then all experts
become copies of it, each with other weights set to zero, so that they differ (expert-diversify). From then on the gate
falls from all experts to few (gate-sparsify, `ops/gates/dense_to_sparse.py`).

Shape legend: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.dense_to_sparse import DenseToSparseGate
from ray_moe.ops.methods.base import Method, Network
from ray_moe.ops.methods.pruning import spread_state
from ray_moe.ops.methods.sites import Site


@dataclass(frozen=True, slots=True)
class EvoMoE(Method):
    """For layers with a "dense_to_sparse" gate; others are left alone. Give `Methods` the optimizer, too.

    That a layer has one expert yet is said by a buffer of its gate, saved with its weights.
    """

    diversify: int
    """The first step with many experts, which is the gate's first."""
    mask: float = 0.1
    """Share of the weights of each copy that become zero. The first expert stays whole."""
    noise: float = 0.0
    """Standard deviation of noise on each copy, relative to the root mean square of a weight."""
    seed: int = 0

    def __post_init__(self) -> None:
        for holds, said in (
            (self.diversify >= 0, "diversify is 0 or more"),
            (0 <= self.mask < 1, "mask is in [0, 1)"),
            (self.noise >= 0, "noise is 0 or more"),
        ):
            if not holds:
                raise InvalidConfig(f"{said}; got {self}")

    def attach(self, network: Network) -> None:
        mine = [site for site in network.sites if isinstance(site.gate, DenseToSparseGate)]
        if not mine:
            raise InvalidConfig('no layer here has a gate that becomes sparse; make them with gate="dense_to_sparse"')
        for site in mine:
            if not site.is_local:
                raise InvalidConfig(
                    f"the experts of {site.path or 'the layer'} are elsewhere and cannot be copied here"
                )

    def apply(self, network: Network, step: int) -> None:
        for site in network.sites:
            if not isinstance(site.gate, DenseToSparseGate):
                continue
            if step >= self.diversify and site.gate.is_alone:
                diversify(site, self, network.optimizer)
            site.gate.is_alone.fill_(step < self.diversify)
            site.gate.anneal(max(step - self.diversify, 0))


@torch.no_grad()
def diversify(site: Site, settings: EvoMoE, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Make all experts of a layer copies of its first, each masked and with noise of its own. The optimizer's state of
    the first is copied, too: that of experts which were never asked would make their first steps far too long."""
    generator = site.generator(settings.seed, settings.diversify)
    for _, parameter in sorted(site.experts.named_parameters()):
        if not parameter.ndim or len(parameter) != site.num_experts:
            continue
        spread_state(optimizer, parameter, 0)
        first = parameter[0].clone()
        for expert in range(1, site.num_experts):
            stays = torch.rand(first.shape, generator=generator) >= settings.mask
            noise = torch.randn(first.shape, generator=generator) * settings.noise
            amount = first.float().square().mean().sqrt()
            parameter[expert] = first * stays.to(first.device) + (noise.to(first.device) * amount).to(first.dtype)
