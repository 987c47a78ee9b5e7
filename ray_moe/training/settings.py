"""What can be set about training. Plain values; `config.py` and the trainer's callers make them from the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ray_moe.errors import InvalidConfig

WireDtype = Literal["same", "float16", "bfloat16", "int8"]
GradientCompression = Literal["none", "1bit"]


@dataclass(frozen=True, slots=True)
class ExchangeSettings:
    """How rows travel to the experts that are trained, and back."""

    recompute: bool = False
    """Whether hosts compute forward a second time when they go backward, instead of keeping the activations."""
    call_timeout_s: float = 60.0
    """A host that has answered nothing for so long is taken for lost."""
    wire: WireDtype = "same"
    """What hidden states, rows and their gradients are sent as; `int8` has a float32 scale for each row."""
    num_parts: int = 1
    """Parts that each expert is cut into, on different hosts where there are as many."""

    def __post_init__(self) -> None:
        """Raises: `InvalidConfig`."""
        if not self.call_timeout_s > 0:
            raise InvalidConfig(f"call_timeout_s is {self.call_timeout_s}; it must be more than 0")
        if self.num_parts < 1:
            raise InvalidConfig(f"num_parts is {self.num_parts}; it must be 1 or more")
        if self.wire not in get_args(WireDtype):
            raise InvalidConfig(f"wire is {self.wire!r}; give one of {', '.join(get_args(WireDtype))}")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a step is made and made good."""

    clip_norm: float | None = 1.0
    """Largest global norm of the gradients, over backbone and experts; None does not clip."""
    snapshot_every: int = 1
    """After so many steps every host's state is copied to another host; 0 never does, and only checkpoints are left."""
    max_attempts: int = 10
    """How often one step is begun before it is given up."""
    num_replicas: int = 1
    """Hosts that share the rows of each expert."""
    gradient_compression: GradientCompression = "none"
    """How gradients of weights travel: with `1bit` those of experts, from replicas to owners, in one bit a number, and
    those of the rest, between workers, in four; what that leaves out is added to those of the next step."""
    compression_warmup_steps: int = 0
    """First steps of the run, whose gradients travel whole all the same."""
    in_flight: int = 1
    """Micro-batches that a worker computes at a time: while the rows of one are with the experts, it is at another."""
    seed: int = 0
    """Of whatever is random in a step: every attempt at it draws the same."""

    def __post_init__(self) -> None:
        """Raises: `InvalidConfig`."""
        least = {"snapshot_every": 0, "max_attempts": 1, "num_replicas": 1, "compression_warmup_steps": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be {value} or more")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InvalidConfig(f"clip_norm is {self.clip_norm}; it must be more than 0, or None not to clip")

    def compression(self, step: int) -> GradientCompression:
        """How the gradients of a step travel, which counts from 1. It depends on nothing else, so a step that is made
        again sends the same."""
        return self.gradient_compression if step > self.compression_warmup_steps else "none"
