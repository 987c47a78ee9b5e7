"""What a simulated cluster is like under its traffic: balancedness, utilisation, queue, rows without a host.

The hosts compute one batch after the other, layer by layer, each layer as long as its busiest host needs. Traffic that
they cannot keep up with waits. Called by `cluster.py`, which says how time passes and who is there.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import numpy as np

from ray_moe.policy.scaling import Signals
from ray_moe.policy.survival import p_none_lost
from ray_moe.simulate.balance import Routes, balancedness
from ray_moe.simulate.report import Ledger, StepReport
from ray_moe.simulate.scenario import Scenario
from ray_moe.simulate.trace import Floats, Step, Trace, draw_batch
from ray_moe.types import HostId, Placement


class Gauge:
    """See the module."""

    def __init__(self, scenario: Scenario, trace: Trace, target_utilisation: float, ledger: Ledger) -> None:
        self._scenario = scenario
        self._ledger = ledger
        self._routes = Routes(trace.layers)
        self._random = np.random.default_rng([scenario.seed, 1])
        self._step = Step(1.0, np.zeros((len(trace.layers), max(trace.num_experts)), dtype=np.int64))
        self._target = target_utilisation
        self._rows_per_s = scenario.host_rows_per_s
        """That a host computes; None until there is traffic."""
        self._num_serving = 0
        self._orphan_rows_per_s = 0.0
        self._values: list[float] = []
        """Balancedness of each batch of this step."""
        self._window: dict[HostId, Floats] = {}
        """[L] what each host had to do in the batches of this step."""
        self._busiest, self._done = 0.0, 0.0
        """What the busiest hosts of all layers had to do in these batches, and what all had."""
        self._utilisation, self._queue_s, self._idle_s = 0.0, 0.0, 0.0

    # --- time ------------------------------------------------------------------------------------------------
    def begin_step(self, step: Step) -> None:
        self._step, self._values, self._window = step, [], {}
        self._busiest, self._done = 0.0, 0.0
        if self._rows_per_s is None and step.rows.any():
            first = float(step.rows.sum()) / step.duration_s
            self._rows_per_s = first / self._scenario.num_hosts / self._target
        self._count_orphans()

    def look(self, placement: Placement, alive: Mapping[HostId, bool]) -> None:
        """The table or the hosts have changed. Args: alive: those that live, and whether each of them serves."""
        self._routes.refresh(placement, alive)
        self._num_serving = sum(alive.values())
        self._count_orphans()

    def _count_orphans(self) -> None:
        rows = sum(int(self._step.rows[layer, experts].sum()) for layer, experts in self._routes.orphans())
        self._orphan_rows_per_s = rows / self._step.duration_s

    def pass_time(self, past_s: float) -> None:
        """Nothing happens for so long."""
        self._ledger.faults.lifeboat_rows += past_s * self._orphan_rows_per_s
        self._ledger.faults.orphan_s += past_s if self._routes.orphans() else 0.0

    def orphans(self) -> set[tuple[int, int]]:
        """(layer, expert) pairs that no living host is named for."""
        return {(layer, expert) for layer, experts in self._routes.orphans() for expert in experts.tolist()}

    # --- batches ---------------------------------------------------------------------------------------------
    def measure(self) -> None:
        """One batch of the step: how evenly it loads the hosts."""
        scenario, rows = self._scenario, self._step.rows
        batch = draw_batch(rows, scenario.tokens_per_batch, scenario.top_k, scenario.batch_noise, self._random)
        begin_s = time.perf_counter()
        load = self._routes.split(batch)
        self._ledger.wall.splitting_s += time.perf_counter() - begin_s
        self._values.append(balancedness(load))
        self._busiest += float(load.max(-1, initial=0.0).sum())
        self._done += float(load.sum())
        for host, column in zip(self._routes.hosts, load.T, strict=True):
            self._window[host] = self._window[host] + column if host in self._window else column

    # --- the end of a step -----------------------------------------------------------------------------------
    def end_step(self, at_s: float, p_lossless: float) -> StepReport:
        """What the step was like."""
        step, values = self._step, self._values
        rows_per_s = float(step.rows.sum()) / step.duration_s
        self._feel(rows_per_s)
        there = [self._window[host] for host in self._routes.hosts if host in self._window]
        self._ledger.per_batch.extend(values)
        return StepReport(
            at_s=at_s,
            num_hosts=self._num_serving,
            rows_per_s=rows_per_s,
            per_batch=sum(values) / len(values) if values else 1.0,
            per_window=balancedness(np.array(there).T) if there else 1.0,
            utilisation=self._utilisation,
            queue_age_s=self._queue_s,
            num_orphans=len(self.orphans()),
            p_lossless=p_lossless,
        )

    def _feel(self, rows_per_s: float) -> None:
        """Utilisation and queue: `needed` seconds of work come in a second, and no more than one is done."""
        duration_s = self._step.duration_s
        self._idle_s = 0.0 if rows_per_s else self._idle_s + duration_s
        if not (self._rows_per_s and self._done and self._num_serving):
            self._utilisation, self._queue_s = 0.0, max(0.0, self._queue_s - duration_s)
            return
        even = rows_per_s / (self._rows_per_s * self._num_serving)
        needed = even * self._num_serving * self._busiest / self._done
        if self._queue_s > 0 or needed > 1:
            self._utilisation = min(1.0, even / needed)
        else:
            self._utilisation = min(1.0, even)
        self._queue_s = max(0.0, self._queue_s + (needed - 1.0) * duration_s)

    @property
    def signals(self) -> Signals:
        """What the service felt in the last step."""
        return Signals(self._utilisation, self._queue_s, self._idle_s)


def p_lossless(placement: Placement, node_of: Mapping[HostId, str], num_lost_nodes: int) -> float:
    """`policy.survival.p_lossless`, without the experts that too many nodes hold for it to matter.

    It compares each with each, which for thousands of experts takes seconds.
    """
    number_of = {node: number for number, node in enumerate(sorted(set(node_of.values())))}
    of_host = {host: number_of[node] for host, node in node_of.items()}
    rows: Collection[tuple[HostId, ...]] = {hosts for experts in placement.hosts_of.values() for hosts in experts}
    homes = {frozenset(of_host[host] for host in hosts if host in of_host) for hosts in rows}
    return p_none_lost([nodes for nodes in homes if len(nodes) <= num_lost_nodes], len(number_of), num_lost_nodes)
