"""What advice is made from, what it is, and the words that explain each of its numbers.

Values and text; the arithmetic is in `advise.py`. Called by it and by `cli/advise.py`.

Shape legend: T tokens of a batch, E experts of the layer that has most, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ray_moe.policy.anatomy import Anatomy

Device = Literal["cpu", "gpu"]

PROCESS_BYTES = 350 * 2**20
"""An actor that has imported its libraries, before any weights."""
HEADROOM = 0.1
"""Share of a host's memory that is left for activations and fragmentation."""
UTILISATION = 0.6
"""Share of the time that hosts should compute, as `scaling.target_utilisation` has it."""
ENOUGH_BALANCE = 0.95
"""Balancedness from which on more replicas are not worth their memory."""
SPEEDS: dict[Device, tuple[float, float]] = {"cpu": (0.5e12, 50e9), "gpu": (200e12, 1.5e12)}
"""FLOP/s that matrix products reach, and bytes of memory that are read in a second, where nobody says better."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machines, all alike."""

    num_hosts: int
    host_bytes: int
    """Memory of each that weights may take: the GPU's, where there is one."""
    device: Device = "cpu"
    bandwidth: float = 1.25e9
    """Bytes a second between two hosts."""
    flops: float | None = None
    """FLOP/s that a host reaches; None: `SPEEDS`."""
    memory_bandwidth: float | None = None
    """Bytes a second that a host reads of its memory; None: `SPEEDS`."""
    price_per_hour: float = 0.0
    """Of one host."""

    @property
    def speeds(self) -> tuple[float, float]:
        """(FLOP/s, bytes of memory a second) of a host."""
        flops, memory_bandwidth = SPEEDS[self.device]
        return self.flops or flops, self.memory_bandwidth or memory_bandwidth


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked of the service."""

    requests_per_s: float = 1.0
    prompt_tokens: int = 512
    output_tokens: int = 128
    skew: float = 0.5
    """Exponent of the Zipf law of the experts' popularity: the i-th is used in proportion to 1/i**skew. 0 is even."""
    batch_tokens: int = 4096
    """Tokens of a batch of training, for the capacity factor."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One number of the advice, as text, and why."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What to set, and what it comes to."""

    num_actors: int
    """Hosts that hold experts, each with one actor. One of them, whichever, is also the router's."""
    experts_per_actor: int
    spare_slots: int
    replicas: tuple[int, ...]
    """Of each expert, the most popular first."""
    balancedness: float
    """Mean / largest load of a host that is predicted, at the popularity that was told."""
    top_k: float
    capacity_factor: float
    balance_weight: float
    kv_cache_bytes: int
    host_bytes: int
    """Of the fullest host, the router included."""
    router_bytes: int
    lifeboat_bytes: int
    """Room that is left beside them, for experts that the router reads itself while an actor is lost."""
    step_s: float
    """A token of every running request, roughly."""
    cost_per_hour: float
    cost_per_million_tokens: float
    in_flight: int
    """Requests that are being answered at a time."""
    hosts_for_weights: int
    hosts_for_arithmetic: int
    flops_per_s: float
    """That the traffic needs."""
    max_held: int
    """Experts of each layer on the fullest host, replicas included."""
    warnings: tuple[str, ...] = ()


def explain(advice: Advice, anatomy: Anatomy, hardware: Hardware, traffic: Traffic) -> Iterator[Rule]:
    """Each number with the rule that gave it, for what `advise` was asked."""
    flops, _ = hardware.speeds
    length = traffic.prompt_tokens + traffic.output_tokens
    yield Rule(
        "hosts (actors)",
        str(advice.num_actors),
        f"the larger of {advice.hosts_for_weights} for the weights and {advice.hosts_for_arithmetic} for "
        f"{advice.flops_per_s / 1e12:.3g} TFLOP/s at {flops / 1e12:.3g} TFLOP/s a host, {UTILISATION:.0%} busy; "
        f"at most {hardware.num_hosts}",
    )
    yield Rule(
        "experts per actor",
        str(advice.experts_per_actor),
        f"{anatomy.num_experts} experts / {advice.num_actors} hosts, rounded up",
    )
    yield Rule(
        "spare slots",
        str(advice.spare_slots),
        f"the fewest with balancedness {ENOUGH_BALANCE}, or the best there is: the planner predicts "
        f"{advice.balancedness:.2f} at Zipf {traffic.skew:g}",
    )
    yield Rule(
        "replicas",
        f"{min(advice.replicas)} to {max(advice.replicas)}, {sum(advice.replicas)} in all",
        "the planner's choice for this popularity; an expert never twice on a host",
    )
    yield Rule("top-k", f"{advice.top_k:g}", "the model's own" if advice.top_k == anatomy.top_k else "as given")
    yield Rule(
        "capacity factor (training)",
        f"{advice.capacity_factor:.2f}",
        "hottest expert's share h = E x its popularity, and sqrt(2 h ln E / m) for chance, where m = T K / E and "
        f"T = {traffic.batch_tokens}; serving drops nothing",
    )
    yield Rule(
        "balance-loss weight (training)",
        f"{advice.balance_weight:g}",
        "0.01 up to 64 experts (arXiv:2101.03961), 0.001 for more (router_aux_loss_coef of Qwen3-MoE and Ernie 4.5)",
    )
    yield Rule(
        "requests in flight",
        str(advice.in_flight),
        f"Little's law: {traffic.requests_per_s:g} requests/s x {traffic.output_tokens} tokens x "
        f"{1e3 * advice.step_s:.1f} ms",
    )
    yield Rule(
        "keys and values",
        size(advice.kv_cache_bytes),
        f"{advice.in_flight} x {length} tokens x {anatomy.kv_bytes_per_token or 0} B, 1 MiB or more",
    )
    yield Rule(
        "memory of the router",
        size(advice.router_bytes),
        f"{size(anatomy.backbone_bytes)} of other weights, keys and values, {size(PROCESS_BYTES)} for the process",
    )
    yield Rule(
        "memory of the fullest host",
        size(advice.host_bytes),
        f"{advice.max_held} expert indices of {size(anatomy.column_bytes)} each (over all layers), and the router, "
        f"which may be on any of them; of {size(hardware.host_bytes)}, {HEADROOM:.0%} kept free",
    )
    yield Rule("lifeboat", size(advice.lifeboat_bytes), "what is left of the fullest host, 2 GiB at most")
    yield Rule(
        "cost",
        f"{advice.cost_per_hour:.2f} per hour, {advice.cost_per_million_tokens:.4g} per million tokens",
        f"{advice.num_actors} hosts x {hardware.price_per_hour:g}; {traffic.requests_per_s * length:g} tokens/s, "
        "prompts included",
    )


def size(num_bytes: float) -> str:
    """`12.30 GiB`."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
