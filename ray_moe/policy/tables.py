"""The routing table of a cluster, kept up to date row by row.

A table names the replicas that are placed and really there. Where the placement has none of an expert but somebody
holds it all the same (it was moving, or belongs to a standby or a leaving host), that one is named: nobody's request
fails for the sake of order. Changed by `cluster_state.py` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_moe.policy.hosts import HostState
from ray_moe.policy.rows import ExpertKey, Row, Rows
from ray_moe.types import HostAddress, HostId, LayerPath, RoutingTable

EPOCHS_OF_A_LIFE = 10**9
"""Each life of whoever publishes has so many epochs of its own, after those of the lives before: a router may have any
table of theirs, or be about to get it, whatever is known of it."""
SKIPPED_EPOCHS = 1000
"""So many are left out after an epoch that nobody here has published: others of its kind may be under way yet."""


class Tables:
    """See the module."""

    def __init__(self, num_experts: Mapping[LayerPath, int], epoch: int) -> None:
        self.named = Rows(num_experts)
        self.table = RoutingTable(epoch, self.named.placement())
        self.exposed: set[ExpertKey] = set(self.named.empty)
        """Experts that no host holds which is to stay."""
        self._epoch = epoch
        self.is_due = True
        """Whether routers are to get a table even if it is like the last: what theirs are like is not known."""

    def route(
        self, keys: Iterable[ExpertKey], placed: Rows, held: Rows, hosts: Mapping[HostId, HostState], now_s: float
    ) -> None:
        """Look at some experts anew: where they are placed, who holds them, or who is to stay has changed."""
        for layer, expert in keys:
            before = self.named.of(layer, expert)
            row = self.row(placed.of(layer, expert), held.of(layer, expert), hosts)
            if self.named.put(layer, expert, row):
                for host in before:
                    if host not in row and host in hosts:
                        hosts[host].unnamed_s = now_s
            is_safe = any(hosts[host].role != "leaving" for host in row)
            (self.exposed.discard if is_safe else self.exposed.add)((layer, expert))

    @staticmethod
    def row(placed: Row, held: Row, hosts: Mapping[HostId, HostState]) -> Row:
        """The hosts that a table names for an expert."""
        there = tuple(host for host in placed if host in held)
        if there or not held:
            return there
        others = [host for host in held if not hosts[host].is_dismissed]
        return (min(others, key=lambda host: (hosts[host].role == "leaving", host)),) if others else ()

    def is_behind(self, epoch: int) -> bool:
        """Whether a router that has a table of this epoch has it from somebody else; then the next is well after."""
        if epoch > self._epoch:
            self._epoch, self.is_due = epoch + SKIPPED_EPOCHS, True
        return self.is_due

    def publish(
        self, hosts: Mapping[HostId, HostState], held: Rows, speeds: Mapping[HostId, float], changed: Iterable[HostId]
    ) -> bool:
        """Make the next table if anything differs from the last one; whether it does.

        Args: changed: hosts that may have come or gone since, or hold something or nothing now. The others are where
            they were: with a thousand hosts, most events are about one.
        """
        placement, last = self.named.placement(), self.table
        now = {host_id: _address(hosts.get(host_id), held) for host_id in changed}
        moved = {host_id: address for host_id, address in now.items() if address != last.addresses.get(host_id)}
        same = placement is last.placement and not moved and speeds == last.speeds
        if same and not self.is_due:
            return False
        self._epoch, self.is_due = self._epoch + 1, False
        addresses = {
            host_id: address for host_id, address in {**last.addresses, **moved}.items() if address is not None
        }
        self.table = RoutingTable(self._epoch, placement, addresses, dict(speeds))
        return True


def _address(host: HostState | None, held: Rows) -> HostAddress | None:
    """Where routers reach a host; None for one that they have nothing to ask of."""
    if host is None or host.phase != "up" or host.is_dismissed or not held.on(host.host_id):
        return None
    return host.address
