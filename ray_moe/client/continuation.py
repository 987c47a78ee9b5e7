"""One generation over several streams: what a broken one has brought is left out of what the next one brings.

The next stream begins anew, so its tokens must be the same: they are for greedy requests and for those with a seed, and
it is checked. Tokens and text are compared apart, because a piece of text need not be that of its tokens: an unfinished
character and the beginning of a stop text wait for what follows, and routers may cut a stream into different pieces.
"""

from __future__ import annotations

from dataclasses import replace

from ray_moe.client.attempts import Attempts
from ray_moe.errors import Unavailable
from ray_moe.types import GenerateChunk
from ray_moe.wire.v1 import inference_pb2 as pb


class Diverged(Unavailable):
    """The next stream is not the same."""


class Continuation:
    """Of one request; tells `attempts` how far it is."""

    def __init__(self, message: pb.GenerateRequest, attempts: Attempts) -> None:
        self._message = message
        self._attempts = attempts
        self._is_determined = message.temperature == 0 or message.HasField("seed")
        self._version = 0
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._text = ""
        """All the text that earlier streams brought."""
        self._num_tokens_due = self._num_tokens = 0
        """Tokens that this stream has to repeat, and tokens that it has brought."""
        self._num_characters = 0
        """That this stream has brought."""

    def restart(self) -> None:
        """A stream begins. What has been brought is of one version of the weights, so the rest must be, too."""
        if self._tokens:
            self._message.version = self._version
        self._text = "".join(self._pieces)
        self._num_tokens_due = len(self._tokens)
        self._num_tokens = self._num_characters = 0

    def add(self, chunk: GenerateChunk) -> GenerateChunk | None:
        """What of `chunk` is new; None if nothing is.

        Raises:
            Diverged: it is not what an earlier stream brought.
        """
        num_tokens = self._num_tokens + len(chunk.token_ids)
        num_characters = self._num_characters + len(chunk.text)
        tokens = self._tokens[self._num_tokens : min(num_tokens, self._num_tokens_due)]
        text = self._text[self._num_characters : num_characters]
        self._num_tokens, self._num_characters = num_tokens, num_characters
        ends_early = bool(chunk.finish_reason) and (
            num_tokens < self._num_tokens_due or num_characters < len(self._text)
        )
        if ends_early or list(chunk.token_ids[: len(tokens)]) != tokens or not chunk.text.startswith(text):
            raise Diverged(
                f"the stream broke off after {len(self._tokens)} tokens, and what another router generates for this "
                "request differs from them: ask again"
            )
        return self._pass_on(chunk, len(tokens), len(text))

    def _pass_on(self, chunk: GenerateChunk, num_tokens: int, num_characters: int) -> GenerateChunk | None:
        if num_tokens or num_characters:
            chunk = replace(
                chunk,
                token_ids=chunk.token_ids[num_tokens:],
                text=chunk.text[num_characters:],
                logprobs=chunk.logprobs[num_tokens:],
            )
        self._version = chunk.version
        self._tokens.extend(chunk.token_ids)
        self._pieces.append(chunk.text)
        self._attempts.num_received = len(self._tokens)
        self._attempts.is_over = bool(chunk.finish_reason)
        if not (chunk.token_ids or chunk.text or chunk.finish_reason):
            return None
        self._attempts.repeatable = self._is_determined
        return chunk
