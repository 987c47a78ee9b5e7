"""The world that a trace is replayed in: hosts, links, faults. Whatever the policies decide is in `ClusterSettings`."""

from __future__ import annotations

from dataclasses import dataclass

from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.policy.hosts import ClusterSettings
from ray_moe.policy.planner import slots_in_bytes
from ray_moe.simulate.checks import check_range
from ray_moe.simulate.trace import Trace


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that is neither traffic nor policy."""

    num_hosts: int
    num_standbys: int = 0
    hosts_per_node: int = 1
    bandwidth: float = 1e9
    """Bytes of weights that a host loads in a second, from wherever."""
    start_s: float = 30.0
    """From the order to start a host, or its loss, until it is up (and empty)."""
    planning_s: float = 0.5
    """What a plan takes, in virtual time."""
    host_rows_per_s: float | None = None
    """Rows that a host computes in a second; None: as many as have the first hosts on target at the first step's
    load."""
    losses_per_hour: float = 0.0
    """How often each node is lost, in the mean."""
    notice_s: float = 0.0
    """How long before its loss a node is known to go; 0: never."""
    tokens_per_batch: int = 1024
    top_k: int = 8
    batch_noise: float = 0.3
    """Standard deviation of the logarithm of an expert's share from batch to batch."""
    batches_per_step: int = 2
    """Batches of each step that are measured, evenly spread over it; the others are like them."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: `InvalidConfig`."""
        check_range("--hosts", self.num_hosts, 1)
        check_range("--hosts-per-node", self.hosts_per_node, 1)
        check_range("--bandwidth", self.bandwidth, 0, above=True)
        check_range("--start-seconds", self.start_s, 0)
        check_range("--planning-seconds", self.planning_s, 0)
        if self.host_rows_per_s is not None:
            check_range("--host-speed", self.host_rows_per_s, 0, above=True)
        check_range("--spot-losses", self.losses_per_hour, 0)
        check_range("--notice", self.notice_s, 0)
        check_range("--tokens-per-batch", self.tokens_per_batch, 1)
        check_range("--top-k", self.top_k, 1)
        check_range("--batch-noise", self.batch_noise, 0, 5)
        check_range("--batches-per-step", self.batches_per_step, 1)
        check_range("--seed", self.seed, 0)


def check_fit(scenario: Scenario, settings: ClusterSettings, trace: Trace) -> None:
    """Whether the first hosts can hold every expert.

    Raises: `InsufficientResources`; `InvalidConfig` for more choices than a layer has experts.
    """
    narrowest, widest = min(trace.num_experts), max(trace.num_experts)
    if scenario.top_k > narrowest:
        raise InvalidConfig(
            f"--top-k is {scenario.top_k}, but a layer of the trace has {narrowest} experts, and a token chooses each "
            "once at most; lower --top-k"
        )
    if settings.max_bytes is None:
        return
    per_slot = sum(settings.expert_bytes.values())
    slots = slots_in_bytes(settings.max_bytes, settings.expert_bytes) * scenario.num_hosts
    if slots < widest:
        fewest = -(-widest // max(1, slots // scenario.num_hosts))
        raise InsufficientResources(
            f"{scenario.num_hosts} hosts of {settings.max_bytes:,} bytes (experts.max_bytes) have {slots} slots for "
            f"the {widest} experts of a layer, each {per_slot:,} bytes over all layers; take --hosts {fewest} or more"
            + ("" if slots else f", with at least {per_slot:,} bytes each")
        )
