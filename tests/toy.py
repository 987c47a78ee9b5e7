"""Small experts and layouts that the tests share. No Ray, no sockets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ray_moe.ops.experts import StackedExperts
from ray_moe.policy.placement import place_by_index
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.own_experts import OwnExperts
from ray_moe.transport.local import LocalTransport
from ray_moe.types import HostId, Placement, RoutingTable

LAYER = "model.layers.0.mlp.experts"


class ToyExperts(nn.Module):
    """Gated experts with the flags of `transformers`' experts interface."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

    def __init__(
        self, num_experts: int = 6, width: int = 8, inner: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed * 1_000_000 + num_experts * 1000 + width)
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * inner, width, generator=generator).to(dtype))
        self.down_proj = nn.Parameter(torch.randn(num_experts, width, inner, generator=generator).to(dtype))

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def shard(self, experts: Sequence[int]) -> ToyExperts:
        """The same module with only `experts`, their parameters copied."""
        part = ToyExperts(len(experts), self.down_proj.shape[1], self.down_proj.shape[2], self.down_proj.dtype)
        for name, parameter in self.named_parameters():
            getattr(part, name).data.copy_(parameter.data[list(experts)])
        return part

    def oracle(self, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The contract in plain loops: [T, D], [T, K], [T, K] -> [T, D]; an index of E adds nothing."""
        outs = []
        for token, choices, weights in zip(hidden, index.tolist(), weight, strict=True):
            out = torch.zeros_like(token)
            for expert, share in zip(choices, weights, strict=True):
                if expert < len(self.down_proj):
                    inner = self._apply_gate(self.gate_up_proj[expert] @ token)
                    out = out + share * (self.down_proj[expert] @ inner)
            outs.append(out)
        return torch.stack(outs) if outs else hidden.clone()


def random_routing(
    num_tokens: int, num_experts: int, top_k: int, seed: int = 0, sentinels: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts per token [T, K], and weights [T, K]; with `sentinels`, some choices are "no expert"."""
    rng = np.random.default_rng(seed)
    index = (
        np.stack([rng.permutation(num_experts + sentinels)[:top_k] for _ in range(num_tokens)])
        if num_tokens
        else (np.zeros((0, top_k), dtype=np.int64))
    )
    return torch.from_numpy(index), torch.from_numpy(rng.random((num_tokens, top_k), dtype=np.float32))


def own_experts(module: ToyExperts, *, cache: int = 0, lifeboat: int = 0) -> OwnExperts:
    """A router's own experts out of `module`, with room for so many."""
    num_bytes = sum(parameter[0].nbytes for parameter in module.parameters())
    return OwnExperts(
        lambda layer, experts, version: StackedExperts(module.shard(experts)),
        {LAYER: num_bytes},
        cache_bytes=cache * num_bytes,
        lifeboat_bytes=lifeboat * num_bytes,
    )


def hold_all(host: ExpertHost, module: ToyExperts, table: RoutingTable, layer: str = LAYER) -> dict[str, Any]:
    """Give `host` the experts that `table` places on it; returns its shard by layer."""
    shards = {}
    for path, experts in table.placement.experts_on(host.host_id).items():
        if path == layer:
            shards[path] = module.shard(experts)
            host.hold(path, experts, StackedExperts(shards[path]))
    return shards


def local_cluster(
    module: ToyExperts, num_hosts: int, num_replicas: int = 1
) -> tuple[LocalTransport, RoutingTable, dict[HostId, ExpertHost], dict[HostId, ToyExperts]]:
    """`num_hosts` hosts in this process that share the experts of `module`, with the table that says so.

    An expert's further replicas are on the hosts after its first one.
    """
    names = [f"expert-{number}" for number in range(num_hosts)]
    firsts = [names.index(hosts[0]) for hosts in place_by_index({LAYER: len(module.down_proj)}, names).hosts_of[LAYER]]
    placement = Placement(
        {LAYER: tuple(tuple(names[(first + n) % num_hosts] for n in range(num_replicas)) for first in firsts)}
    )
    hosts = {name: ExpertHost(name) for name in names}
    transport = LocalTransport(hosts)
    table = RoutingTable(1, placement, {name: transport.address(name) for name in names})
    shards = {name: hold_all(host, module, table)[LAYER] for name, host in hosts.items()}
    return transport, table, hosts, shards
