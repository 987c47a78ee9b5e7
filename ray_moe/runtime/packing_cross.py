"""Many sequences at once through an encoder-decoder of `transformers` with T5's attention: `packing.py` for two halves.

The encoder gets prompts as one row [1, S]. The decoder gets tokens as rows of one, [Q, 1], for what it counts within a
row. Attention regroups them: each sequence's part attends to its own prompt (encoder, cross-attention) or to its own
tokens (self-attention), by the very function that the model would have used for it alone. Positions are relative
(Raffel et al., arXiv:1910.10683, section 2.1): a bias on the scores that depends on the distance of two tokens, so one
for the longest of a step has all others in it.

Called by `encoder_decoder.py`, in one thread.

Shape legend: S tokens of all new prompts, Q tokens of the decoder, A attention heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutput

from ray_moe.runtime import packing
from ray_moe.runtime.kv_cache import KVCache
from ray_moe.runtime.packing import MasklessCache, attention_of, causal_mask, is_packed_step


def pack(model: nn.Module) -> None:
    """Prepare `model` for packed rows. What it is asked outside of `step_of` it computes as before."""
    packing.pack(model)
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            module.__dict__["compute_bias"] = partial(_bias_of_row, module)


def _bias_of_row(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of the bias between all tokens of a row, which nobody needs when they are of different sequences."""
    if is_packed_step():
        return torch.zeros(1, 1, 1, 1)
    return _bias(module, *args, **kwargs)


def _bias(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """[1, A, number of queries, number of keys], as the class of `module` computes it."""
    bias: torch.Tensor = type(module).compute_bias(module, *args, **kwargs)
    return bias


def nothing_new() -> Any:
    """What the decoder gets of the encoder in a step without new prompts. It does not look at it."""
    return MoEModelOutput(last_hidden_state=torch.zeros(1, 1, 1))


class EncoderRow:
    """Prompts one after the other, each seen by its own tokens alone."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        self._bias = torch.empty(0)

    def attend(
        self, base: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[1, A, S, D] -> [1, S, A, D]."""
        if module.has_relative_attention_bias:  # the first layer has it for all
            longest = max(self._lengths)
            self._bias = _bias(module, longest, longest, device=query.device)
        attend, outputs = attention_of(module, base), []
        for parts in zip(*(each.split(self._lengths, 2) for each in (query, key, value)), strict=True):
            length = parts[0].shape[2]
            kwargs["position_bias"] = self._bias[:, :, :length, :length]
            outputs.append(attend(module, *parts, None, **kwargs)[0])
        return torch.cat(outputs, 1)


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a step that belong to one sequence."""

    cache: KVCache
    """Keys and values of the prompt, for cross-attention, and behind them those of the decoder's tokens."""
    num_source: int
    """Tokens of the prompt."""
    begin: int
    """Where in the cache the first of its rows is."""
    start: int
    """The first of its rows."""
    length: int
    """How many they are."""

    @property
    def is_new(self) -> bool:
        return self.cache.length < self.num_source

    @property
    def end(self) -> int:
        """The decoder's tokens end here in the cache."""
        return self.begin + self.length

    @property
    def num_seen(self) -> int:
        """Tokens of the decoder that the last row sees."""
        return self.end - self.num_source


class DecoderRows:
    """Tokens of some sequences, [Q, 1], and what the model takes for its cache while it computes them."""

    def __init__(self, parts: Sequence[Part], num_layers: int) -> None:
        self._parts = list(parts)
        self._new = [part for part in self._parts if part.is_new]
        self._bias = torch.empty(0)
        self._masks: dict[Any, torch.Tensor | None] = {}
        self.cache = EncoderDecoderCache(_Written(self._keep_target), _Written(self._keep_sources, num_layers))
        self.cache.is_updated = dict.fromkeys(range(num_layers), not self._new)

    def _keep_target(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """[Q, A, 1, D] of all rows."""
        keys, values = keys.transpose(0, 2), values.transpose(0, 2)
        for part in self._parts:
            rows = slice(part.start, part.start + part.length)
            part.cache.write(layer, keys[:, :, rows], values[:, :, rows], part.begin)

    def _keep_sources(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """[1, A, S, D] of all new prompts."""
        lengths = [part.num_source for part in self._new]
        for part, of_keys, of_values in zip(self._new, keys.split(lengths, 2), values.split(lengths, 2), strict=True):
            part.cache.write(layer, of_keys, of_values, begin=0)

    def attend(
        self, base: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[Q, A, 1, D] -> [1, Q, A, D]."""
        query = query.transpose(0, 2)
        if module.has_relative_attention_bias:  # the first layer has it for all
            most, longest = max(part.length for part in self._parts), max(part.num_seen for part in self._parts)
            self._bias = _bias(module, most, longest, device=query.device, past_seen_tokens=longest - most)
        attend, outputs = attention_of(module, base), []
        for part in self._parts:
            own = query[:, :, part.start : part.start + part.length]
            if module.is_causal:  # attention to its own tokens
                keys, values = part.cache.read(module.layer_idx, part.end, part.num_source)
                mask = causal_mask(self._masks, base, query, part.length, part.num_seen)
                kwargs["position_bias"] = self._bias[:, :, -part.length :, -part.num_seen :]
            else:
                keys, values = part.cache.read(module.layer_idx, part.num_source)
                mask = kwargs["position_bias"] = None
            outputs.append(attend(module, own, keys, values, mask, **kwargs)[0])
        return torch.cat(outputs, 1)


class _Written(MasklessCache):
    """One of the two caches: it gives back what it is given, and `keep` knows where that belongs."""

    def __init__(self, keep: Any, num_layers: int = 0) -> None:
        """Args: num_layers: for so many it says that all is there when it is asked; that is not looked at either."""
        super().__init__()
        nothing = torch.zeros(1, 1, 1, 1)
        self.layers = [SimpleNamespace(keys=nothing, values=nothing)] * num_layers
        self._keep = keep

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._keep(layer_idx, key_states, value_states)
        return key_states, value_states
