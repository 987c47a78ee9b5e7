"""Tiny random Mixture-of-Experts models, one per family, and a byte-level tokenizer: test material in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTRAL_LIKE = {**_COMMON, "intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2}
_SHARED_EXPERT = {**_COMMON, "intermediate_size": 64, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
_DEEPSEEK = {
    **_SHARED_EXPERT,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 2.5,
}

TINY: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTRAL_LIKE,
    "olmoe": {**_COMMON, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": {
        **_SHARED_EXPERT,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**_SHARED_EXPERT, "num_experts": 8, "head_dim": 8, "norm_topk_prob": True},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_DEEPSEEK, "norm_topk_prob": True},
    "gpt_oss": {
        **_MIXTRAL_LIKE,
        "head_dim": 8,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": _MIXTRAL_LIKE,
    "phimoe": {**_MIXTRAL_LIKE, "lm_head_bias": True, "attention_bias": True},
    "glm4_moe": {
        **_SHARED_EXPERT,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
    },
    "minimax": {**_MIXTRAL_LIKE, "head_dim": 8, "block_size": 16},
    "ernie4_5_moe": {
        **_COMMON,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 1,
        "moe_k": 3,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "use_bias": True,
    },
    "jamba": {
        **_COMMON,
        "intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
    },
    "llama4_text": {
        **_MIXTRAL_LIKE,
        "intermediate_size_mlp": 64,
        "head_dim": 8,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
    },
    "dbrx": {
        "vocab_size": 96,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 32},
    },
    "gemma4_text": {
        **_COMMON,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
    },
    "jetmoe": {
        **_MIXTRAL_LIKE,
        "num_key_value_heads": 4,
        "kv_channels": 8,
        "num_attention_heads": 8,
        "activation_function": "silu",
    },
}
"""model_type -> arguments of its configuration."""


def config(name: str, **changes: Any) -> Any:
    """The tiny configuration of a family, with some arguments changed."""
    return CONFIG_MAPPING[name](**{**TINY[name], **changes})


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family, in evaluation mode, with weights large enough that its experts differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name, **changes))
    randomize(model, seed)
    return model.to(dtype).eval()


def randomize(model: Any, seed: int = 0) -> None:
    """Fill a model with weights under which gates choose differently per token and outputs stay moderate."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15 if parameter.ndim == 2 else 0.25, generator=generator)
            elif "norm" not in name:
                parameter.normal_(0, 0.1, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():
                buffer.normal_(0, 0.3, generator=generator)


def save(name: str, folder: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Write a random model of a family as a checkpoint, in the family's own layout on disk; returns the model."""
    model = build(name, dtype, seed, **changes)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: str | Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer with 3 special tokens and the 256 bytes (a vocabulary of 259)."""
    specials = ["<pad>", "<bos>", "<eos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(specials + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast
