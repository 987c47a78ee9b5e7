"""Checkpoints of any size that take no time and no space: all weights are zero, and zeros in a sparse file are free."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.tiny_models import config


def sparse_mixtral(folder: Path, hidden: int, inner: int, layers: int, experts: int = 8, vocab: int = 96) -> None:
    """Write a Mixtral checkpoint in bfloat16 with 64 heads, whose files have headers and, for every weight, a hole."""
    settings = config(
        "mixtral",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_local_experts=experts,
        vocab_size=vocab,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=hidden // 64,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )
    settings.save_pretrained(folder)
    kv = hidden // 8
    files: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "lm_head.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.block_sparse_moe.gate.weight": (experts, hidden),
        }
        for expert in range(experts):
            moe = f"{at}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{moe}.w1.weight": (inner, hidden), f"{moe}.w2.weight": (hidden, inner)}
            shapes |= {f"{moe}.w3.weight": (inner, hidden)}
        files.append(shapes)
    weight_map, total = {}, 0
    for number, shapes in enumerate(files):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, end = {}, 0
        for key, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
