"""The part of `train:` that says how experts are chosen in training: another gate, losses, and methods.

Called by `config_train.py`. What torch is needed for is imported when a gate is named: whoever names none needs none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from ray_moe.config_types import Number, Section
from ray_moe.errors import InvalidConfig

NotNegative = Annotated[float, Field(ge=0), Number]
Rate = Annotated[float, Field(ge=0, lt=1), Number]
Steps = Annotated[int, Field(ge=0), Number]
Count = Annotated[int, Field(ge=1), Number]


# --- The gate ------------------------------------------------------------------------------------------------
def _named(value: object) -> object:
    """A name alone is that gate with its defaults; nothing is none."""
    if isinstance(value, str):
        return {"name": value}
    return {} if value is None else value


def _checked(gate: dict[str, Any]) -> dict[str, Any]:
    """With each option as its gate has it. Raises: ValueError for a gate or an option that cannot be."""
    if not gate:
        return gate
    from ray_moe.ops.gates.registry import GATES, settings_class

    name, options = gate.get("name"), {key: value for key, value in gate.items() if key != "name"}
    if not isinstance(name, str) or (name not in GATES and ":" not in name):
        raise ValueError(f"should have one of these as its name: {', '.join(GATES)}, or module:Class; got {name!r}")
    try:
        kind = settings_class(name)
    except InvalidConfig as error:
        raise ValueError(f"names a gate that is not there: {error}") from None
    known = kind.__dataclass_fields__
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"has an option {unknown[0]!r}, which the gate {name} has not; it has {', '.join(known)}")
    try:
        settings = TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        said = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"has options that the gate {name} cannot have: {'; '.join(said)}") from None
    except InvalidConfig as error:
        raise ValueError(f"has options that the gate {name} cannot have: {error}") from None
    return {"name": name, **{option: getattr(settings, option) for option in options}}


GateOptions = Annotated[dict[str, bool | int | float | str | None], BeforeValidator(_named), AfterValidator(_checked)]
"""``{name: sigmoid, num_groups: 4}``, or a name; empty is no gate. ``module:Class`` is one of somebody's own."""


# --- Losses --------------------------------------------------------------------------------------------------
class AuxiliaryConfig(Section):
    """Losses that a gate wants minimised beside: coefficients, for each layer of experts; 0 leaves one out. The loss of
    a step that is reported has them in it, that of validation has not."""

    load_balancing: NotNegative = 0.0
    """How unevenly tokens are spread over the experts (GShard, Switch Transformer); 0.01 is usual."""
    router_z: NotNegative = 0.0
    """How large the gate's logits are, which makes low precision unstable (ST-MoE); 0.001 is usual."""
    importance: NotNegative = 0.0
    """How unevenly the experts' weights are spread (the first sparsely gated layers)."""
    load: NotNegative = 0.0
    """How unevenly tokens are spread, estimated from the noise of the gate `noisy_topk` (`train.gate`)."""
    entropy: NotNegative = 0.0
    """How unsure the gate is, with the gate `dynamic_k`; it then needs fewer experts."""
    expected_experts: NotNegative = 0.0
    """How many experts a token is expected to have, with the gates `gumbel` and `hard_concrete`."""

    @property
    def coefficients(self) -> dict[str, float]:
        """Those that are not 0, by the names of `ops/losses.py` and of the gates."""
        return {name: factor for name, factor in self.model_dump().items() if factor}


OF_GATES = ("load", "entropy", "expected_experts")
"""Losses that only some gates tell."""


# --- Methods -------------------------------------------------------------------------------------------------
class ActiveExpertsConfig(Section):
    """A curriculum: tokens begin with another number of experts, and come to the model's own (that of `train.gate`)."""

    first: Count | None = None
    """Experts of a token at first; null is the model's own number from the beginning."""
    steps: Count = 1000
    """In so many steps the number goes from one to the other."""
    begin: Steps = 0
    """The step it begins to change at."""
    shape: Literal["linear", "cosine", "exponential"] = "linear"
    """How it goes between."""


class FreezeGateConfig(Section):
    """When gates learn; a gate that does not is left as it is, by weight decay and momenta too."""

    before: Steps = 0
    """Not before this step (from 0)."""
    after: Steps | None = None
    """Nor from this step on; null is never."""


class CapacityConfig(Section):
    """How many choices an expert takes of one micro-batch, in training alone."""

    factor: Annotated[float, Field(gt=0), Number] | None = None
    """Times the mean number of choices of an expert; null is no limit, and 1.25 is usual."""
    min_capacity: Steps = 1
    """What every expert takes at least."""
    policy: Literal["drop", "next", "random"] = "drop"
    """What becomes of a choice that its expert has no room for: it is dropped (and counted, as `dropped_tokens`), or
    goes to the token's next most probable expert with room, or to a random one."""
    priority: Literal["position", "probability"] = "position"
    """Who comes first: earlier tokens, or those whose gate is surer."""


class MethodsConfig(Section):
    """What changes the gates' choices from step to step. Validation, what is published and what is exported have none
    of it."""

    active_experts: ActiveExpertsConfig = ActiveExpertsConfig()
    freeze_gate: FreezeGateConfig = FreezeGateConfig()
    random_routing: Steps = 0
    """In so many first steps tokens go to random experts, as many as the gate would choose, so that all learn."""
    expert_dropout: Rate = 0.0
    """Probability with which an expert is left out of a step; the weights of the others make up for it."""
    capacity: CapacityConfig = CapacityConfig()
