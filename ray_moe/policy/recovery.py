"""Where experts are placed when nobody remembers, and only the hosts can tell what they hold. Pure.

Called by `cluster_state.py` after a restart of whoever drives it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray_moe.policy.rows import ExpertKey, Row, Rows
from ray_moe.types import HostId, LayerPath, Placement


def placement_by_holders(
    held: Rows,
    budget_bytes: Mapping[HostId, int],
    fallback: Placement,
    num_experts: Mapping[LayerPath, int],
    expert_bytes: Mapping[LayerPath, int],
) -> Placement:
    """Each expert where it is held: on one host in any case, on more as far as budgets go.

    One that nobody holds goes to its `fallback` host if there is room, else to the emptiest with room, else nowhere.

    Args:
        budget_bytes: of each host that is to serve; others are left out.
    """
    free = dict(budget_bytes)
    rows: dict[ExpertKey, Row] = {}
    holders: dict[ExpertKey, Row] = {}
    homes: dict[ExpertKey, Row] = {}

    def place(key: ExpertKey, host: HostId) -> None:
        rows[key] = (*rows[key], host)
        free[host] -= expert_bytes[key[0]]

    for layer, count in num_experts.items():
        known = fallback.hosts_of.get(layer, ((),) * count)
        for expert in range(count):
            key = (layer, expert)
            homes[key] = tuple(host for host in known[expert] if host in free)
            holding = {host for host in held.of(layer, expert) if host in free}
            at_home = tuple(host for host in homes[key] if host in holding)
            holders[key] = (*at_home, *sorted(holding.difference(at_home)))
            rows[key] = ()
            if holders[key]:
                place(key, holders[key][0])
    for key in [key for key, row in rows.items() if not row]:
        wished = (*homes[key], *sorted(free, key=lambda host: (-free[host], host))[:1])
        fitting = [host for host in wished if free[host] >= expert_bytes[key[0]]]
        if fitting:
            place(key, fitting[0])
    for key, hosts in holders.items():
        for host in hosts[1:]:
            if free[host] >= expert_bytes[key[0]]:
                place(key, host)
    return Placement({layer: tuple(rows[layer, e] for e in range(count)) for layer, count in num_experts.items()})
