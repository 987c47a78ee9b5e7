"""What happens to a cluster of expert hosts, in the past tense, and what is to be done about it, in the imperative.

`ClusterState.handle` takes the first and returns the second; whoever drives it (the controller actor, the simulator, a
test) carries instructions out and reports what came of them as events. Plain values, which a log can keep and replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ray_moe.policy.load import Floats, TokenCounts
from ray_moe.policy.planner import Capacity, Goals
from ray_moe.policy.scaling import Signals
from ray_moe.types import HostAddress, HostId, LayerPath, Placement, RoutingTable

Experts: TypeAlias = Mapping[LayerPath, tuple[int, ...]]
"""Some experts: ascending indices by layer."""


# --- Events --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class HostStarted:
    """A host says that it lives and what it holds: at its start, when it was taken for lost and is not, or just so."""

    address: HostAddress
    held: Experts
    domain: str = ""
    """Failure domain of its node (a label), empty when there are none."""
    max_bytes: int | None = None
    """Expert weights it may hold; None is an equal share and the spare slots."""
    unsettled: Experts = field(default_factory=dict)
    """Experts that it was told to load or to drop and has not yet: a restarted controller does not know of them."""


@dataclass(frozen=True, slots=True)
class HostLost:
    """A life of a host has ended, or nobody reaches it."""

    host_id: HostId
    incarnation: str
    """Empty: whatever life it had."""


@dataclass(frozen=True, slots=True)
class HostFailed:
    """A host cannot be started. Whoever starts it goes on trying unless told to stop."""

    host_id: HostId
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicasLoaded:
    """A host holds what it was told to load."""

    op_id: str
    host_id: HostId
    incarnation: str


@dataclass(frozen=True, slots=True)
class ReplicasFailed:
    """A host could not load what it was told to."""

    op_id: str
    host_id: HostId
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicasDropped:
    """A host holds no longer what it was told to drop."""

    op_id: str
    host_id: HostId
    incarnation: str


@dataclass(frozen=True, slots=True)
class LoadReported:
    """A router's token counts, and the table it routes by."""

    counts: TokenCounts
    epoch: int


@dataclass(frozen=True, slots=True)
class EpochSeen:
    """A router uses a table that nobody here has published, of an earlier service say: the next one must be newer."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SpeedReported:
    """How fast a host computes, in any unit that is the same for all hosts."""

    host_id: HostId
    incarnation: str
    speed: float


@dataclass(frozen=True, slots=True)
class SignalsReported:
    """What the service feels, for the number of hosts."""

    signals: Signals


@dataclass(frozen=True, slots=True)
class PlacementPlanned:
    """What came of `PlanPlacement`."""

    op_id: str
    placement: Placement | None
    """None: there is none."""
    reason: str = ""
    """Why there is none."""


@dataclass(frozen=True, slots=True)
class PlanRequested:
    """Somebody wants a better placement now, whatever the interval."""


@dataclass(frozen=True, slots=True)
class SizeRequested:
    """Somebody wants this many hosts."""

    num_hosts: int


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """These hosts are to hand over what they hold, and end."""

    host_ids: tuple[HostId, ...]
    replace: bool = False
    """Start as many others in their place."""
    notice: bool = False
    """Their nodes are going whether or not it fits: save what can be saved, hottest first."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


Event: TypeAlias = (
    HostStarted
    | HostLost
    | HostFailed
    | ReplicasLoaded
    | ReplicasFailed
    | ReplicasDropped
    | LoadReported
    | EpochSeen
    | SpeedReported
    | SignalsReported
    | PlacementPlanned
    | PlanRequested
    | SizeRequested
    | DrainRequested
    | Ticked
)


# --- Instructions --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class StartHost:
    """Start a host, again and again if need be, until it is to be stopped."""

    host_id: HostId


@dataclass(frozen=True, slots=True)
class StopHost:
    """End a host, whatever it does, and forget it."""

    host_id: HostId


@dataclass(frozen=True, slots=True)
class LoadReplicas:
    """Hold these as well; answer with `ReplicasLoaded` or `ReplicasFailed`.

    A host carries out its orders one at a time, as they were given. The same order may come twice, and an expert that
    it is to load may be there already.
    """

    op_id: str
    host_id: HostId
    incarnation: str
    experts: Experts
    donors: Mapping[HostId, Experts] = field(default_factory=dict)
    """Living hosts that hold them, each expert at one donor at most, the nearest first chosen."""


@dataclass(frozen=True, slots=True)
class DropReplicas:
    """Hold these no longer; answer with `ReplicasDropped`. No table that is in use names them."""

    op_id: str
    host_id: HostId
    incarnation: str
    experts: Experts


@dataclass(frozen=True, slots=True)
class PlanPlacement:
    """Compute `planner.plan` of these, beside everything else; answer with `PlacementPlanned`."""

    op_id: str
    load: Mapping[LayerPath, Floats]
    hosts: tuple[Capacity, ...]
    current: Placement
    goals: Goals


@dataclass(frozen=True, slots=True)
class PublishTable:
    """Tell the routers."""

    table: RoutingTable


@dataclass(frozen=True, slots=True)
class Announce:
    """Something a person may want to know; for the log."""

    kind: str
    """``replicated``, ``moved``, ``lost``, ``repaired``, ``resized``, ``drained``, ``aborted`` ..."""
    text: str


Instruction: TypeAlias = StartHost | StopHost | LoadReplicas | DropReplicas | PlanPlacement | PublishTable | Announce
