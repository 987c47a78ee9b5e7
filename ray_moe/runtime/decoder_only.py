"""Steps of a model that is a decoder alone: prompts and what is generated behind them are one kind of tokens.

Models that can be packed compute all sequences in one row (`packing.py`), or in two at once: while the experts of one
are waited for, the backbone computes the other. Others compute one sequence after the other, each with what
`transformers` keeps for it. A step that fails leaves every sequence as it was, or to be computed anew. One of the
steppers of `stepper.py`.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ray_moe.models.rope import ChangingRope, has_changing_rope
from ray_moe.runtime.kv_cache import KVPool
from ray_moe.runtime.packing import MustGather, PackedCache, Segment, can_pack, pack, step_of
from ray_moe.runtime.scheduler import Sequence, Work
from ray_moe.runtime.turns import Turn, taking


@dataclass(slots=True)
class _Alone:
    """What a sequence that cannot be packed has."""

    cache: Any = None
    """None before the first step: each family makes its own kind."""
    rope: dict[str, nn.Module] = field(default_factory=dict)


class DecoderStepper:
    """See the module."""

    def __init__(self, model: nn.Module, overlap_min_tokens: int | None = None) -> None:
        """Args: overlap_min_tokens: steps of at least so many tokens are two rows at once; None: none are."""
        self._model: Any = model
        self._overlap_min_tokens = overlap_min_tokens
        self._other_row = ThreadPoolExecutor(1, thread_name_prefix="generation-other")
        self._device = next(model.parameters()).device
        self._rope = ChangingRope(model) if any(map(has_changing_rope, model.modules())) else None
        self.packs = can_pack(model)
        self._gathers = False
        """Found out by the first step."""
        if self.packs:
            pack(model)

    @property
    def in_chunks(self) -> bool:
        return self.packs

    @property
    def keeps_prefixes(self) -> bool:
        return self.packs

    def compute(self, work: Work, pool: KVPool) -> torch.Tensor:
        """[number of sequences, V] logits, behind what was computed of each."""
        with torch.inference_mode():
            try:
                logits = self._packed(work) if self.packs else self._one_by_one(work)
            except MustGather:
                self._gathers = True
                logits = self._packed(work)
            self._measure(work[0][0], pool)
            return logits

    def _packed(self, work: Work) -> torch.Tensor:
        at = cut(work, self._overlap_min_tokens)
        if at:
            turn = Turn()
            other = self._other_row.submit(copy_context().run, self._in_other_thread, work[at:], turn)
            try:
                with taking(turn):
                    logits = self._one_row(work[:at])
            finally:
                failure = other.exception()  # whatever becomes of this one, nothing of the step goes on behind it
            if failure is not None:
                raise failure
            logits = torch.cat((logits, other.result()))
        else:
            logits = self._one_row(work)
        for sequence, number in work:
            sequence.num_computed += number
            sequence.room.length = sequence.num_computed
        return logits

    def _in_other_thread(self, work: Work, turn: Turn) -> torch.Tensor:
        with torch.inference_mode(), taking(turn):
            return self._one_row(work)

    def _one_row(self, work: Work) -> torch.Tensor:
        """Logits of what is new of some sequences, which are not told of it yet."""
        tokens, positions, segments, last = list[int](), list[int](), list[Segment](), list[int]()
        for sequence, number in work:
            begin = sequence.num_computed
            segments.append(Segment(sequence.room, len(tokens), number))
            tokens += sequence.tokens[begin : begin + number]
            positions += range(begin, begin + number)
            last.append(len(tokens) - 1)
        cache = PackedCache(segments, self._gathers)
        with step_of(cache):
            out = self._model(
                input_ids=self._row(tokens),
                position_ids=self._row(positions),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(last, device=self._device),
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _one_by_one(self, work: Work) -> torch.Tensor:
        try:
            return torch.cat([self._alone(sequence) for sequence, _ in work])
        except BaseException:
            for sequence, _ in work:  # some may have got further, but what they are told of it is lost
                sequence.state, sequence.num_computed = None, 0
            raise

    def _alone(self, sequence: Sequence) -> torch.Tensor:
        """All that is new of one sequence."""
        if sequence.state is None or self._must_begin_again(sequence):
            sequence.num_computed = 0
            sequence.state = _Alone()
        state, begin = sequence.state, sequence.num_computed
        rope = contextlib.nullcontext() if self._rope is None else self._rope.of(state.rope)
        with rope:
            out = self._model(
                input_ids=self._row(sequence.tokens[begin:]),
                position_ids=self._row(range(begin, len(sequence.tokens))),
                past_key_values=state.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        state.cache = out.past_key_values
        sequence.num_computed = len(sequence.tokens)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _must_begin_again(self, sequence: Sequence) -> bool:
        """Whether a sequence has just become so long that its positions change their meaning (longrope)."""
        limit = getattr(self._model.config, "original_max_position_embeddings", None)
        return self._rope is not None and limit is not None and sequence.num_computed <= limit < len(sequence.tokens)

    def _row(self, numbers: Any) -> torch.Tensor:
        return torch.tensor([list(numbers)], device=self._device)

    def _measure(self, sequence: Sequence, pool: KVPool) -> None:
        """Learn from the first sequence what a token takes."""
        if pool.bytes_per_token:
            return
        if self.packs:
            pool.bytes_per_token = sequence.room.bytes_per_token()
        elif sequence.state is not None:
            pool.bytes_per_token = max(1, _num_bytes(sequence.state.cache) // max(1, sequence.num_computed))


def cut(work: Work, min_tokens: int | None) -> int:
    """How many of the sequences are the first of two rows, of about as many tokens each; 0: there is one row.

    Args: min_tokens: of a step that is to be two rows; None: none is.
    """
    numbers = [number for _, number in work]
    total = sum(numbers)
    if min_tokens is None or total < min_tokens or len(work) < 2:
        return 0
    return 1 + min(enumerate(accumulate(numbers[:-1])), key=lambda one: abs(2 * one[1] - total))[0]


def _num_bytes(cache: Any) -> int:
    """Of all tensors that the layers of a `transformers` cache hold."""
    return sum(
        value.numel() * value.element_size()
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    )
