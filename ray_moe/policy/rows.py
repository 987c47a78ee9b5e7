"""Which host has which experts, known both ways: by expert and by host, and changed row by row.

`cluster_state.py` keeps three: what is placed where, what is held where, and what the routing table names. Each
remembers what changed since it was last asked, so that an event costs what it changes and not what there is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

from ray_moe.types import HostId, LayerPath, Placement

Held: TypeAlias = dict[LayerPath, set[int]]
"""Some experts; a layer without any is left out."""

ExpertKey: TypeAlias = tuple[LayerPath, int]

Row: TypeAlias = tuple[HostId, ...]


class Rows:
    """For each expert the hosts, best first, each once."""

    def __init__(self, num_experts: Mapping[LayerPath, int]) -> None:
        self._rows: dict[LayerPath, list[Row]] = {layer: [()] * count for layer, count in num_experts.items()}
        self._on: dict[HostId, Held] = {}
        self._frozen: dict[LayerPath, tuple[Row, ...]] = {}
        self._placement: Placement | None = None
        self.empty: set[ExpertKey] = {(layer, e) for layer, count in num_experts.items() for e in range(count)}
        """Experts without any host. Not to be changed from outside."""
        self._changed_rows: set[ExpertKey] = set()
        self._changed_hosts: set[HostId] = set()

    # --- asked -----------------------------------------------------------------------------------------------
    def of(self, layer: LayerPath, expert: int) -> Row:
        """The hosts of an expert."""
        return self._rows[layer][expert]

    def on(self, host: HostId) -> Held:
        """The experts of a host. Not to be changed."""
        return self._on.get(host, {})

    def hosts(self) -> set[HostId]:
        """Those that have anything."""
        return set(self._on)

    def placement(self) -> Placement:
        """All of it, as a value."""
        if self._placement is None:
            for layer, rows in self._rows.items():
                if layer not in self._frozen:
                    self._frozen[layer] = tuple(rows)
            self._placement = Placement({layer: self._frozen[layer] for layer in self._rows})
        return self._placement

    def take_changed_rows(self) -> set[ExpertKey]:
        """The experts whose hosts have changed since this was last asked."""
        changed, self._changed_rows = self._changed_rows, set()
        return changed

    def take_changed_hosts(self) -> set[HostId]:
        """The hosts whose experts have changed since this was last asked."""
        changed, self._changed_hosts = self._changed_hosts, set()
        return changed

    # --- changed ---------------------------------------------------------------------------------------------
    def put(self, layer: LayerPath, expert: int, hosts: Row) -> bool:
        """Give an expert these hosts; false when it has them already."""
        before = self._rows[layer][expert]
        if before == hosts:
            return False
        self._rows[layer][expert] = hosts
        self._frozen.pop(layer, None)
        self._placement = None
        self._changed_rows.add((layer, expert))
        (self.empty.discard if hosts else self.empty.add)((layer, expert))
        for host in before:
            if host not in hosts:
                self._changed_hosts.add(host)
                held = self._on[host]
                held[layer].discard(expert)
                if not held[layer]:
                    del held[layer]
                    if not held:
                        del self._on[host]
        for host in hosts:
            if host not in before:
                self._changed_hosts.add(host)
                self._on.setdefault(host, {}).setdefault(layer, set()).add(expert)
        return True

    def put_all(self, placement: Placement) -> None:
        for layer, rows in placement.hosts_of.items():
            for expert, hosts in enumerate(rows):
                self.put(layer, expert, hosts)

    def add(self, host: HostId, experts: Mapping[LayerPath, Collection[int]]) -> None:
        """One more host, last in line, for some experts."""
        for layer, indices in experts.items():
            for expert in indices:
                row = self._rows[layer][expert]
                if host not in row:
                    self.put(layer, expert, (*row, host))

    def discard(self, host: HostId, experts: Mapping[LayerPath, Collection[int]]) -> None:
        """One host less, where it is."""
        for layer, indices in experts.items():
            for expert in tuple(indices):
                row = self._rows[layer][expert]
                if host in row:
                    self.put(layer, expert, tuple(other for other in row if other != host))

    def clear(self, host: HostId) -> None:
        """The host nowhere."""
        self.discard(host, {layer: tuple(experts) for layer, experts in self.on(host).items()})

    def replace(self, host: HostId, heir: HostId) -> None:
        """The heir wherever the host was."""
        for layer, experts in [(layer, tuple(experts)) for layer, experts in self.on(host).items()]:
            for expert in experts:
                self.put(layer, expert, replaced(self._rows[layer][expert], host, heir))


def replaced(hosts: Row, host: HostId, heir: HostId) -> Row:
    """`hosts` with the heir in the host's place, once."""
    return tuple(dict.fromkeys(heir if other == host else other for other in hosts))
