"""What may be under way in a cluster: a change of the placement, and one of the hosts. Kept by `cluster_state.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ray_moe.policy.events import Announce
from ray_moe.policy.migration import Move
from ray_moe.policy.rows import ExpertKey, Held, Rows, replaced
from ray_moe.types import HostId

MAX_TOLD = 8
"""Moves of a step that are told one by one; of more, the number is told."""


@dataclass(slots=True)
class Transaction:
    """A change of placement. In each step, all that is new is loaded; then the placement changes at once."""

    reason: str
    steps: list[list[Move]]
    """What is still to come; the first is being loaded."""
    pending: dict[HostId, Held] = field(default_factory=dict)
    """What each host is to hold on top of its present share, for the first step."""
    waiting: set[tuple[HostId, ExpertKey]] = field(default_factory=set)
    """Of that, what is not there yet."""

    def prepare(self, held: Rows, loading: Collection[HostId]) -> None:
        """Set about the first step.

        Where it only takes replicas away, it waits for those that stay, if none of them is loaded: until then the
        others cannot go, and their room is not free.

        Args:
            loading: hosts that load what they are to hold; others are not waited for.
        """
        self.pending, self.waiting = {}, set()
        for move in self.steps[0]:
            holders = held.of(move.layer, move.expert)
            needed = move.added
            if not needed and set(holders).isdisjoint(move.after):
                needed = tuple(host for host in move.after if host in loading)
            for host in needed:
                self.pending.setdefault(host, {}).setdefault(move.layer, set()).add(move.expert)
                if host not in holders:
                    self.waiting.add((host, (move.layer, move.expert)))

    def loaded(self, host: HostId, experts: Held) -> None:
        if self.waiting:
            self.waiting.difference_update((host, (layer, e)) for layer, indices in experts.items() for e in indices)

    def moves(self) -> Iterator[Move]:
        """All that is still to come."""
        return (move for step in self.steps for move in step)

    def uses(self, host: HostId) -> bool:
        """Whether anything is to be loaded by `host`."""
        return any(host in move.added for move in self.moves()) or any(host == waited for waited, _ in self.waiting)

    def forget(self, host: HostId) -> None:
        """Give nothing to a host that has ended: experts that were to be left to it stay where they are."""
        self.steps = [
            [replace(move, after=after) for move in step if (after := tuple(h for h in move.after if h != host))]
            for step in self.steps
        ]

    def rename(self, host: HostId, heir: HostId) -> None:
        """The heir in the host's place, which nothing is loaded by."""
        self.steps = [
            [
                replace(move, before=replaced(move.before, host, heir), after=replaced(move.after, host, heir))
                for move in step
            ]
            for step in self.steps
        ]


@dataclass(slots=True)
class Resize:
    """Hosts that come, or go, or both."""

    reason: str
    deadline_s: float
    """When what is waited for must have happened: hosts that start, or nobody needing those that go."""
    added: tuple[HostId, ...] = ()
    removed: tuple[HostId, ...] = ()
    promoted: tuple[HostId, ...] = ()
    """Of the added: standbys, which need not start. Others are started in their place when it is done."""
    planned: bool = False
    """Whether the added hosts have been given their share."""


def told(step: Sequence[Move]) -> Iterator[Announce]:
    """What a step has done, for people."""
    kinds = {"move": "moved", "replicate": "replicated", "drop": "freed"}
    if len(step) > MAX_TOLD:
        for kind, past in kinds.items():
            number = sum(move.kind == kind for move in step)
            if number:
                yield Announce(past, f"{number} experts")
        return
    for move in step:
        there = " ".join([*(f"+{host}" for host in move.added), *(f"-{host}" for host in move.removed)])
        yield Announce(kinds[move.kind], f"expert {move.expert} of {move.layer}: {there}")
