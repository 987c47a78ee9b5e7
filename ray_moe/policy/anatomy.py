"""What a model consists of, as numbers: parameters, experts, what a token uses of them, and what that costs.

Plain values and arithmetic, without torch. `models/inspect.py` makes them; `policy/advise.py` and the commands read
them.

Shape legend: D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ray_moe.types import LayerPath

Kind = Literal["dense", "moe", "dynamic_moe", "hybrid"]
"""``moe``: a gate chooses among experts, as many for each token. ``dynamic_moe``: how many depends on the token.
``hybrid``: layers of such kind beside layers with one feed-forward network for all tokens."""

KIND_NAMES: dict[Kind, str] = {
    "dense": "dense",
    "moe": "Mixture of Experts",
    "dynamic_moe": "dynamic Mixture of Experts (k varies by token)",
    "hybrid": "hybrid (dense and Mixture-of-Experts layers)",
}


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The routed experts of one layer."""

    path: LayerPath
    num_experts: int
    """E."""
    expert_params: int
    """Parameters of one expert."""
    top_k: float | None
    """K; the mean over tokens where it varies, None where nothing tells it."""
    hidden_size: int = 0
    """D; 0 where it is not known."""
    num_shared: int = 0
    """Shared experts beside them, which every token uses."""
    shared_params: int = 0
    """Parameters of those together."""
    unused_params: int = 0
    """Parameters in the same tensors that no token uses: rows of experts that compute nothing (LongCat)."""

    @property
    def params(self) -> int:
        return self.num_experts * self.expert_params

    @property
    def idle_params(self) -> float | None:
        """Parameters that a token does not use, in the mean; None where K is not known."""
        idle = None if self.top_k is None else (self.num_experts - self.top_k) * self.expert_params
        return None if idle is None else idle + self.unused_params


@dataclass(frozen=True, slots=True)
class Stack:
    """A sequence of layers, and what is in each: ``M`` routed experts, ``D`` a dense feed-forward network, ``.`` none
    of them (such as attention or a state-space mixer alone)."""

    path: str
    pattern: str

    @property
    def is_mixed(self) -> bool:
        return "M" in self.pattern and "D" in self.pattern


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Weights on each machine when experts are shared out over hosts, every host holding some of each layer."""

    num_hosts: int
    expert_bytes: int
    """On the host that has most."""
    router_bytes: int
    """Everything but the routed experts."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model in numbers."""

    total_params: int
    """Each parameter once, though several layers may share it."""
    weight_bytes: int
    groups: tuple[ExpertGroup, ...] = ()
    """In model order."""
    stacks: tuple[Stack, ...] = ()
    lookup_params: int = 0
    """Parameters of tables of which a token reads a row: no arithmetic."""
    kv_bytes_per_token: int | None = None
    """Keys and values that generation keeps of a token whose distance never ends its use; None where not known."""
    attention_width: int | None = None
    """Heads times head width, summed over the layers that attend; None where not known."""

    @property
    def num_experts(self) -> int:
        """Of the layer that has most; 0 for a dense model."""
        return max((group.num_experts for group in self.groups), default=0)

    @property
    def top_k(self) -> float | None:
        """K of the layer that has the highest; None where not known, or for a dense model."""
        known = [group.top_k for group in self.groups if group.top_k is not None]
        return max(known, default=None)

    @property
    def expert_params(self) -> int:
        return sum(group.params for group in self.groups)

    @property
    def expert_share(self) -> float:
        """Share of the weights that is in routed experts."""
        return self.expert_params / self.total_params if self.total_params else 0.0

    @property
    def active_params(self) -> int | None:
        """Parameters that a token uses, embeddings included; None where K is not known."""
        idle = [group.idle_params for group in self.groups]
        known = [each for each in idle if each is not None]
        return None if len(known) < len(idle) else round(self.total_params - sum(known))

    def flops_per_token(self, context: int = 0) -> int | None:
        """Of a forward pass: two for each parameter that is multiplied by (arXiv:2001.08361, 2.1), and those of
        attention over `context` tokens. None where K is not known."""
        active = self.active_params
        if active is None:
            return None
        return 2 * (active - self.lookup_params) + 4 * context * (self.attention_width or 0)

    @property
    def bytes_per_param(self) -> float:
        return self.weight_bytes / self.total_params if self.total_params else 0.0

    @property
    def expert_bytes(self) -> int:
        """Of all routed experts."""
        return round(self.expert_params * self.bytes_per_param)

    @property
    def column_bytes(self) -> int:
        """Of one expert index over all layers, which is what an actor holds one or several of."""
        return round(sum(group.expert_params for group in self.groups) * self.bytes_per_param)

    @property
    def backbone_bytes(self) -> int:
        """Of everything but the routed experts."""
        return self.weight_bytes - self.expert_bytes

    def memory(self, num_hosts: int) -> HostMemory:
        """Weights per machine with experts on `num_hosts` hosts (1 or more)."""
        params = sum(-(-group.num_experts // num_hosts) * group.expert_params for group in self.groups)
        return HostMemory(num_hosts, round(params * self.bytes_per_param), self.backbone_bytes)


def kind_of(groups: Sequence[ExpertGroup], stacks: Sequence[Stack], varies: bool) -> Kind:
    """The verdict that follows from what was found."""
    if not groups:
        return "dense"
    if varies:
        return "dynamic_moe"
    return "hybrid" if any(stack.is_mixed for stack in stacks) else "moe"
