"""What a simulation found: values, and the sums over its steps that make them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the trace."""

    at_s: float
    """Its end."""
    num_hosts: int
    """That serve at its end."""
    rows_per_s: float
    """(token, expert) rows of all layers that were routed."""
    per_batch: float
    """Balancedness, mean over its batches and over layers; 1 without traffic."""
    per_window: float
    """The same of its batches added up."""
    utilisation: float
    """Share of the time in which hosts computed, mean over hosts."""
    queue_age_s: float
    """How far the hosts are behind the traffic."""
    num_orphans: int
    """Experts that no host holds at its end."""
    p_lossless: float
    """Chance that no expert is lost with the next nodes; see `Report.num_lost_nodes`."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are distributed."""

    mean: float
    low: float
    """5% are below this."""
    least: float
    second_half: float
    """Mean of the later half: what there was before balancing began is left out."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(1.0, 1.0, 1.0, 1.0, 0)
        array = np.array(values)
        return cls(
            float(array.mean()),
            float(np.quantile(array, 0.05)),
            float(array.min()),
            float(array[len(array) // 2 :].mean()),
            len(values),
        )


@dataclass(slots=True)
class Changes:
    """What was done to the placement."""

    plans: int = 0
    """That were made."""
    transactions: int = 0
    """Changes of placement that were set about, by these plans or to empty hosts that were to go."""
    loaded_replicas: int = 0
    dropped_replicas: int = 0
    store_bytes: int = 0
    """Weights that hosts read from the store."""
    copied_bytes: int = 0
    """Weights that hosts copied from each other."""


@dataclass(slots=True)
class Faults:
    """What went wrong, and what came of it."""

    lost_nodes: int = 0
    """With a host on them."""
    lost_hosts: int = 0
    survived: int = 0
    """Lost nodes after which every expert that was held before still was."""
    evacuated_hosts: int = 0
    """Hosts that had handed over and ended before their node went."""
    orphaned_experts: int = 0
    """(layer, expert) pairs that lost their last host with a node."""
    lifeboat_rows: float = 0.0
    """Rows that no host could compute: the routers' lifeboats do, or the rows wait."""
    orphan_s: float = 0.0
    """Time in which an expert had no host."""


@dataclass(slots=True)
class WallTimes:
    """What the policies cost in real time: it differs from run to run."""

    total_s: float = 0.0
    planning_s: list[float] = field(default_factory=list)
    """Of each plan."""
    policy_s: float = 0.0
    """In `ClusterState.handle`, plans apart."""
    splitting_s: float = 0.0
    """In the splits of batches."""


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. Two runs of one scenario differ in `wall` only, which does not count in comparisons."""

    virtual_s: float
    num_layers: int
    num_experts: int
    """Of the widest layer."""
    measured: str
    """What balancedness is of: ``rows``, or ``experts`` (distinct ones touched) for batches of a few rows."""
    per_batch: Spread
    per_window: Spread
    changes: Changes
    faults: Faults
    rows: int
    """That were routed, over all layers."""
    first_hosts: int
    most_hosts: int
    last_hosts: int
    host_hours: float
    """Of all hosts that were starting or up, standbys too."""
    p_lossless: float
    """At the end."""
    least_p_lossless: float
    num_lost_nodes: int
    """That `p_lossless` is about."""
    told: Mapping[str, int]
    """How often the policy announced what."""
    steps: tuple[StepReport, ...]
    wall: WallTimes = field(compare=False)


@dataclass(slots=True)
class Ledger:
    """What adds up while a simulation runs."""

    changes: Changes = field(default_factory=Changes)
    faults: Faults = field(default_factory=Faults)
    wall: WallTimes = field(default_factory=WallTimes)
    told: Counter[str] = field(default_factory=Counter)
    per_batch: list[float] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    rows: int = 0
    host_s: float = 0.0
    most_hosts: int = 0

    def close(
        self, *, shape: tuple[int, int], measured: str, num_lost_nodes: int, first_hosts: int, total_s: float
    ) -> Report:
        """Args: shape: number of layers, and of experts of the widest."""
        self.wall.total_s = total_s
        steps = tuple(self.steps)
        busy = [step.per_window for step in steps if step.rows_per_s]
        return Report(
            virtual_s=steps[-1].at_s if steps else 0.0,
            num_layers=shape[0],
            num_experts=shape[1],
            measured=measured,
            per_batch=Spread.of(self.per_batch),
            per_window=Spread.of(busy),
            changes=self.changes,
            faults=self.faults,
            rows=self.rows,
            first_hosts=first_hosts,
            most_hosts=self.most_hosts,
            last_hosts=steps[-1].num_hosts if steps else first_hosts,
            host_hours=self.host_s / 3600,
            p_lossless=steps[-1].p_lossless if steps else 1.0,
            least_p_lossless=min((step.p_lossless for step in steps), default=1.0),
            num_lost_nodes=num_lost_nodes,
            told=dict(sorted(self.told.items())),
            steps=steps,
            wall=self.wall,
        )
