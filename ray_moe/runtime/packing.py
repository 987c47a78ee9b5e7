"""Many sequences in one row through a `transformers` model: what only attention must know is kept from all else.

Norms, projections, gates and experts treat tokens alike, so all tokens of a step travel as one row [1, Q], and the
experts get them as one batch. Attention is the exception: each sequence's part of the row attends to that sequence's
own keys and values, by the very function that the model would have used for it alone.

Models whose memory is not keys and values alone (state-space and linear-attention hybrids), or whose attention or
positions depend on more than that, cannot be packed; `can_pack` tells. Called by `decoder_only.py`, in one thread;
`packing_cross.py` does the same for encoder-decoders.

Shape legend: Q tokens of a step, A attention heads, H key/value heads, D head width, L tokens a sequence has.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ray_moe.models.rope import has_changing_rope
from ray_moe.runtime.kv_cache import KVCache

BASES = ("sdpa", "eager")
"""Attention functions of `transformers` that can be asked for one sequence after the other."""

PREFIX = "ray_moe_packed_"
"""With one of `BASES` behind it: the name under which `transformers` finds our attention function."""

_step = threading.local()
"""Whose `row` is the one that this thread is computing; absent or None while it computes none."""


class Row(Protocol):
    """Tokens of several sequences, on their way through a model."""

    def attend(
        self, base: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """What the attention `module` answers, each sequence by itself; `base` names the function it would call."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a row that belongs to one sequence."""

    cache: KVCache
    start: int
    """Where it begins in the row."""
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def total(self) -> int:
        """Tokens that the sequence has after this step."""
        return self.cache.length + self.length


class MasklessCache(Cache):
    """The cache of a packed step as the model sees it: empty, since nothing is to be made of it. Masks, and biases of
    positions, are of one sequence each, and `Row.attend` makes its own."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class PackedCache(MasklessCache):
    """What the model takes for its cache while it computes a packed row."""

    def __init__(self, segments: Sequence[Segment], gathers: bool) -> None:
        """Args: gathers: whether the model works on what is cached before attention gets it (latent attention, layers
        that share keys and values), so that it must be given the keys and values of all sequences, one after another.
        Else they stay where they are.
        """
        super().__init__()
        self.segments = segments
        self.gathers = gathers
        self.given: dict[int, torch.Tensor] = {}
        """Keys that the model got for each layer."""
        self.masks: dict[Any, torch.Tensor | None] = {}
        """Masks are the same in every layer."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys and values of the row, [1, H, Q, D] each."""
        for one, keys, values in zip(self.segments, self._cut(key_states), self._cut(value_states), strict=True):
            one.cache.write(layer_idx, keys, values)
        if not self.gathers:
            self.given[layer_idx] = key_states
            return key_states, value_states
        every = zip(*(one.cache.read(layer_idx, one.total) for one in self.segments), strict=True)
        all_keys, all_values = (torch.cat(parts, 2) for parts in every)
        return all_keys, all_values

    def attend(
        self, base: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[1, A, Q, D] -> [1, Q, A, D]."""
        attend, layer = attention_of(module, base), module.layer_idx
        window: int | None = kwargs.get("sliding_window")
        if not self.gathers and self.given.get(layer) is not key:
            raise MustGather
        seen = self._seen(layer, key, value, window)
        # Single tokens, as in decoding, go to the kernel without what `transformers` looks after around it.
        is_plain = base == "sdpa" and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
        first = len(list(takewhile(lambda one: one.length == 1, self.segments))) if is_plain else 0
        outputs = [_attend_singly(query[:, :, :first], seen[:first], kwargs.get("scaling"))] if first else []
        if first < len(self.segments):
            for one, asking, (keys, values) in list(zip(self.segments, self._cut(query), seen, strict=True))[first:]:
                mask = causal_mask(self.masks, base, query, one.length, keys.shape[2], window)
                # A single token sees all that is left, and a first chunk what `sdpa` calls causal.
                outputs.append(attend(module, asking, keys, values, mask, **kwargs)[0])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _seen(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each sequence, the [1, H, L, D] keys and values that its new tokens may see."""
        seen, begin = [], 0
        for one in self.segments:
            first = 0 if window is None else max(0, one.total - (window + one.length - 1))
            if self.gathers:
                keys, values = (part[:, :, begin + first : begin + one.total] for part in (key, value))
                begin += one.total
            else:
                keys, values = one.cache.read(layer, one.total, first)
            seen.append((keys, values))
        return seen

    def _cut(self, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[1, heads, Q, D] in the parts of the sequences."""
        parts: tuple[torch.Tensor, ...] = row.split([one.length for one in self.segments], 2)
        return parts


def _attend_singly(
    query: torch.Tensor, seen: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float | None
) -> torch.Tensor:
    """[1, A, Q, D] -> [1, Q, A, D]: Q tokens of as many sequences, each of which sees all of its [1, H, L, D].

    The A / H heads that share keys go to them as one matrix, so that each key is read once.
    """
    num_heads, num_tokens, width = query.shape[1:]
    num_groups = seen[0][0].shape[1]
    asking = query[0].transpose(0, 1).reshape(num_tokens, num_groups, num_heads // num_groups, width).split(1)
    outputs = [
        functional.scaled_dot_product_attention(token, keys, values, scale=scale)
        for token, (keys, values) in zip(asking, seen, strict=True)
    ]
    return torch.cat(outputs).reshape(1, num_tokens, num_heads, -1)


@contextmanager
def step_of(row: Row) -> Iterator[None]:
    """While the block runs, models that were prepared by `pack` compute packed rows in this thread."""
    _step.row = row
    try:
        yield
    finally:
        _step.row = None


def is_packed_step() -> bool:
    """Whether this thread is in one."""
    return getattr(_step, "row", None) is not None


def can_pack(model: nn.Module) -> bool:
    """Whether all that a sequence leaves behind in `model` is keys and values of full or sliding-window attention."""
    config = _text_config(model)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if not set(kinds) <= {"full_attention", "sliding_attention"} or getattr(config, "is_encoder_decoder", False):
        return False
    if _base(config) not in BASES or len(list(_attentions(model))) != config.num_hidden_layers:
        return False
    return not any(has_changing_rope(module) for module in model.modules())


class MustGather(Exception):
    """The model works on what is cached before attention gets it: the step must be done again with `gathers`."""


def pack(model: nn.Module) -> None:
    """Prepare `model` for packed rows. What it is asked outside of `step_of` it computes as before."""
    whole: Any = model
    config = _text_config(model)
    base = _base(config)
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + base, partial(_attend, base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + base, partial(_make_mask, base))
    whole.set_attn_implementation(PREFIX + base)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _base(config: Any) -> str:
    """Name of the attention function that the model has, or had before it was prepared."""
    name: str = config._attn_implementation or ""
    return name.removeprefix(PREFIX)


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that call an attention function."""
    names = ("layer_idx", "scaling", "is_causal")
    return (module for module in model.modules() if all(hasattr(module, name) for name in names))


def attention_of(module: nn.Module, base: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    """What `module` would call for attention by itself."""
    if base != "eager":
        function: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[base]
    else:  # each family has its own, in the file of its attention class
        function = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return function


def _make_mask(base: str, *args: Any, **kwargs: Any) -> Any:
    """In place of the mask function of `base`."""
    if is_packed_step():
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)


def _attend(
    base: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """In place of the attention function `base`."""
    row: Row | None = getattr(_step, "row", None)
    if row is None:
        return attention_of(module, base)(module, query, key, value, attention_mask, **kwargs)
    return row.attend(base, module, query, key, value, **kwargs), None


def causal_mask(
    masks: dict[Any, torch.Tensor | None],
    base: str,
    query: torch.Tensor,
    length: int,
    total: int,
    window: int | None = None,
) -> torch.Tensor | None:
    """[1, 1, length, total]: which of `total` keys each of the last `length` tokens sees; None for the obvious ones.

    Args:
        masks: those of this step, by kind; a new one is kept there.
        base: the attention function that it is for.
    """
    if length == 1:
        return None
    is_narrow = window is not None and total > window
    if base == "sdpa" and length == total and not is_narrow:
        return None
    kind = (length, total, window if is_narrow else None)
    if kind not in masks:
        position = torch.arange(total - length, total, device=query.device)[:, None]
        behind = position - torch.arange(total, device=query.device)
        sees = behind >= 0
        if is_narrow and window is not None:
            sees &= behind < window
        if base == "eager":
            unseen = torch.finfo(query.dtype).min
            masks[kind] = torch.zeros(1, 1, length, total, dtype=query.dtype, device=query.device).masked_fill(
                ~sees, unseen
            )
        else:
            masks[kind] = sees[None, None]
    return masks[kind]
