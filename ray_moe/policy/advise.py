"""How to run a model on these machines for this traffic: the numbers; `advice.py` has the words for them.

Pure arithmetic on `anatomy.py`; where replicas go is decided by `planner.py`, as in a running service. The rules are
estimates for a first start: a running service measures and follows (`scaling.py`, `planner.py`). Called by
`cli/advise.py`.

Shape legend: T tokens of a batch, E experts of the layer that has most, K experts per token, H hosts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ray_moe.errors import InsufficientResources, InvalidConfig, UnsupportedModel
from ray_moe.policy.advice import (
    ENOUGH_BALANCE,
    HEADROOM,
    PROCESS_BYTES,
    SPEEDS,
    UTILISATION,
    Advice,
    Hardware,
    Traffic,
    size,
)
from ray_moe.policy.anatomy import Anatomy
from ray_moe.policy.planner import Capacity, Goals, plan, predict, slots_in_bytes
from ray_moe.policy.split import Floats
from ray_moe.types import Placement

HOP_S = 300e-6
"""From the router to a host of another node and back, beside the bytes."""
POOR_BALANCE = 0.8
"""Balancedness below which a warning is due."""
MAX_LIFEBOAT_BYTES = 2 * 2**30
"""As a service has it by default (`router.lifeboat_bytes`)."""
_ACTIVATION_BYTES = 4


def advise(anatomy: Anatomy, hardware: Hardware, traffic: Traffic, top_k: float | None = None) -> Advice:
    """Settings for the model.

    Args:
        top_k: K, where the model does not tell it or another one is wanted.

    Raises:
        UnsupportedModel: a dense model, which has nothing to place.
        InvalidConfig: a number that cannot be, or K is not known.
        InsufficientResources: the model does not fit; the message says what would do.
    """
    _check(anatomy, hardware, traffic)
    k = _top_k(anatomy, top_k)
    flops, memory_bandwidth = hardware.speeds
    groups = tuple(replace(group, top_k=min(k, group.num_experts)) for group in anatomy.groups)
    active = replace(anatomy, groups=groups).active_params or 0
    step_s = _step_s(anatomy, hardware, traffic, active, memory_bandwidth)
    in_flight = max(1, math.ceil(traffic.requests_per_s * traffic.output_tokens * step_s))
    length = traffic.prompt_tokens + traffic.output_tokens
    kv_bytes = max(2**20, in_flight * length * (anatomy.kv_bytes_per_token or 0))
    router_bytes = anatomy.backbone_bytes + kv_bytes + PROCESS_BYTES
    slots = _slots(anatomy, hardware, router_bytes)

    for_memory = -(-anatomy.num_experts // slots)
    tokens_per_s = traffic.requests_per_s * length
    arithmetic = tokens_per_s * 2 * (active - anatomy.lookup_params)
    for_compute = max(1, math.ceil(arithmetic / (flops * UTILISATION)))
    num_hosts = min(hardware.num_hosts, max(for_memory, for_compute))
    warnings = []
    if for_compute > hardware.num_hosts:
        warnings.append(
            f"this traffic needs about {for_compute} hosts for its arithmetic, and there are {hardware.num_hosts}"
        )
    popularity = _popularity(anatomy.num_experts, traffic.skew)
    share = -(-anatomy.num_experts // num_hosts)
    spare, placement, balancedness = _place(popularity, num_hosts, slots, share)
    if balancedness < POOR_BALANCE:
        warnings.append(
            f"the busiest host is predicted to have {1 / balancedness:.1f} times the mean load: more hosts, or memory "
            "for more slots in each, make room for replicas of the popular experts"
        )
    homes = placement.hosts_of["layer"]
    held = [sum(_name(number) in hosts for hosts in homes) for number in range(num_hosts)]
    column = anatomy.column_bytes
    host_bytes = max(held) * column + router_bytes + PROCESS_BYTES
    left = math.floor(hardware.host_bytes * (1 - HEADROOM)) - host_bytes
    factor = capacity_factor(anatomy.num_experts, k, traffic.batch_tokens, traffic.skew)
    weight = balance_weight(anatomy.num_experts)
    cost = num_hosts * hardware.price_per_hour
    per_million = cost / (tokens_per_s * 3600) * 1e6 if tokens_per_s else 0.0
    counts = tuple(map(len, homes))
    return Advice(
        num_actors=num_hosts,
        experts_per_actor=share,
        spare_slots=spare,
        replicas=counts,
        balancedness=balancedness,
        top_k=k,
        capacity_factor=factor,
        balance_weight=weight,
        kv_cache_bytes=kv_bytes,
        host_bytes=host_bytes,
        router_bytes=router_bytes,
        lifeboat_bytes=min(left, MAX_LIFEBOAT_BYTES),
        step_s=step_s,
        cost_per_hour=cost,
        cost_per_million_tokens=per_million,
        in_flight=in_flight,
        hosts_for_weights=for_memory,
        hosts_for_arithmetic=for_compute,
        flops_per_s=arithmetic,
        max_held=max(held),
        warnings=tuple(warnings),
    )


# --- The rules -------------------------------------------------------------------------------------------------------
def capacity_factor(num_experts: int, top_k: float, batch_tokens: int, skew: float) -> float:
    """Rows that an expert takes of a batch, over the mean, so that the hottest one about fits.

    The hottest expert's mean is E times its share. Around it the count of a batch varies as a Poisson number, of which
    the largest of E is about sqrt(2 ln E) standard deviations above. Never more than E/K, with which all fits.
    """
    mean = batch_tokens * top_k / num_experts
    hottest = num_experts * float(_popularity(num_experts, skew)[0])
    factor = hottest + math.sqrt(2 * math.log(max(2, num_experts)) * hottest / mean)
    return max(1.0, min(factor, num_experts / top_k))


def balance_weight(num_experts: int) -> float:
    """Of the load-balancing loss (Switch Transformer's form), as models of this size were trained with."""
    return 0.01 if num_experts <= 64 else 0.001


def _popularity(num_experts: int, skew: float) -> Floats:
    """[E] shares of the rows, falling."""
    raw: Floats = np.arange(1, num_experts + 1, dtype=np.float64) ** -skew
    shares: Floats = raw / raw.sum()
    return shares


def _step_s(anatomy: Anatomy, hardware: Hardware, traffic: Traffic, active: int, memory_bandwidth: float) -> float:
    """A decoding step: the weights it reads, once, and a round to the experts in each of their layers."""
    reading = active * anatomy.bytes_per_param / memory_bandwidth
    rows = max(1.0, traffic.requests_per_s)  # of about as many requests as come in a second
    width = max((group.hidden_size for group in anatomy.groups), default=0)
    wire = 2 * rows * width * _ACTIVATION_BYTES / hardware.bandwidth
    rounds = len(anatomy.groups) * (HOP_S + wire) if hardware.num_hosts > 1 else 0.0
    return reading + rounds


def _slots(anatomy: Anatomy, hardware: Hardware, router_bytes: int) -> int:
    """Replicas of each layer that a host may hold beside the router, which is on one of them, whichever.

    Raises: `InsufficientResources` where not all experts find a place.
    """
    usable = math.floor(hardware.host_bytes * (1 - HEADROOM)) - PROCESS_BYTES - router_bytes
    host = f"a host has {size(hardware.host_bytes)}, {HEADROOM:.0%} of which is kept free"
    if usable < 0:
        raise InsufficientResources(
            f"the router needs {size(router_bytes + PROCESS_BYTES)} (all weights but the routed experts, keys and "
            f"values), and {host}; take larger hosts, or fewer or shorter requests"
        )
    column = anatomy.column_bytes
    slots = min(slots_in_bytes(usable, {"column": column}), anatomy.num_experts)
    if slots * hardware.num_hosts < anatomy.num_experts:
        enough = f"{-(-anatomy.num_experts // slots)} such hosts would do" if slots else "a host cannot hold one"
        raise InsufficientResources(
            f"{anatomy.num_experts} experts of {size(column)} each (over all layers) do not fit: beside the router's "
            f"{size(router_bytes)} {hardware.num_hosts} hosts have room for {slots * hardware.num_hosts} ({host}); "
            f"{enough}; or hold them in 8 bits (experts.quantization: int8), or on disk (experts.offload: disk)"
        )
    return slots


def _place(popularity: Floats, num_hosts: int, slots: int, share: int) -> tuple[int, Placement, float]:
    """(spare slots, placement, balancedness): the fewest spare slots that are enough, or the best."""
    load = {"layer": popularity}
    best: tuple[int, Placement, float] | None = None
    spare = 0
    while best is None or (best[2] < ENOUGH_BALANCE and share + spare <= slots):
        hosts = [Capacity(_name(number), share + spare) for number in range(num_hosts)]
        placement = plan(load, hosts, goals=Goals(min_gain=0.0, cost_per_move=0.0))
        balance = predict(load, placement, hosts)["layer"]
        if best is None or balance > best[2] + 1e-9:
            best = (spare, placement, balance)
        if share + spare == slots:
            break
        spare = min(max(1, 2 * spare), slots - share)
    return best


def _name(number: int) -> str:
    return f"host-{number:05d}"


def _top_k(anatomy: Anatomy, given: float | None) -> float:
    k = given if given is not None else anatomy.top_k
    if k is None:
        raise InvalidConfig("how many experts a token uses is not in these files; say it with --top-k")
    if not 0 < k <= anatomy.num_experts:
        raise InvalidConfig(f"top-k is {k:g}; with {anatomy.num_experts} experts it can be 1 to {anatomy.num_experts}")
    return k


def _check(anatomy: Anatomy, hardware: Hardware, traffic: Traffic) -> None:
    if not anatomy.groups:
        raise UnsupportedModel("this model is dense: it has no routed experts to place. Upcycle it first.")
    if not anatomy.column_bytes:
        raise InvalidConfig("the sizes of this model's experts are not known; name a folder with its weights or config")
    if hardware.device not in SPEEDS:
        raise InvalidConfig(f"the device is {hardware.device!r}; expected one of {', '.join(SPEEDS)}")
    positive = {
        "number of hosts": hardware.num_hosts,
        "memory of a host": hardware.host_bytes,
        "bandwidth": hardware.bandwidth,
        "prompt tokens": traffic.prompt_tokens,
        "output tokens": traffic.output_tokens,
        "batch tokens": traffic.batch_tokens,
        "FLOP/s": 1 if hardware.flops is None else hardware.flops,
        "memory bandwidth": 1 if hardware.memory_bandwidth is None else hardware.memory_bandwidth,
    }
    at_least_0 = {
        "requests per second": traffic.requests_per_s,
        "skew": traffic.skew,
        "price": hardware.price_per_hour,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise InvalidConfig(f"the {name} is {value:g}; it must be above 0")
    for name, value in at_least_0.items():
        if not 0 <= value < math.inf:
            raise InvalidConfig(f"the {name} is {value:g}; it must be 0 or more")
