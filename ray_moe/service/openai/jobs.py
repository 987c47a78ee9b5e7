"""From a request of OpenAI's to the generations that it takes, checked and split into tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_moe.errors import InvalidRequest
from ray_moe.service.backend import Backend
from ray_moe.service.openai.errors import BadRequest
from ray_moe.service.openai.schemas import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationFields, Message
from ray_moe.service.validation import check_generate
from ray_moe.types import GenerateRequest

COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""

_SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may be."""

    max_request_bytes: int = 32 * 2**20
    """Of its body."""
    max_prompt_bytes: int = 2**20
    """Of a prompt given as text, in UTF-8."""
    read_timeout_s: float = 60.0
    """In which it must have come, from its first byte."""
    max_default_tokens: int = 2**14
    """Most that a chat completion generates when it does not say how many."""


@dataclass(frozen=True, slots=True)
class Job:
    """Generations that are answered together."""

    generations: tuple[GenerateRequest, ...]
    """Number i is an answer to prompt i // `num_answers`."""
    num_answers: int
    """For each prompt."""
    echoes: tuple[str, ...] = ()
    """What the answers to each prompt begin with; empty for nothing."""
    stream: bool = False
    include_usage: bool = False

    def echo(self, index: int) -> str:
        return self.echoes[index // self.num_answers] if self.echoes else ""


def check_model(backend: Backend, name: str) -> None:
    """Raise unless the model of that name is served here."""
    if name != backend.model_name:
        raise BadRequest(
            f"the model {name[:200]!r} does not exist; this service has {backend.model_name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_completion(backend: Backend, limits: RequestLimits, asked: CompletionRequest) -> list[GenerateRequest]:
    """One generation for each prompt; raises for what can be told without the tokenizer. May take a while."""
    check_model(backend, asked.model)
    if len(asked.prompt) * (asked.n or 1) > MAX_CHOICES:
        raise BadRequest(
            f"{len(asked.prompt)} prompts with n = {asked.n or 1} make more than {MAX_CHOICES} answers: send fewer",
            param="n",
        )
    if asked.echo and asked.logprobs is not None:
        raise BadRequest("echo is not supported together with logprobs: leave one of them out", param="echo")
    if asked.echo and not isinstance(asked.prompt[0], str):
        raise BadRequest("echo needs a prompt that is a text: the text of tokens is not known", param="echo")
    max_tokens = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    requests = []
    for prompt in asked.prompt:
        if isinstance(prompt, str) and not backend.has_tokenizer:
            raise BadRequest("this model has no tokenizer: send the prompt as a list of token ids", param="prompt")
        given = {"prompt": prompt} if isinstance(prompt, str) else {"token_ids": tuple(prompt)}
        request = GenerateRequest(max_new_tokens=max_tokens, logprobs=asked.logprobs, **given, **_sampling(asked))
        if request.token_ids is None:
            _check_room(backend, 1, max_tokens, "prompt", at_least=True)
        else:
            _check_room(backend, len(request.token_ids), max_tokens, "prompt")
        check_generate(backend, request, limits.max_prompt_bytes)
        requests.append(request)
    return requests


async def completion_job(backend: Backend, asked: CompletionRequest, requests: Sequence[GenerateRequest]) -> Job:
    """The work of a checked completion request. Raises: `InvalidRequest` for prompts that are too long."""
    echoes = tuple(request.prompt or "" for request in requests) if asked.echo else ()
    tokenized = []
    for request in requests:
        if request.prompt is not None:
            tokens = await backend.tokenize(request.prompt)
            _check_room(backend, len(tokens), request.max_new_tokens, "prompt")
            request = replace(request, prompt=None, token_ids=tokens)  # noqa: PLW2901
        tokenized.append(request)
    return _job(asked, tokenized, echoes)


def check_chat(backend: Backend, limits: RequestLimits, asked: ChatRequest) -> list[Mapping[str, Any]]:
    """The messages for the chat template; raises for what can be told without it. May take a while."""
    check_model(backend, asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    messages = [_template_message(message) for message in asked.messages]
    # Of what a template may show, all but the roles, which are short.
    texts = (str(value) for message in messages for name, value in message.items() if name != "role")
    num_bytes = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    if num_bytes > limits.max_prompt_bytes:
        raise BadRequest(
            f"the messages have {num_bytes:,} bytes of UTF-8; at most {limits.max_prompt_bytes:,} are taken "
            "(server.max_prompt_bytes): shorten them",
            param="messages",
        )
    return messages


async def chat_job(
    backend: Backend, limits: RequestLimits, asked: ChatRequest, messages: Sequence[Mapping[str, Any]]
) -> Job:
    """The work of a checked chat request. Raises: `BadRequest`, `InvalidRequest`."""
    try:
        tokens = await backend.tokenize_chat(messages)
    except InvalidRequest as error:
        raise BadRequest(error.message, param="messages") from error
    max_tokens = asked.max_completion_tokens
    if max_tokens is None:
        max_tokens = asked.max_tokens
    if max_tokens is None:
        bound = backend.max_positions
        max_tokens = limits.max_default_tokens
        if bound is not None:
            max_tokens = max(1, min(max_tokens, bound - len(tokens)))
    _check_room(backend, len(tokens), max_tokens, "messages")
    request = GenerateRequest(
        token_ids=tokens,
        max_new_tokens=max_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        **_sampling(asked),
    )
    check_generate(backend, request, limits.max_prompt_bytes)
    return _job(asked, [request])


def _sampling(asked: GenerationFields) -> dict[str, Any]:
    """The fields of a `GenerateRequest` that both endpoints set alike."""
    given = {
        name: getattr(asked, name)
        for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos")
        if getattr(asked, name) is not None
    }
    return given | {
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_k": 0 if asked.top_k in (None, -1) else asked.top_k,
        "stop": tuple(asked.stop),
        "stop_token_ids": tuple(asked.stop_token_ids or ()),
    }


def _job(asked: GenerationFields, requests: Sequence[GenerateRequest], echoes: tuple[str, ...] = ()) -> Job:
    num_answers = asked.n or 1
    options = asked.stream_options
    return Job(
        generations=tuple(one for request in requests for one in _answers(request, num_answers, asked.seed)),
        num_answers=num_answers,
        echoes=echoes,
        stream=bool(asked.stream),
        include_usage=options is not None and bool(options.include_usage),
    )


def _answers(request: GenerateRequest, num_answers: int, seed: int | None) -> Iterator[GenerateRequest]:
    for number in range(num_answers):
        yield replace(request, seed=None if seed is None else (seed + number) % _SEEDS)


def _template_message(message: Message) -> Mapping[str, Any]:
    """As a chat template knows it: content is one text, parts are joined by line breaks."""
    extra = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    return {**extra, "role": "system" if message.role == "developer" else message.role, "content": content}


def _check_room(backend: Backend, num_tokens: int, max_tokens: int, param: str, *, at_least: bool = False) -> None:
    """Raise, with the code that OpenAI's clients know for it, unless the model has as many positions."""
    bound = backend.max_positions
    if not num_tokens:
        raise InvalidRequest("the prompt has no tokens; expected at least one")
    if bound is not None and num_tokens + max_tokens > bound:
        have = "messages have" if param == "messages" else "prompt has"
        number = f"{'at least ' if at_least else ''}{num_tokens:,} token{'s' if num_tokens > 1 else ''}"
        raise BadRequest(
            f"the {have} {number} and {max_tokens:,} are to be generated, together more than the model's "
            f"maximum context length of {bound:,} tokens: shorten the {param} or ask for fewer tokens",
            param=param,
            code="context_length_exceeded",
        )
