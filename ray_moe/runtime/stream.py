"""What becomes of one request: its next tokens, their text, and when it ends. Called by `generation.py`, in one thread.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch

from ray_moe.runtime.detokenizer import Detokenizer
from ray_moe.runtime.sampling import Sampler, logprob_of
from ray_moe.runtime.scheduler import Sequence
from ray_moe.runtime.tracing import Phases
from ray_moe.types import GenerateChunk, GenerateRequest, TokenLogprob

Item = GenerateChunk | BaseException


class Stream:
    """Of one request."""

    def __init__(  # noqa: PLR0913  (all that is known of a request)
        self,
        request: GenerateRequest,
        tokens: list[int],
        tokenizer: Any | None,
        end_tokens: frozenset[int],
        repetition_penalty: float,
        tell: Callable[[Item], None],
        deadline_s: float | None,
        arrived_s: float | None = None,
        version: int = 0,
        num_source: int = 0,
    ) -> None:
        """Args:
        tokens: that it begins with (`stepper.beginning`).
        end_tokens: the checkpoint's own.
        tell: takes what there is to say to whoever waits, from any thread.
        deadline_s: monotonic.
        arrived_s: when the request came, monotonic; None: now.
        version: of the weights that compute it.
        num_source: how many of the first `tokens` an encoder reads.
        """
        max_tokens = len(tokens) + request.max_new_tokens
        self.sequence = Sequence(tokens, max_tokens, request.caller, version, num_source=num_source)
        self.sampler = Sampler(request, repetition_penalty)
        self.tell = tell
        self.deadline_s = deadline_s
        self.arrived_s = time.monotonic() if arrived_s is None else arrived_s
        self.last_token_s: float | None = None
        self.has_begun = False
        """Whether any of it has been computed."""
        self.is_left = False
        """Whether nobody listens any more."""
        self.context = copy_context()
        """Of the task that made it: whose request it is, in the log."""
        self.phases = Phases.of_current()
        """None when that is not traced."""
        self._request = request
        self._end_tokens = end_tokens if not request.ignore_eos else frozenset()
        self._text = Detokenizer(tokenizer)
        self._stops = StopTexts(request.stop)

    @property
    def wants_greedy(self) -> bool:
        """Whether its next token is the likeliest, and nothing else is to be told of it."""
        return self.sampler.is_plain and self._request.logprobs is None

    def choose(self, logits: torch.Tensor) -> GenerateChunk:
        """The next piece, by [V] float32 logits on the CPU."""
        told = logits.clone() if self._request.logprobs is not None and not self.sampler.is_plain else logits
        token = self.sampler.sample(self.sequence.target, logits)
        return self.take(token, told)

    def take(self, token: int, logits: torch.Tensor | None = None) -> GenerateChunk:
        """The next piece, `token` being the next token."""
        request, sequence = self._request, self.sequence
        sequence.tokens.append(token)
        is_end = token in self._end_tokens or token in request.stop_token_ids
        is_last = is_end or len(sequence.tokens) >= sequence.max_tokens
        text, is_stopped = self._stops.add(self._text.add((token,), last=is_last), last=is_last)
        reason = "stop" if is_end or is_stopped else "length" if is_last else ""
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None and logits is not None:
            logprobs = (logprob_of(token, logits, request.logprobs),)
        return GenerateChunk(
            (token,), text, reason, sequence.num_prompt, sequence.num_cached, logprobs, sequence.version
        )


class StopTexts:
    """Ends a growing text before the first of some texts, and never tells a beginning of one too early."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str, last: bool = False) -> tuple[str, bool]:
        """What of `text` and what was held back can be told now, and whether a stop was found; `last`: all of it."""
        if not self._stops:
            return text, False
        self._held += text
        # The one that is complete first, whatever pieces the text comes in; of several the longest.
        found = min(((at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            return self._held[: found[1]], True
        kept = 0 if last else max(map(self._begun, self._stops))
        told, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return told, False

    def _begun(self, stop: str) -> int:
        """How many characters at the end of what is held may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((number for number in range(longest, 0, -1) if self._held.endswith(stop[:number])), 0)
