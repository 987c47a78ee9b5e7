"""From pieces of generations to OpenAI's answers, whole or in pieces.

One object per request. It is given every piece, in order; it counts the usage, and either keeps what is needed for the
whole answer or makes the pieces of a streamed one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ray_moe.service.openai.jobs import Job
from ray_moe.service.openai.schemas_answers import (
    CachedTokens,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Part,
    TopLogprob,
    Usage,
)
from ray_moe.types import GenerateChunk, TokenLogprob

MIN_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI's clients know this number for it."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"

TokenText = Callable[[int], str]


class _Choice:
    """One generation so far."""

    def __init__(self, text: str) -> None:
        self.begun = False
        self.num_prompt = 0
        self.num_cached = 0
        self.num_generated = 0
        self.num_characters = len(text)
        self.texts = [text]
        self.finish_reason: FinishReason | None = None


class Answer(ABC):
    """What both endpoints have in common."""

    prefix: str

    def __init__(self, job: Job, name: str, model: str, token_text: TokenText) -> None:
        """`name` makes the id of the answer."""
        self.id = f"{self.prefix}-{name}"
        self.created = int(time.time())
        self.model = model
        self._job = job
        self._token_text = token_text
        self._choices = [_Choice(job.echo(index)) for index in range(len(job.generations))]
        self._versions: set[int] = set()
        """Of the weights that answered so far."""

    @abstractmethod
    def whole(self) -> Part:
        """The answer, once every piece was added."""

    @abstractmethod
    def pieces(self, index: int, chunk: GenerateChunk) -> Iterator[Part]:
        """Count one piece of generation `index`, and the pieces of the streamed answer that it makes."""

    @abstractmethod
    def last_piece(self) -> Part:
        """The piece with the usage and no choices."""

    @abstractmethod
    def add(self, index: int, chunk: GenerateChunk) -> None:
        """Count and keep one piece of generation `index`."""

    def usage(self) -> Usage:
        """Each prompt counts once, however many answers it has, and as cached where none of them computed it."""
        width = self._job.num_answers
        prompts = [self._choices[start : start + width] for start in range(0, len(self._choices), width)]
        num_prompt = sum(max(choice.num_prompt for choice in prompt) for prompt in prompts)
        num_generated = sum(choice.num_generated for choice in self._choices)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_generated,
            total_tokens=num_prompt + num_generated,
            prompt_tokens_details=CachedTokens(
                cached_tokens=sum(min(choice.num_cached for choice in prompt) for prompt in prompts)
            ),
        )

    def _about(self) -> dict[str, Any]:
        """What whole answers and pieces have in common."""
        versions = "+".join(map(str, sorted(self._versions)))
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"weights-{versions}",
        }

    def _count(self, index: int, chunk: GenerateChunk) -> _Choice:
        choice = self._choices[index]
        self._versions.add(chunk.version)
        choice.num_prompt = max(choice.num_prompt, chunk.num_prompt_tokens)
        choice.num_cached = max(choice.num_cached, chunk.num_cached_tokens)
        choice.num_generated += len(chunk.token_ids)
        choice.finish_reason = _finish_reason(chunk)
        return choice

    def _top(self, one: TokenLogprob) -> TopLogprob:
        text = self._token_text(one.token_id)
        return TopLogprob(token=text, logprob=_finite(one.logprob), bytes=_bytes(text))


class CompletionAnswer(Answer):
    prefix = "cmpl"

    def __init__(self, job: Job, name: str, model: str, token_text: TokenText) -> None:
        super().__init__(job, name, model, token_text)
        self._logprobs: list[list[CompletionLogprobs]] = [[] for _ in job.generations]

    def add(self, index: int, chunk: GenerateChunk) -> None:
        choice = self._count(index, chunk)
        logprobs = self._told(choice, chunk)
        choice.texts.append(chunk.text)
        if logprobs is not None:
            self._logprobs[index].append(logprobs)

    def whole(self) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text="".join(choice.texts),
                logprobs=_joined(self._logprobs[index]) if self._wanted(index) else None,
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        return self._completion(choices, self.usage())

    def pieces(self, index: int, chunk: GenerateChunk) -> Iterator[Completion]:
        choice = self._count(index, chunk)
        if not choice.begun:
            choice.begun = True
            if self._job.echo(index):
                yield self._completion([CompletionChoice(index=index, text=self._job.echo(index), finish_reason=None)])
        logprobs = self._told(choice, chunk)
        if chunk.text or logprobs is not None or choice.finish_reason is not None:
            piece = CompletionChoice(
                index=index, text=chunk.text, logprobs=logprobs, finish_reason=choice.finish_reason
            )
            yield self._completion([piece])

    def last_piece(self) -> Completion:
        return self._completion([], self.usage())

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(**self._about(), choices=choices, usage=usage)

    def _wanted(self, index: int) -> bool:
        return self._job.generations[index].logprobs is not None

    def _told(self, choice: _Choice, chunk: GenerateChunk) -> CompletionLogprobs | None:
        """The log-probabilities of one piece, whose text begins where the text so far ends."""
        offset, end = choice.num_characters, choice.num_characters + len(chunk.text)
        choice.num_characters = end
        if not chunk.logprobs:
            return None
        told = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for one in chunk.logprobs:
            text = self._token_text(one.token_id)
            likeliest: dict[str, float] = {}
            for other in (*one.top, one):
                likeliest.setdefault(self._token_text(other.token_id), _finite(other.logprob))
            told.tokens.append(text)
            told.token_logprobs.append(_finite(one.logprob))
            told.top_logprobs.append(likeliest)
            told.text_offset.append(offset)
            offset = min(end, offset + len(text))
        return told


class ChatAnswer(Answer):
    prefix = "chatcmpl"

    def __init__(self, job: Job, name: str, model: str, token_text: TokenText) -> None:
        super().__init__(job, name, model, token_text)
        self._logprobs: list[list[ChatTokenLogprob]] = [[] for _ in job.generations]

    def add(self, index: int, chunk: GenerateChunk) -> None:
        self._count(index, chunk).texts.append(chunk.text)
        self._logprobs[index] += map(self._told, chunk.logprobs)

    def whole(self) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content="".join(choice.texts)),
                logprobs=ChatLogprobs(content=self._logprobs[index]) if self._wanted(index) else None,
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        return ChatCompletion(**self._about(), choices=choices, usage=self.usage())

    def pieces(self, index: int, chunk: GenerateChunk) -> Iterator[ChatChunk]:
        choice = self._count(index, chunk)
        if not choice.begun:
            choice.begun = True
            yield self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))])
        if chunk.text or chunk.logprobs:
            logprobs = ChatLogprobs(content=[self._told(one) for one in chunk.logprobs]) if chunk.logprobs else None
            yield self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(content=chunk.text), logprobs=logprobs)])
        if choice.finish_reason is not None:
            yield self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=choice.finish_reason)])

    def last_piece(self) -> ChatChunk:
        return self._chunk([], self.usage())

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self._about(), choices=choices, usage=usage)

    def _wanted(self, index: int) -> bool:
        return self._job.generations[index].logprobs is not None

    def _told(self, one: TokenLogprob) -> ChatTokenLogprob:
        top = self._top(one)
        return ChatTokenLogprob(
            token=top.token, logprob=top.logprob, bytes=top.bytes, top_logprobs=[self._top(other) for other in one.top]
        )


def _finish_reason(chunk: GenerateChunk) -> FinishReason | None:
    known: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}
    return known.get(chunk.finish_reason)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def _bytes(text: str) -> list[int] | None:
    """Those of a token's text; None where it is part of a character and so has no text of its own."""
    return None if UNFINISHED in text else list(text.encode(errors="surrogatepass"))


def _joined(parts: list[CompletionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[logprob for part in parts for logprob in part.token_logprobs],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
