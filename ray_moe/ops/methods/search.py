"""How many experts a layer needs, found while it trains: the end of a search with "hard_concrete" gates.

The gates learn which experts are open (`ops/gates/hard_concrete.py`, arXiv:1712.01312). Their loss "expected_experts"
times a coefficient is the price of an expert: give it to the layers as ``auxiliary={"expected_experts": 0.01}``. At the
end the shut experts are taken out; until then nothing is saved, since any may open again.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_moe.errors import InvalidConfig
from ray_moe.ops.gates.hard_concrete import HardConcreteGate
from ray_moe.ops.methods.base import Method, Network
from ray_moe.ops.methods.pruning import check_prunable, keep_experts


@dataclass(frozen=True, slots=True)
class Search(Method):
    """Ends the search of layers with a "hard_concrete" gate: each then has its open experts and no others.

    Outside training the layer computes what it did before, and in training it has no noise from then on. Other layers
    are left alone. Give `Methods` the optimizer, too.
    """

    end: int
    """The first step without noise and shut experts."""

    def attach(self, network: Network) -> None:
        layers = [site.layer for site in network.sites if isinstance(site.gate, HardConcreteGate)]
        if not layers:
            raise InvalidConfig('no layer here has a gate that searches; make them with gate="hard_concrete"')
        for layer in layers:
            if layer is None:
                raise InvalidConfig("only a ray_moe.MoELayer can lose experts")
            check_prunable(layer, 1)

    def apply(self, network: Network, step: int) -> None:
        if step < self.end:
            return
        for site in network.sites:
            if isinstance(site.gate, HardConcreteGate) and not site.gate.is_closed and site.layer is not None:
                site.gate.close()
                keep_experts(site.layer, site.gate.open_experts(), network.optimizer)
