"""Writes GGUF headers, after the format's description (ggml/docs/gguf.md): test material."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(value: Any) -> bytes:
    """A typed value of the metadata."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    inner = entry(value[0])[:4]
    return struct.pack("<I", 9) + inner + struct.pack("<Q", len(value)) + b"".join(entry(each)[4:] for each in value)


def write(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int]], version: int = 3
) -> Path:
    """Metadata, and tensors as name -> (shape in torch's order, type); the weights themselves are left out."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    out += b"".join(text(key) + entry(value) for key, value in metadata.items())
    for name, (shape, kind) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)) + struct.pack("<IQ", kind, 0)
    path.write_bytes(out)
    return path


def mixtral(path: Path) -> Path:
    """Two layers of eight experts of which two are used, in 8 bits, with the matrices of all experts in one tensor."""
    metadata = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
        "tokenizer.ggml.tokens": ["<s>", "a", "b"],
        "tokenizer.ggml.scores": [0.0, 1.0, 2.0],
        "tokenizer.ggml.add_bos_token": True,
    }
    tensors: dict[str, tuple[tuple[int, ...], int]] = {
        "token_embd.weight": ((96, 64), 8),
        "output.weight": ((96, 64), 8),
    }
    for layer in range(2):
        tensors |= {
            f"blk.{layer}.attn_q.weight": ((64, 64), 8),
            f"blk.{layer}.attn_norm.weight": ((64,), 0),
            f"blk.{layer}.ffn_gate_inp.weight": ((8, 64), 0),
            f"blk.{layer}.ffn_gate_exps.weight": ((8, 128, 64), 8),
            f"blk.{layer}.ffn_up_exps.weight": ((8, 128, 64), 8),
            f"blk.{layer}.ffn_down_exps.weight": ((8, 64, 128), 8),
        }
    return write(path, metadata, tensors)
