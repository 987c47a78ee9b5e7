"""How many expert hosts are wanted, from what the service feels: queues, utilisation, silence.

Pure: signals and the time in, a number and a memory out. A rule must hold for a while before it counts (hysteresis) and
after a change nothing is changed for a while (cool-down), so that a size does not swing. Called by `cluster_state.py`
and the simulator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ray_moe.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class ScalingGoals:
    """What the size of the service should keep to."""

    min_hosts: int
    max_hosts: int
    target_utilisation: float = 0.6
    """Share of the time that hosts should be computing; the rest is headroom for bursts."""
    tolerance: float = 0.2
    """Relative distance from the target within which nothing is done."""
    max_queue_age_s: float = 1.0
    """A request that waits longer than this calls for more hosts, whatever the utilisation."""
    up_after_s: float = 3.0
    """How long more must have been wanted."""
    down_after_s: float = 60.0
    """How long less must have been wanted."""
    cool_down_s: float = 15.0
    """Pause after a change."""
    max_step: float = 2.0
    """Largest factor of one step up."""
    zero_after_s: float | None = None
    """Without a request for this long no host is kept; the routers' own copies answer the first one. None: never."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_hosts <= self.max_hosts or self.max_hosts < 1:
            raise InvalidConfig(
                f"scaling.min_actors is {self.min_hosts} and scaling.max_actors is {self.max_hosts}; expected "
                "0 <= min_actors <= max_actors, and max_actors >= 1"
            )


@dataclass(frozen=True, slots=True)
class Signals:
    """What the service feels now."""

    utilisation: float
    """Mean over the hosts of the share of time they compute, 0 to 1."""
    queue_age_s: float = 0.0
    """How long the oldest request has waited that has not begun."""
    idle_s: float = 0.0
    """Time since the last request; 0 while there are any."""


@dataclass(frozen=True, slots=True)
class ScalingMemory:
    """What must be remembered between two decisions."""

    more_since_s: float | None = None
    """Since when more hosts are wanted than there are."""
    less_since_s: float | None = None
    """Since when fewer are wanted."""
    most_wanted: int = 0
    """The most that were wanted at any time since then."""
    changed_s: float = float("-inf")
    """When the number was last changed."""


def decide(
    goals: ScalingGoals, memory: ScalingMemory, signals: Signals, num_hosts: int, now_s: float
) -> tuple[int, ScalingMemory]:
    """How many hosts are wanted now, and what to remember until the next decision.

    The ideal is the number at which utilisation would be on target (work is divided evenly over hosts); a queue that
    is too old asks for one half more. Within the tolerance, the cool-down or the waiting times it stays as it is. Only
    falling asleep, waking up and too few hosts ask for no patience.
    """
    changed = ScalingMemory(changed_s=now_s)
    if goals.zero_after_s is not None and signals.idle_s >= goals.zero_after_s:
        return 0, changed if num_hosts else memory
    if num_hosts < max(1, goals.min_hosts):
        return max(1, goals.min_hosts), changed
    ideal = min(max(_ideal(goals, signals, num_hosts), goals.min_hosts, 1), goals.max_hosts)
    memory = replace(
        memory,
        more_since_s=_since(memory.more_since_s, ideal > num_hosts, now_s),
        less_since_s=_since(memory.less_since_s, ideal < num_hosts, now_s),
        most_wanted=ideal if memory.less_since_s is None else max(ideal, memory.most_wanted),
    )
    if now_s - memory.changed_s < goals.cool_down_s:
        return num_hosts, memory
    if memory.more_since_s is not None and now_s - memory.more_since_s >= goals.up_after_s:
        return min(ideal, max(num_hosts + 1, int(num_hosts * goals.max_step))), changed
    if memory.less_since_s is not None and now_s - memory.less_since_s >= goals.down_after_s:
        return memory.most_wanted, changed
    return num_hosts, memory


def _ideal(goals: ScalingGoals, signals: Signals, num_hosts: int) -> int:
    ratio = signals.utilisation / goals.target_utilisation
    ideal = num_hosts
    if abs(ratio - 1.0) > goals.tolerance:
        ideal = math.ceil(num_hosts * ratio - 1e-9)
    if signals.queue_age_s > goals.max_queue_age_s:
        ideal = max(ideal, num_hosts + max(1, num_hosts // 2))
    return ideal


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    if not holds:
        return None
    return now_s if since_s is None else since_s
