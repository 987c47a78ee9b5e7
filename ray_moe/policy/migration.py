"""From one placement to another without an expert ever being without a replica.

The way goes in waves. In a wave all that is new is loaded first (prepare), then the table changes at once (commit),
then what is no longer named is dropped: make before break. What does not fit beside the old waits for the next wave.
Pure. Called by `cluster_state.py`, by the dry run and by the simulator.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ray_moe.policy.load import Floats
from ray_moe.policy.rows import ExpertKey, Row
from ray_moe.types import HostId, LayerPath, Placement


@dataclass(frozen=True, slots=True)
class Move:
    """What changes for one expert."""

    layer: LayerPath
    expert: int
    before: Row
    after: Row

    @property
    def added(self) -> Row:
        """Hosts that get a replica."""
        return tuple(host for host in self.after if host not in self.before)

    @property
    def removed(self) -> Row:
        """Hosts that give theirs up."""
        return tuple(host for host in self.before if host not in self.after)

    @property
    def kind(self) -> Literal["move", "replicate", "drop"]:
        """By whether hosts come, go, or both."""
        if self.added and self.removed:
            return "move"
        return "replicate" if self.added else "drop"


def moves(current: Placement, target: Placement) -> list[Move]:
    """What differs, in the order of the model. The order of an expert's hosts is no difference."""
    changes = []
    for layer, experts in target.hosts_of.items():
        before = current.hosts_of.get(layer, ((),) * len(experts))
        for expert, (old, new) in enumerate(zip(before, experts, strict=True)):
            if old != new and set(old) != set(new):
                changes.append(Move(layer, expert, old, new))
    return changes


def copied_bytes(changes: Iterable[Move], expert_bytes: Mapping[LayerPath, int]) -> int:
    """Bytes of weights that `changes` load somewhere."""
    return sum(expert_bytes[move.layer] * len(move.added) for move in changes)


def held_bytes(placement: Placement, expert_bytes: Mapping[LayerPath, int]) -> dict[HostId, int]:
    """Bytes of weights on each host that holds any."""
    total: defaultdict[HostId, int] = defaultdict(int)
    for layer, experts in placement.hosts_of.items():
        for hosts in experts:
            for host in hosts:
                total[host] += expert_bytes[layer]
    return dict(total)


def waves(
    current: Placement,
    target: Placement,
    expert_bytes: Mapping[LayerPath, int],
    max_bytes: Mapping[HostId, int],
    load: Mapping[LayerPath, Floats],
    used_bytes: Mapping[HostId, int] | None = None,
) -> list[list[Move]]:
    """The moves from `current` to `target`, in the steps in which they are made; empty when there is nothing to do.

    Those that are not possible are left out: hosts that are over their limit already take nothing more.

    In each step, what a host holds of before and after fits in its `max_bytes` (a host that is not named there has no
    limit). Experts without a replica come first, then those that give up a replica for another, then those that only
    get more; each the hottest first. So that few steps do, nothing that only adds takes the room that others lack, and
    where room is lacking, replicas that are to go and are not the last of their expert go at once. Where nothing fits,
    hosts exceed their limit by an expert for the length of a step: else rings of full hosts would never turn, and the
    hottest expert would wait until its room is free.

    Args:
        used_bytes: what hosts hold now; None: what `current` says.
    """
    rest = moves(current, target)
    rest.sort(key=lambda move: (bool(move.before), not move.removed, -_rate(load, move.layer, move.expert)))
    used = held_bytes(current, expert_bytes) if used_bytes is None else dict(used_bytes)
    room = _Room(used, max_bytes, expert_bytes)
    steps: list[list[Move]] = []
    while rest:
        taken: list[Move] = []
        left: list[Move] = []
        lacking: defaultdict[HostId, int] = defaultdict(int)
        for move in rest:
            waits = lacking if move.before and not move.removed else {}
            fits = all(room.free(host) - waits.get(host, 0) >= room.size(move) for host in move.added)
            (taken if fits else left).append(move)
            if fits:
                room.take(move)
            else:
                for host in move.added:
                    lacking[host] += room.size(move)
        released, rest = _released(left, lacking, room)
        if not any(move.added for move in taken):  # a replica that goes first is not gone at once: some do not wait
            forced, rest = _forced(rest, {(move.layer, move.expert) for move in released}, room, load)
            taken += forced
        taken += released
        if not taken:
            break
        for move in taken:
            room.give_up(move)
        steps.append(taken)
    return steps


@dataclass(slots=True)
class _Room:
    """Bytes on each host while moves are made."""

    used: dict[HostId, int]
    max_bytes: Mapping[HostId, int]
    expert_bytes: Mapping[LayerPath, int]

    def size(self, move: Move) -> int:
        return self.expert_bytes[move.layer]

    def free(self, host: HostId) -> float:
        return self.max_bytes.get(host, math.inf) - self.used.get(host, 0)

    def take(self, move: Move) -> None:
        for host in move.added:
            self.used[host] = self.used.get(host, 0) + self.size(move)

    def give_up(self, move: Move) -> None:
        for host in move.removed:
            self.used[host] = self.used.get(host, 0) - self.size(move)


def _released(left: Sequence[Move], lacking: Mapping[HostId, int], room: _Room) -> tuple[list[Move], list[Move]]:
    """Replicas that go before others come, because their hosts are `lacking` room, the coldest first; what is left."""
    short = {host: num_bytes - room.free(host) for host, num_bytes in lacking.items()}
    released: list[Move] = []
    rest: list[Move] = []
    for move in reversed(left):
        going = [host for host in move.removed if short.get(host, 0) > 0]
        staying = tuple(host for host in move.before if host not in going)
        if going and staying:
            for host in going:
                short[host] -= room.size(move)
            released.append(replace(move, after=staying))
            rest.append(replace(move, before=staying))
        else:
            rest.append(move)
    return released, rest[::-1]


def _forced(
    left: Sequence[Move], but: set[ExpertKey], room: _Room, load: Mapping[LayerPath, Floats]
) -> tuple[list[Move], list[Move]]:
    """Moves that exceed limits, each host by one expert at the most; what is left.

    Experts without a replica come first, then the hottest, whether or not they give up a replica for another. Not on
    hosts that are over their limit already: they may have to hold that for long, for others that are lost.

    Args: but: experts that are left out.
    """
    forced: list[Move] = []
    strained: set[HostId] = set()
    for move in sorted(left, key=lambda move: (bool(move.before), -_rate(load, move.layer, move.expert))):
        within = all(room.free(host) >= 0 for host in move.added)
        if within and strained.isdisjoint(move.added) and (move.layer, move.expert) not in but:
            forced.append(move)
            strained.update(move.added)
            room.take(move)
    chosen = {(move.layer, move.expert) for move in forced}
    return forced, [move for move in left if (move.layer, move.expert) not in chosen]


def find_homes(
    orphans: Iterable[ExpertKey],
    room_bytes: Mapping[HostId, int],
    host_load: Mapping[HostId, float],
    expert_bytes: Mapping[LayerPath, int],
    load: Mapping[LayerPath, Floats],
    speed: Mapping[HostId, float],
) -> tuple[dict[ExpertKey, HostId], list[ExpertKey]]:
    """A host for each orphan, the hottest first, and those for which there is no room.

    Each goes to the host that would be least loaded for its speed, of those with room; without any load the room
    decides, so that a quiet service does not pile everything on one host. Balance is restored later.

    Args:
        room_bytes: what each host can still take; a host that is not named takes nothing.
        host_load: tokens per second that each host has already.
        speed: relative; absent is 1.
    """
    room = dict(room_bytes)
    loads = {host: host_load.get(host, 0.0) for host in room}
    homes: dict[ExpertKey, HostId] = {}
    homeless: list[ExpertKey] = []
    for layer, expert in sorted(orphans, key=lambda key: (-_rate(load, *key), key)):
        size, rate = expert_bytes[layer], _rate(load, layer, expert)
        fitting = [host for host, free in room.items() if free >= size]
        if not fitting:
            homeless.append((layer, expert))
            continue
        home = min(fitting, key=lambda host: ((loads[host] + rate) / speed.get(host, 1.0), -room[host], host))
        room[home] -= size
        loads[home] += rate
        homes[layer, expert] = home
    return homes, homeless


def evict(
    homeless: Sequence[ExpertKey],
    rows: Mapping[LayerPath, Sequence[Row]],
    room_bytes: Mapping[HostId, int],
    expert_bytes: Mapping[LayerPath, int],
    load: Mapping[LayerPath, Floats],
    there: Placement,
) -> tuple[dict[ExpertKey, HostId], dict[ExpertKey, Row], list[ExpertKey]]:
    """Homes in the place of replicas that are not the last of their expert, the coldest first.

    Args:
        homeless: experts that nobody has room for, the most important first.
        rows: hosts of each expert.
        room_bytes: what each host can still take; a host that is not named takes nothing and gives nothing up.
        there: the replicas that are loaded; one of each expert stays.

    Returns: homes; the rows that become shorter for them; who is homeless all the same.
    """
    room, shorter = dict(room_bytes), dict[ExpertKey, Row]()
    surplus = [
        (_rate(load, layer, expert) / len(hosts), layer, expert, host)
        for layer, experts in rows.items()
        for expert, hosts in enumerate(experts)
        if len(hosts) > 1
        for host in hosts
        if host in room
    ]
    surplus.sort(reverse=True)
    homes: dict[ExpertKey, HostId] = {}
    left: list[ExpertKey] = []
    for key in homeless:
        size, home = expert_bytes[key[0]], None
        while surplus and home is None:
            _, layer, expert, host = surplus.pop()
            row = tuple(other for other in shorter.get((layer, expert), rows[layer][expert]) if other != host)
            if not set(row).isdisjoint(there.hosts_of[layer][expert]):
                shorter[layer, expert] = row
                room[host] += expert_bytes[layer]
                home = host if room[host] >= size else None
        if home is None:
            left.append(key)
        else:
            room[home] -= size
            homes[key] = home
    return homes, shorter, left


def loads_of(placement: Placement, load: Mapping[LayerPath, Floats]) -> dict[HostId, float]:
    """Tokens per second of each host, each expert's divided equally over its replicas."""
    total: defaultdict[HostId, float] = defaultdict(float)
    for layer, experts in placement.hosts_of.items():
        rates = load[layer].tolist() if layer in load else [0.0] * len(experts)
        for hosts, rate in zip(experts, rates, strict=True):
            for host in hosts:
                total[host] += rate / len(hosts)
    return dict(total)


def rehome(
    placement: Placement,
    leaving: Collection[HostId],
    room_bytes: Mapping[HostId, int],
    expert_bytes: Mapping[LayerPath, int],
    load: Mapping[LayerPath, Floats],
    speed: Mapping[HostId, float],
    absent: Collection[HostId] = (),
    there: Placement | None = None,
) -> tuple[Placement, list[ExpertKey]]:
    """The same placement without the hosts that are `leaving`, and the experts for which there is no room.

    Only experts that would have no replica left get a new home, by `find_homes`, or else by `evict`.

    Args:
        absent: hosts that keep their place, but on which nobody can count now.
        there: the replicas that are loaded; None: all of `placement`.
    """
    leaving_hosts, after = set(leaving), dict[LayerPath, list[Row]]()
    orphans: list[ExpertKey] = []
    for layer, experts in placement.hosts_of.items():
        after[layer] = list(experts)
        for expert, hosts in enumerate(experts):
            if not leaving_hosts.isdisjoint(hosts):
                after[layer][expert] = tuple(host for host in hosts if host not in leaving_hosts)
                if all(host in absent for host in after[layer][expert]):
                    orphans.append((layer, expert))
    if not orphans:
        return _frozen(after), []
    staying = loads_of(_frozen(after), load)
    homes, homeless = find_homes(orphans, room_bytes, staying, expert_bytes, load, speed)
    if homeless:
        room = dict(room_bytes)
        for (layer, _), home in homes.items():
            room[home] -= expert_bytes[layer]
        others, shorter, homeless = evict(homeless, after, room, expert_bytes, load, there or placement)
        homes |= others
        for (layer, expert), row in shorter.items():
            after[layer][expert] = row
    for (layer, expert), home in homes.items():
        after[layer][expert] = (home, *after[layer][expert])
    return _frozen(after), homeless


def _rate(load: Mapping[LayerPath, Floats], layer: LayerPath, expert: int) -> float:
    rates = load.get(layer)
    return 0.0 if rates is None else float(rates[expert])


def _frozen(rows: Mapping[LayerPath, Sequence[Row]]) -> Placement:
    return Placement({layer: tuple(experts) for layer, experts in rows.items()})
