"""The JSON of OpenAI's answers, as far as this service gives them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, model_serializer
from pydantic.json_schema import models_json_schema

FinishReason = Literal["stop", "length"]


class Part(BaseModel):
    """Of what is sent to a client."""


class CachedTokens(Part):
    cached_tokens: int
    """Of the prompts, not computed anew."""


class Usage(Part):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Part):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Character of the answer's text at which each token begins."""


class CompletionChoice(Part):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(Part):
    """Also a piece of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time in seconds."""
    model: str
    system_fingerprint: str
    """Which version of the weights answered: ``weights-2``; ``weights-2+3`` when one was published between choices."""
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Part):
    token: str
    logprob: float
    bytes: list[int] | None
    """Null for a token that is no text by itself."""


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Part):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(Part):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Part):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatCompletion(Part):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Part):
    """What is new; what is not is absent."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _present(self) -> dict[str, str]:
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChatChunkChoice(Part):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Part):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Part):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ray_moe"
    max_model_len: int | None
    """Tokens of a prompt and its continuation together; null without a bound."""


class ModelList(Part):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Part):
    status: Literal["ready"] = "ready"


# --- Errors --------------------------------------------------------------------------------------------------
class ErrorBody(Part):
    message: str
    type: str
    param: str | None
    """The field of the request that is to blame, where there is one."""
    code: str | None


class ErrorReply(Part):
    error: ErrorBody


def chunk_schemas() -> dict[str, Any]:
    """Name -> JSON schema of the pieces of a streamed chat, which are no answer of their own to FastAPI."""
    _, schema = models_json_schema([(ChatChunk, "validation")], ref_template="#/components/schemas/{model}")
    return dict(schema["$defs"])
