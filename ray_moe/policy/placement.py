"""Who holds which experts, as values: the first placement of a model, and a host's succession.

Pure: no Ray, no torch, no clock, no I/O. Called by the controller and by the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_moe.errors import InvalidConfig
from ray_moe.types import HostId, LayerPath, Placement


def choose_num_hosts(
    num_experts: int, num_actors: int | None, experts_per_actor: int | None, resource_slots: float
) -> int:
    """How many expert actors to start.

    Args:
        num_experts: expert indices of the model (the most that any layer has).
        num_actors: asked for outright, or None.
        experts_per_actor: expert indices per actor, or None.
        resource_slots: actors that the cluster's free resources can hold (may be infinite).

    Returns: what was asked for; otherwise one actor per expert index if the cluster holds that many, else as many
    as it holds, and at least one.

    Raises: `InvalidConfig` for more actors than experts, or for both settings at once.
    """
    if num_actors is not None and experts_per_actor is not None:
        raise InvalidConfig(
            f"experts.num_actors ({num_actors}) and experts.experts_per_actor ({experts_per_actor}) are both set; "
            "set one of them"
        )
    if num_actors is not None and num_actors > num_experts:
        raise InvalidConfig(
            f"experts.num_actors is {num_actors}, but the model has {num_experts} experts per layer, and an actor "
            f"holds at least one; set it to {num_experts} or less"
        )
    if num_actors is not None:
        return num_actors
    if experts_per_actor is not None:
        return -(-num_experts // experts_per_actor)
    return max(1, int(min(num_experts, resource_slots)))


def place_by_index(num_experts: Mapping[LayerPath, int], hosts: Sequence[HostId]) -> Placement:
    """Equal shares: expert indices are dealt in contiguous blocks, the same index of every layer to the same host.

    Blocks differ by one index at the most. With as many hosts as experts each host has one index over all layers.
    A layer with fewer experts than the widest leaves the hosts of the missing indices empty for that layer.
    """
    widest = max(num_experts.values())
    owner = [hosts[index * len(hosts) // widest] for index in range(widest)]
    return Placement({layer: tuple((owner[index],) for index in range(count)) for layer, count in num_experts.items()})


def replace_host(placement: Placement, lost: HostId, heir: HostId) -> Placement:
    """The same placement with `heir` wherever `lost` was."""
    return Placement(
        {
            layer: tuple(tuple(heir if host == lost else host for host in hosts) for hosts in experts)
            for layer, experts in placement.hosts_of.items()
        }
    )
