"""The JSON of OpenAI's requests, as far as this service takes them.

Types are strict (``"1"`` is no number). What is the same at every door is checked by `service/validation.py`: those
ranges stand here only for readers of the schema. Fields that would change the answer in a way that is not supported are
refused unless they have the value that changes nothing; all others that are not known are ignored, since clients send
many.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue, models_json_schema
from pydantic_core import PydanticCustomError, from_json

from ray_moe.service.openai.errors import BadRequest
from ray_moe.service.validation import (
    MAX_LOGPROBS,
    MAX_NEW_TOKENS,
    MAX_PENALTY,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
)

MAX_CHOICES = 128
"""Generations that one request may ask for: prompts times `n`."""

MAX_MESSAGES = 2**14
"""Of a conversation, and parts of a message: what is made of each takes many times its bytes."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Field of OpenAI's that is not supported -> its values, beside null, that ask for nothing."""

_UNSUPPORTED_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""The same for fields that other servers know."""

_NEUTRAL = _UNSUPPORTED | _UNSUPPORTED_ELSEWHERE


# --- Requests ------------------------------------------------------------------------------------------------
def _integer(value: Any) -> Any:
    """JSON has one kind of numbers: 1.0 is the integer 1."""
    return int(value) if type(value) is float and value.is_integer() else value


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, each a text or tokens, as a list of prompts."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value:
        if _are(str, value) and all(value):
            return value
        lists = value if _are(list, value) else [value]
        if len(lists) > MAX_CHOICES:
            raise PydanticCustomError("prompts", f"expected at most {MAX_CHOICES} prompts")
        prompts = [_tokens(tokens) for tokens in lists]
        if all(prompts):
            return prompts
    raise PydanticCustomError(
        "prompt", "expected a text, a list of texts, a list of token ids or a list of such lists, none of them empty"
    )


def _tokens(value: list[Any]) -> list[int]:
    """Empty for what is not a list of integers."""
    if not _are(int, value):
        value = [_integer(token) for token in value]
    return value if _are(int, value) else []


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not _are(str, stops):
        raise PydanticCustomError("stop", "expected a text or a list of texts")
    return stops


def _are(kind: type, values: list[Any]) -> bool:
    return all(type(value) is kind for value in values)  # exactly: a bool is no int


_TEXT = {"type": "string", "minLength": 1}
_TOKEN = {"minimum": 0, "maximum": 2**31 - 1}  # the vocabulary is smaller, but the schema does not know the model
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", **_TOKEN}}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}

Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": _TEXT},
                _TOKENS,
                {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": _TOKENS},
            ]
        }
    ),
]
Stops = Annotated[
    list[str],
    PlainValidator(_stops),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP}, {"type": "null"}]}),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = BeforeValidator(_integer)
"""After constraints, which would be missing in the schema otherwise."""
Integer = Annotated[int, Whole]
NumTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), Whole]


def _field(description: str, **schema: Any) -> Any:
    """An optional field; `schema` tells readers what `service/validation.py` will check."""
    return Field(default=None, description=description, json_schema_extra=schema or None)


def _add_unsupported(schema: JsonSchemaValue) -> None:
    for name, neutral in _UNSUPPORTED.items():
        schema["properties"][name] = {"enum": [None, *neutral], "description": "Not supported."}


def _add_rules_of_completions(schema: JsonSchemaValue) -> None:
    """`echo` only with texts, and not with `logprobs`."""
    _add_unsupported(schema)
    texts = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
    schema["anyOf"] = [
        {"properties": {"echo": {"enum": [None, False]}}},
        {"properties": {"logprobs": {"type": "null"}, "prompt": texts}},
    ]


def _add_rules_of_chat(schema: JsonSchemaValue) -> None:
    """`top_logprobs` only with `logprobs`."""
    _add_unsupported(schema)
    schema["anyOf"] = [
        {"properties": {"top_logprobs": {"type": "null"}}},
        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    ]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = _field("Send one more piece at the end, with the usage and no choices.")


class GenerationFields(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str = Field(description="Name of the model, as `GET /v1/models` tells.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = _field("Answers for each prompt; 1 if absent.")
    temperature: Number | None = _field(
        "0 is greedy; 1 if absent.",
        anyOf=[{"type": "null"}, {"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE}],
    )
    top_p: Number | None = _field("Nucleus sampling; 1 keeps every token.", exclusiveMinimum=0, maximum=1)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Whole] | None = _field(
        "Makes sampling repeatable; answer number i of a prompt gets seed + i."
    )
    stop: Stops = Field(default_factory=list, description="Texts before which the answer ends.")
    presence_penalty: Number | None = _field(
        "Off the logits of generated tokens.", minimum=-MAX_PENALTY, maximum=MAX_PENALTY
    )
    frequency_penalty: Number | None = _field(
        "The same, once for each time.", minimum=-MAX_PENALTY, maximum=MAX_PENALTY
    )
    stream: bool | None = _field("Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = _field("Of no effect without `stream`.")
    top_k: Integer | None = _field("Sampling among so many tokens; 0 and -1 are all. An extension.", minimum=-1)
    min_p: Number | None = _field(
        "Least share of the likeliest token's probability. An extension.", minimum=0, maximum=1
    )
    repetition_penalty: Number | None = _field(
        "Divides logits of past tokens. An extension.", minimum=MIN_REPETITION_PENALTY, maximum=MAX_PENALTY
    )
    stop_token_ids: Annotated[list[Integer], Field(fail_fast=True)] | None = _field(
        "Tokens with which the answer ends. An extension.", items=_TOKEN, maxItems=MAX_STOP_TOKENS
    )
    ignore_eos: bool | None = _field("Go on to `max_tokens` whatever is generated. An extension.")


class CompletionRequest(GenerationFields):
    """A prompt to continue, or several."""

    model_config = ConfigDict(json_schema_extra=_add_rules_of_completions)

    FIELDS: ClassVar[dict[str, str]] = {"token_ids": "prompt", "max_new_tokens": "max_tokens"}
    """Our names of fields -> the names here."""

    prompt: Prompts = Field(description="A text, tokens, or a list of either.")
    max_tokens: NumTokens | None = _field("Tokens to generate for each; 16 if absent.")
    logprobs: Annotated[int, Field(ge=0, le=5), Whole] | None = _field(
        "How many of the likeliest tokens to tell beside each token's own."
    )
    echo: bool | None = _field("Begin with the prompt, which must be a text. Not together with `logprobs`.")


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class Message(BaseModel):
    """One message of a conversation. Other fields than these go to the checkpoint's chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        description="What the chat template knows: usually system, user and assistant; developer counts as system."
    )
    content: str | Parts
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = _field("Not supported.")
    function_call: None = _field("Not supported.")
    audio: None = _field("Not supported.")


class ChatRequest(GenerationFields):
    """A conversation to continue."""

    model_config = ConfigDict(json_schema_extra=_add_rules_of_chat)

    FIELDS: ClassVar[dict[str, str]] = {"max_new_tokens": "max_tokens"}
    """Our names of fields -> the names here."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: NumTokens | None = _field("Tokens to generate; what fits the model if absent.")
    max_tokens: NumTokens | None = _field("The older name of `max_completion_tokens`, which counts if both are given.")
    logprobs: bool | None = _field("Tell how likely each token was.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole] | None = _field(
        "The likeliest tokens to tell beside it. Needs `logprobs`."
    )


Request = TypeVar("Request", bound=GenerationFields)


def parse(data: bytes, kind: type[Request]) -> Request:
    """The body of a request. Raises: `BadRequest`."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}; send one JSON object") from None
    if not isinstance(value, dict):
        raise BadRequest(
            f"the body is a JSON {type(value).__name__}; expected an object with the fields of the request"
        )
    for name in _NEUTRAL.keys() & value.keys():
        if not _asks_nothing(value[name], _NEUTRAL[name]):
            raise BadRequest(f"{name} is not supported by this service: leave it out", param=name)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        deepest = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        param = _path(deepest["loc"])
        raise BadRequest(f"{param}: {deepest['msg'][:1].lower()}{deepest['msg'][1:]}", param=param) from None


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[0].content[1].type``; what pydantic calls the members of a union is left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "str" and "[" not in part:
            path += f".{part}"
    return path[1:]


def request_schemas() -> dict[str, Any]:
    """Name -> JSON schema of the requests and what they consist of, for the OpenAPI document."""
    _, schema = models_json_schema(
        [(CompletionRequest, "validation"), (ChatRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    return dict(schema["$defs"])
