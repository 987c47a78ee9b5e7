"""Configurations of many families, with what they are: worked out by hand from each family's formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING

from ray_moe.policy.anatomy import Kind
from tests.tiny_models import TINY

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_GPT: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A configuration and what is true of it."""

    family: str
    arguments: dict[str, Any]
    kind: Kind
    num_groups: int = 0
    """Layers with routed experts (JetMoE: two groups in each)."""
    num_experts: int = 0
    top_k: float = 0
    expert_params: int = 0
    """Of one expert of each group, summed over the groups of a layer."""
    label: str = ""

    @property
    def config(self) -> Any:
        return CONFIG_MAPPING[self.family](**self.arguments)

    def __str__(self) -> str:
        return self.label or self.family


def gated(width: int, inner: int) -> int:
    """Parameters of an expert down(act(gate(x)) * up(x))."""
    return 3 * width * inner


def plain(width: int, inner: int) -> int:
    """Of an expert down(act(up(x)))."""
    return 2 * width * inner


def tiny(family: str, kind: Kind, groups: int, experts: int, k: int, params: int, label: str = "", **more: Any) -> Case:
    return Case(family, TINY[family] | more, kind, groups, experts, k, params, label)


MOE = [
    tiny("mixtral", "moe", 2, 6, 2, gated(32, 48)),
    tiny("olmoe", "moe", 2, 8, 3, gated(32, 48)),
    tiny("qwen2_moe", "hybrid", 2, 8, 3, gated(32, 24)),
    tiny("qwen3_moe", "moe", 2, 8, 3, gated(32, 24)),
    tiny("deepseek_v2", "hybrid", 1, 8, 3, gated(32, 24)),
    tiny("deepseek_v3", "hybrid", 1, 8, 3, gated(32, 24)),
    tiny("gpt_oss", "moe", 2, 6, 2, gated(32, 48) + 2 * 48 + 32),
    tiny("granitemoe", "moe", 2, 6, 2, gated(32, 48)),
    tiny("phimoe", "moe", 2, 6, 2, gated(32, 48)),
    tiny("glm4_moe", "hybrid", 1, 8, 3, gated(32, 24)),
    tiny("minimax", "moe", 2, 6, 2, gated(32, 48)),
    tiny("ernie4_5_moe", "hybrid", 1, 8, 3, gated(32, 24)),
    tiny("jamba", "hybrid", 2, 4, 2, gated(32, 48)),
    tiny("llama4_text", "hybrid", 2, 6, 2, gated(32, 48)),
    tiny("llama4_text", "moe", 4, 6, 2, gated(32, 48), "llama4, all layers", interleave_moe_layer_step=1),
    tiny("dbrx", "moe", 2, 6, 2, gated(32, 24)),
    tiny("gemma4_text", "moe", 2, 8, 2, gated(32, 24)),
    tiny("jetmoe", "moe", 4, 6, 2, 0),
    tiny("deepseek_v3", "moe", 2, 8, 3, gated(32, 24), "deepseek_v3, no dense layer", first_k_dense_replace=0),
    Case(
        "qwen3_next",
        _TEXT
        | {
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "moe",
        2,
        8,
        2,
        gated(32, 24),
    ),
    Case(
        "granitemoehybrid",
        _TEXT
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "layer_types": ["mamba", "attention"],
        },
        "moe",
        2,
        4,
        2,
        gated(32, 48),
    ),
    Case(
        "switch_transformers",
        _SEQ2SEQ
        | {
            "d_kv": 8,
            "d_ff": 64,
            "num_heads": 4,
            "num_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_decoder_layers": 4,
            "num_sparse_decoder_layers": 2,
            "num_experts": 4,
        },
        "hybrid",
        4,
        4,
        1,
        plain(32, 64),
    ),
    Case(
        "nllb-moe",
        _SEQ2SEQ
        | {
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_experts": 6,
            "max_position_embeddings": 64,
        },
        "hybrid",
        4,
        6,
        2,
        plain(32, 64) + 64 + 32,
    ),
    Case("hunyuan_v1_moe", _TEXT | {"num_experts": 4, "moe_topk": 2, "head_dim": 8}, "moe", 2, 4, 2, gated(32, 48)),
    Case(
        "dots1",
        _TEXT
        | {
            "num_hidden_layers": 3,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
        "hybrid",
        2,
        8,
        2,
        gated(32, 24),
    ),
    Case(
        "lfm2_moe",
        _TEXT
        | {
            "num_hidden_layers": 3,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        "hybrid",
        2,
        8,
        2,
        gated(32, 24),
    ),
    Case(
        "longcat_flash",
        {k: v for k, v in TINY["deepseek_v3"].items() if k not in ("n_group", "topk_group", "num_hidden_layers")}
        | {
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "head_dim": 8,
            "zero_expert_num": 0,
            "moe_topk": 3,
        },
        "moe",
        2,
        8,
        3,
        gated(32, 24),
    ),
    Case("flex_olmo", _TEXT | {"num_experts": 4, "num_experts_per_tok": 2}, "moe", 2, 4, 2, gated(32, 48)),
]
"""Of which each token uses some experts."""

DENSE = [
    Case("llama", _TEXT, "dense"),
    Case("mistral", _TEXT, "dense"),
    Case("qwen2", _TEXT, "dense"),
    Case("qwen3", _TEXT, "dense"),
    Case("gemma", _TEXT | {"head_dim": 8}, "dense"),
    Case("gemma2", _TEXT | {"head_dim": 8}, "dense"),
    Case("phi", _TEXT, "dense"),
    Case("stablelm", _TEXT, "dense"),
    Case("gpt_neox", {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}, "dense"),
    Case("gpt2", _GPT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "dense"),
    Case("bloom", _GPT | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}, "dense"),
    Case(
        "opt",
        _GPT
        | {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        "dense",
    ),
    Case(
        "bert",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
        "dense",
    ),
    Case("t5", _SEQ2SEQ | {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "dense"),
    Case(
        "vit",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 8,
        },
        "dense",
    ),
    Case("mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "dense"),
    tiny("gemma4_text", "dense", 0, 0, 0, 0, "gemma4, experts switched off", enable_moe_block=False),
    Case("qwen2_moe", TINY["qwen2_moe"] | {"mlp_only_layers": [0, 1, 2]}, "dense", label="qwen2_moe, all layers dense"),
]
"""Of which each token uses every weight."""
