"""The next token of a sequence out of its logits: greedy, or drawn with a generator of the request's own.

The rules are those of `transformers` (temperature, top-k, top-p, min-p, repetition penalty) and of OpenAI's interface
(presence and frequency penalties), in the order in which each of them is usual: penalties first, then temperature, then
the choices among the likeliest. Called by `stream.py`, for one sequence at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ray_moe.types import GenerateRequest, TokenLogprob


class Sampler:
    """Of one request."""

    def __init__(self, request: GenerateRequest, repetition_penalty: float = 1.0) -> None:
        """Args: repetition_penalty: what the checkpoint asks for where the request asks for none."""
        self._request = request
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        penalty = repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
        self._penalty = RepetitionPenaltyLogitsProcessor(float(penalty)) if penalty != 1.0 else None
        self._warpers: list[LogitsProcessor] = []
        if request.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(float(request.temperature)))
            if request.top_k:
                self._warpers.append(TopKLogitsWarper(request.top_k))
            if request.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(float(request.top_p)))
            if request.min_p > 0.0:
                self._warpers.append(MinPLogitsWarper(float(request.min_p)))

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the likeliest."""
        request = self._request
        return not (self._warpers or self._penalty or request.presence_penalty or request.frequency_penalty)

    @torch.inference_mode()  # the logits were made in it, and may not be changed outside
    def sample(self, tokens: Sequence[int], logits: torch.Tensor) -> int:
        """The next token behind `tokens`; [V] float32 logits on the CPU, which are changed."""
        request, scores = self._request, logits[None]
        if self._penalty is not None:
            scores = self._penalty(torch.tensor([list(tokens)]), scores)
        if self._counts and (request.presence_penalty or request.frequency_penalty):
            seen = torch.tensor(list(self._counts))
            times = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
            scores[0, seen] -= request.presence_penalty + request.frequency_penalty * times
        for warp in self._warpers:
            scores = warp(None, scores)
        if request.temperature > 0:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax(-1))
        self._counts[token] += 1
        return token


def logprob_of(token: int, logits: torch.Tensor, num_top: int) -> TokenLogprob:
    """How likely `token` was by its [V] logits, and the `num_top` likeliest."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(num_top, len(logprobs)))
    top = map(TokenLogprob, best.indices.tolist(), best.values.tolist())
    return TokenLogprob(token, float(logprobs[token]), tuple(top))
