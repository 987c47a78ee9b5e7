"""Which MoE family of `transformers` a dense family becomes, so that plain `transformers` computes the same function.

A pairing is one whose blocks are the same but for the feed-forward network. Every setting of the dense model is carried
over when the target has it too, is known to change nothing, or must have the value that the target's block is built
for; else the model is refused. No tensor is read here. Called by `models/upcycle.py` and `models/merge.py`.

Shape legend: D model width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ray_moe.errors import InvalidConfig, UnsupportedModel
from ray_moe.models.writing import TensorSpec

IDLE_WIDTH = 8
"""Width of the shared expert where the target must have one and none is asked for. Its weights are zero, and stay so in
training: every product in its gradients has a zero factor."""


CORRECTION = "e_score_correction_bias"
"""Name of a gate's bias that balances load, and of which no gradient is taken."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What the MoE model is to be."""

    num_experts: int
    top_k: int
    expert_width: int
    dense_width: int
    layers: tuple[int, ...]
    """Those that become MoE, ascending."""
    num_layers: int
    shared: bool
    """Whether there is a shared expert, of the dense width."""

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.layers)


@dataclass(frozen=True, slots=True)
class Target:
    """An MoE family: its settings, and the names of its tensors on disk."""

    model_type: str
    settings: Callable[[Blueprint], Mapping[str, Any]]
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    """Name of the shared expert; empty where there is none."""
    shared_gate: bool = False
    """Whether a sigmoid multiplies the shared expert: one half as long as its gate is zero."""
    bias: bool = False
    """Whether the gate has a correction bias, kept in float32."""
    dense_layers: str = "none"
    """Which layers may stay dense: ``none``, the ``first`` ones, or ``any``."""

    def why_not(self, plan: Blueprint) -> str:
        """What this family cannot be of `plan`; empty when it can be all of it."""
        dense = plan.dense_layers
        if plan.shared and not self.shared:
            return f"{self.model_type} has no shared expert"
        if self.shared and not plan.shared and not self.shared_gate:
            return f"{self.model_type} always has a shared expert"
        if dense and self.dense_layers == "none":
            return f"in {self.model_type} every layer is MoE"
        if self.dense_layers == "first" and dense != tuple(range(len(dense))):
            return f"in {self.model_type} only the first layers can stay dense"
        return ""

    def path(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}"

    def expert(self, layer: int, number: int) -> tuple[str, str, str]:
        """Names of an expert's gate's, up and down projection."""
        return self._projections(f"{self.path(layer)}.experts.{number}")

    def shared_expert(self, layer: int) -> tuple[str, str, str]:
        gate, up, down = (f"{self.path(layer)}.{self.shared}.{name}.weight" for name in _LINEAR)
        return gate, up, down

    def gate(self, layer: int) -> str:
        return f"{self.path(layer)}.gate.weight"

    def zeros(self, layer: int, plan: Blueprint, hidden_size: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Tensors of a layer that begin as zeros."""
        specs = {}
        if self.bias:
            specs[f"{self.path(layer)}.gate.{CORRECTION}"] = TensorSpec(torch.float32, (plan.num_experts,))
        if self.shared_gate:
            specs[f"{self.path(layer)}.{self.shared}_gate.weight"] = TensorSpec(dtype, (1, hidden_size))
        if self.shared and not plan.shared:
            gate, up, down = self.shared_expert(layer)
            rows = TensorSpec(dtype, (IDLE_WIDTH, hidden_size))
            specs |= {gate: rows, up: rows, down: TensorSpec(dtype, (hidden_size, IDLE_WIDTH))}
        return specs

    def _projections(self, path: str) -> tuple[str, str, str]:
        gate, up, down = (f"{path}.{name}.weight" for name in self.projections)
        return gate, up, down


_LINEAR = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Pairing:
    """A dense family and an MoE family whose block is otherwise the same."""

    target: Target
    must: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the dense model that the target's block is built for, and their values."""
    inert: frozenset[str] = frozenset()
    """Settings of the dense model that change nothing."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the target that make its block the dense one's."""
    window: bool = False
    """Whether the target's layers can have a sliding window, the same for all."""
    whole_rotation: bool = False
    """Whether the target must be told that all of a head is rotated."""

    def why_not(self, config: Any) -> str:
        """What of this dense model the target's block does not do; empty when it does all of it."""
        name = self.target.model_type
        for setting, value in self.must.items():
            found = getattr(config, setting)
            if found != value:
                return f"{name} has no place for {setting} = {found!r} (it computes as with {value!r})"
        windows = _windows(config)
        if not self.window and windows != {None}:
            return f"{name} has no sliding window for attention of every kind (sdpa, flash ...)"
        if len(windows) > 1:
            return f"in {name} all layers have the same sliding window, in this model some have none"
        return ""

    def config(self, config: Any, plan: Blueprint) -> Any:
        """The target's configuration: the dense model's settings, then those of its experts.

        Raises:
            UnsupportedModel: the dense model has a setting that the target lacks.
        """
        known = {each.name for each in fields(type(config))}
        places = {each.name for each in fields(CONFIG_MAPPING[self.target.model_type])}
        lost = known - places - self.must.keys() - self.inert - _SPELT_OUT
        if lost:
            raise UnsupportedModel(f"{self.target.model_type} has no place for {', '.join(sorted(lost))}")
        settings = {name: getattr(config, name) for name in (known & places) - _OWN - self.inert - _SPELT_OUT}
        settings |= {"head_dim": head_dim(config), **self.extra, **self.target.settings(plan)}
        (window,) = _windows(config)
        if "sliding_window" in places:
            settings["sliding_window"] = window
        if "use_sliding_window" in places:
            settings["use_sliding_window"] = window is not None
        if self.whole_rotation:
            settings["rope_parameters"] = {**settings["rope_parameters"], "partial_rotary_factor": 1.0}
        made = CONFIG_MAPPING[self.target.model_type](**settings)
        made.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.target.model_type]]
        return made


_SPELT_OUT = frozenset({"head_dim", "sliding_window", "use_sliding_window", "layer_types", "max_window_layers"})
"""Settings that families keep in different ways."""

_OWN = {"architectures", "transformers_version", "id2label", "label2id", "problem_type"}
"""Settings that say what the dense model is, or are of no language model."""


def head_dim(config: Any) -> int:
    """The width of an attention head, which families either are told or compute."""
    told = getattr(config, "head_dim", None)
    return int(told or config.hidden_size // config.num_attention_heads)


def _windows(config: Any) -> set[int | None]:
    """The sliding windows that there are among the layers; None is all that came before."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return {window if kind == "sliding_attention" else None for kind in kinds}


# --- The MoE families ------------------------------------------------------------------------------------------------
def _mixtral(plan: Blueprint) -> dict[str, Any]:
    return {
        "intermediate_size": plan.expert_width,
        "num_local_experts": plan.num_experts,
        "num_experts_per_tok": plan.top_k,
    }


def _qwen2_moe(plan: Blueprint) -> dict[str, Any]:
    width = plan.dense_width if plan.shared else IDLE_WIDTH
    return {**_qwen3_moe(plan), "shared_expert_intermediate_size": width}


def _qwen3_moe(plan: Blueprint) -> dict[str, Any]:
    return {
        "intermediate_size": plan.dense_width,
        "moe_intermediate_size": plan.expert_width,
        "num_experts": plan.num_experts,
        "num_experts_per_tok": plan.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(plan.dense_layers),
    }


def _flex_olmo(plan: Blueprint) -> dict[str, Any]:
    return {
        "intermediate_size": plan.expert_width,
        "num_experts": plan.num_experts,
        "num_experts_per_tok": plan.top_k,
        "norm_topk_prob": True,
    }


def _glm4_moe(plan: Blueprint) -> dict[str, Any]:
    return {
        "intermediate_size": plan.dense_width,
        "moe_intermediate_size": plan.expert_width,
        "n_routed_experts": plan.num_experts,
        "num_experts_per_tok": plan.top_k,
        "n_shared_experts": plan.dense_width // plan.expert_width,  # its width, in experts
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": len(plan.dense_layers),
        "num_mtp_layers": 0,
    }


MIXTRAL = Target("mixtral", _mixtral, "block_sparse_moe", ("w1", "w3", "w2"))
QWEN2_MOE = Target("qwen2_moe", _qwen2_moe, shared="shared_expert", shared_gate=True, dense_layers="any")
QWEN3_MOE = Target("qwen3_moe", _qwen3_moe, dense_layers="any")
FLEX_OLMO = Target("flex_olmo", _flex_olmo)
GLM4_MOE = Target("glm4_moe", _glm4_moe, shared="shared_experts", bias=True, dense_layers="first")

_LLAMA: dict[str, Any] = {"must": {"attention_bias": False, "mlp_bias": False}, "inert": frozenset({"pretraining_tp"})}

# A window of Qwen2-MoE (5.23) is in its mask only, which flash attention does not get; GLM-4-MoE has none.
PAIRINGS: dict[str, tuple[Pairing, ...]] = {
    "llama": (Pairing(MIXTRAL, **_LLAMA), Pairing(QWEN2_MOE, **_LLAMA, extra={"qkv_bias": False})),
    "mistral": (Pairing(MIXTRAL, window=True), Pairing(QWEN2_MOE, extra={"qkv_bias": False})),
    "qwen2": (Pairing(QWEN2_MOE, extra={"qkv_bias": True}),),
    "qwen3": (
        Pairing(QWEN3_MOE, window=True),
        Pairing(GLM4_MOE, must={"attention_bias": False}, extra={"use_qk_norm": True}, whole_rotation=True),
    ),
    "olmo2": (Pairing(FLEX_OLMO),),
}
"""Dense model_type -> the MoE families it can become, the plainest first."""

_WHY_NOT = {
    "olmo": "OLMo's norms have no weights and subtract the mean, which those of OLMoE do not",
    "olmo3": "of the MoE families with OLMo's norms after attention, none has windows",
}


def check_family(model_type: str) -> None:
    """Raises: `UnsupportedModel` when there is no MoE family for dense models of this one."""
    if model_type not in PAIRINGS:
        why = _WHY_NOT.get(model_type, f"dense families that become MoE are {', '.join(PAIRINGS)}")
        raise UnsupportedModel(
            f"no MoE family of transformers is known to have the block of {model_type} models: {why}"
        )


def pairing(config: Any, plan: Blueprint) -> Pairing:
    """The first MoE family that can be what `plan` says with the block of this dense model.

    Raises:
        UnsupportedModel: there is none for this dense model.
        InvalidConfig: there is one, but not with such layers or a shared expert.
    """
    check_family(config.model_type)
    against_model: list[str] = []
    against_plan: list[str] = []
    for each in PAIRINGS[config.model_type]:
        of_model, of_plan = each.why_not(config), each.target.why_not(plan)
        if not of_model and not of_plan:
            return each
        if of_model:
            against_model.append(of_model)
        else:
            against_plan.append(of_plan)
    if against_plan:
        raise InvalidConfig(f"{'; '.join(against_plan)}. Choose other layers, or leave the shared expert out")
    raise UnsupportedModel(
        f"this {config.model_type} model cannot become an MoE model that computes the same: {'; '.join(against_model)}"
    )
