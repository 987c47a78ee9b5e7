"""Can this cluster hold this model? Asked before anything is loaded, answered with both numbers.

Pure arithmetic over what the cluster says it has. Called by `service/composition.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_moe.actors.spec import ServiceSpec
from ray_moe.config import Config
from ray_moe.errors import InsufficientResources

PROCESS_BYTES = 350 * 2**20
"""An actor that has imported torch and transformers, before any weights (RSS, of which half is shared code)."""

_NODE_ID = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class Node:
    """A living node."""

    memory_bytes: int
    """Free for actors."""
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Room:
    """What a cluster has, by resource name (CPU, GPU, custom ones)."""

    total: Mapping[str, float]
    free: Mapping[str, float]
    """Of the total, what nobody has reserved; a name is absent when nothing is left."""
    nodes: tuple[Node, ...]

    def without(self, reserved: Mapping[str, float]) -> Room:
        """The same but for what somebody else will need."""
        free = {name: amount - reserved.get(name, 0.0) for name, amount in self.free.items()}
        return replace(self, free={name: amount for name, amount in free.items() if amount > 0})


def actor_slots(config: Config, free: Mapping[str, float]) -> float:
    """How many expert actors fit beside the routers, by free CPUs, GPUs and custom resources.

    Where nodes come for those that do not fit, any number does.
    """
    if config.ray.autoscaling:
        return float("inf")
    wanted = _per_actor(config)
    routers = _of_routers(config)
    slots = [
        (free.get(name, 0.0) - routers.get(name, 0.0) + 1e-6) // amount for name, amount in wanted.items() if amount
    ]
    return max(0.0, min(slots, default=float("inf")) - config.experts.standby_actors)


def check(spec: ServiceSpec, backbone_bytes: int, room: Room) -> None:
    """Refuse what cannot be placed.

    Where nodes come for actors that do not fit, only what no node could change is judged.

    Raises: `InsufficientResources`, with what is needed and what there is.
    """
    config = spec.config
    _check_budget(spec)
    if config.ray.autoscaling:
        return
    num_actors = len(spec.hosts) + len(spec.standbys)
    needed = _of_routers(config)
    for name, amount in _per_actor(config).items():
        needed[name] = needed.get(name, 0.0) + amount * num_actors
    for name, amount in needed.items():
        total, free = room.total.get(name, 0.0), room.free.get(name, 0.0)
        if amount > free + 1e-6:
            routers = "the router" if config.router.num_actors == 1 else f"{config.router.num_actors} routers"
            others = f", of which {free:g} {'is' if free == 1 else 'are'} free" if free < total else ""
            raise InsufficientResources(
                f"{num_actors} expert actors and {routers} need {amount:g} {name}, and the cluster has {total:g}"
                f"{others}; {_advice(name)}"
            )
    _check_labels(config, room)
    _check_memory(spec, backbone_bytes, [node.memory_bytes for node in room.nodes])


def _check_budget(spec: ServiceSpec) -> None:
    max_bytes = spec.config.experts.max_bytes
    largest = max(spec.bytes_of(spec.placement.experts_on(host)) for host in spec.hosts)
    if max_bytes is not None and largest > max_bytes:
        raise InsufficientResources(
            f"an actor's equal share is {_size(largest)} of experts, and experts.max_bytes is {_size(max_bytes)}; "
            f"raise it, or start more actors than {len(spec.hosts)} (experts.num_actors)"
        )


def _check_labels(config: Config, room: Room) -> None:
    selector = config.experts.label_selector
    if not selector or any(
        all(_matches(wanted, node.labels.get(key)) for key, wanted in selector.items()) for node in room.nodes
    ):
        return
    there = sorted({f"{key}={value}" for node in room.nodes for key, value in node.labels.items() if key != _NODE_ID})
    raise InsufficientResources(
        f"no node has the labels of experts.label_selector ({', '.join(f'{k}: {v}' for k, v in selector.items())}); "
        f"the nodes have {', '.join(there) or 'none'}; start Ray with them (ray start --labels), or change the selector"
    )


def _matches(wanted: str, label: str | None) -> bool:
    """Whether a node with that label, or without it, is `wanted`: ``a``, ``!a``, ``in(a,b)`` or ``!in(a,b)``."""
    values = wanted.removeprefix("!").removeprefix("in(").removesuffix(")")
    return (label in values.replace(" ", "").split(",")) != wanted.startswith("!")


def _check_memory(spec: ServiceSpec, backbone_bytes: int, node_memory_bytes: list[int]) -> None:
    config = spec.config
    shares = [_resident_bytes(spec, spec.bytes_of(spec.placement.experts_on(host))) for host in spec.hosts]
    if config.experts.standby_preload:
        shares += [_resident_bytes(spec, spec.bytes_of(spec.all_experts))] * len(spec.standbys)
    router = 0 if config.router.num_gpus else backbone_bytes
    routers, num_processes = (
        config.router.num_actors * router,
        config.router.num_actors + len(spec.hosts) + len(spec.standbys),
    )
    processes = num_processes * PROCESS_BYTES
    needed, there = sum(shares) + routers + processes, sum(node_memory_bytes)
    if needed > there:
        fewer = ", or start fewer actors (experts.num_actors)" if sum(shares) + routers < there else ""
        raise InsufficientResources(
            f"this model needs about {_size(needed)} of memory ({_size(sum(shares))} of experts, {_size(routers)} of "
            f"other weights, {_size(processes)} for {num_processes} processes), and "
            f"{_size(there)} is available; add nodes or free memory{fewer}"
        )
    largest, roomiest = max([*shares, router]), max(node_memory_bytes, default=0)
    if largest > roomiest:
        raise InsufficientResources(
            f"one actor must hold {_size(largest)} and no node has more than {_size(roomiest)} available; "
            "spread the experts over more actors (experts.num_actors)"
        )


def _resident_bytes(spec: ServiceSpec, share: int) -> int:
    """What an actor that holds `share` bytes of experts has of them in the node's memory."""
    experts = spec.config.experts
    if experts.offload == "disk" and not experts.num_gpus:  # and the one that computes
        return min(share, experts.resident_bytes + max(layer.expert_bytes for layer in spec.layers))
    return 0 if experts.num_gpus and experts.offload != "cpu" else share


def _of_routers(config: Config) -> dict[str, float]:
    router = config.router
    return {"CPU": router.num_cpus * router.num_actors, "GPU": router.num_gpus * router.num_actors}


def _per_actor(config: Config) -> dict[str, float]:
    return {"CPU": config.experts.num_cpus, "GPU": config.experts.num_gpus, **config.experts.resources}


def _advice(name: str) -> str:
    if name == "GPU":
        return "set experts.num_gpus and router.num_gpus to 0 to compute on CPUs, or join a cluster that has GPUs"
    if name == "CPU":
        return "start fewer actors (experts.num_actors), reserve less for each (experts.num_cpus=0.5), or add nodes"
    return f"start Ray with that resource (ray start --resources), or remove {name} from experts.resources"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
