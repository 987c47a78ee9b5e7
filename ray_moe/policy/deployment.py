"""A configuration to serve a model with, as YAML: the few settings that follow from what the model is.

Pure text from values. Called by `cli/inspect.py` and `cli/advise.py`; that `ray_moe.config` accepts it is tested there.
"""

from __future__ import annotations

import json

from ray_moe.policy.anatomy import Anatomy

_MIB = 2**20
MIN_KV_TOKENS = 16_384
"""Room for keys and values that a suggestion has, at least."""


def suggest(model: str, anatomy: Anatomy, num_hosts: int, **more: dict[str, object]) -> str:
    """Settings for `model` on `num_hosts` expert actors, each with a comment where it comes from.

    Args:
        more: settings besides, by section: name -> (value, why).
    """
    num_actors = max(1, min(num_hosts, anatomy.num_experts))
    each = -(-anatomy.num_experts // num_actors)
    held = anatomy.memory(num_actors).expert_bytes
    sections: dict[str, dict[str, object]] = {
        "experts": {
            "num_actors": (num_actors, f"{each} of {anatomy.num_experts} expert indices each, {_size(held)}"),
        },
        "router": {},
    }
    if anatomy.kv_bytes_per_token:
        kv_bytes = max(2**30, MIN_KV_TOKENS * anatomy.kv_bytes_per_token)
        tokens = kv_bytes // anatomy.kv_bytes_per_token
        sections["router"]["kv_cache_bytes"] = (f"{-(-kv_bytes // _MIB)}MiB", f"{tokens} tokens")
    for section, settings in more.items():
        sections.setdefault(section, {}).update(settings)
    lines = [f"model: {json.dumps(model, ensure_ascii=False)}"]
    for section, settings in sections.items():
        if settings:
            lines.append(f"{section}:")
            lines += [f"  {name}: {_value(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    inner, why = value if isinstance(value, tuple) else (value, "")
    text = json.dumps(inner) if isinstance(inner, bool) else str(inner)
    return f"{text}  # {why}" if why else text


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / _MIB:.1f} MiB"
