"""Malformed requests over HTTP whose framing is sound: name -> what is sent, and the status that must come."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.unit.service.hostile.service import MODEL, POSITIONS, VOCAB_SIZE

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Exchange:
    status: int
    says: str
    body: bytes = b""
    path: str = COMPLETIONS
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": [5, 6], "max_tokens": 2, **fields}).encode()


def chat(messages: Any, **fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 2, **fields}).encode()


def spelt(fields: bytes) -> bytes:
    """A body whose last fields JSON's own writers would not write so."""
    return body()[:-1] + b", " + fields + b"}"


HELLO = [{"role": "user", "content": "hello"}]

NO_JSON = {
    "no body": b"",
    "half an object": b'{"model": "tiny"',
    "an array": b"[]",
    "a number": b"1",
    "nested 100,000 deep": b'{"model":' + b"[" * 100_000,
    "objects nested 100,000 deep": b'{"a":' * 100_000,
    "NaN": spelt(b'"temperature": NaN'),
    "Infinity": spelt(b'"temperature": Infinity'),
    "a number beyond float64": spelt(b'"temperature": 1e400'),
    "a number of 5,000 digits": spelt(b'"seed": ' + b"9" * 5000),
    "a lone surrogate": spelt(b'"user": "\\ud800"'),
    "a surrogate in UTF-8": spelt(b'"user": "\xed\xa0\x80"'),
    "bytes that are not UTF-8": spelt(b'"user": "\xff"'),
    "a NUL": spelt(b'"user": "\0"'),
    "single quotes": b"{'model': 'tiny'}",
    "a comma too many": b'{"model": "tiny",}',
    "a byte order mark": b"\xef\xbb\xbf" + body(),
    "UTF-16": body().decode().encode("utf-16"),
    "two objects": body() + body(),
    "gzip": gzip.compress(body()),
    "noise": bytes(range(256)),
}

FIELDS: dict[str, tuple[bytes, str]] = {
    "no model": (b'{"prompt": "a"}', "model"),
    "no prompt": (b'{"model": "tiny"}', "prompt"),
    "a model that is a number": (body(model=7), "model"),
    "an empty prompt": (body(prompt=""), "prompt"),
    "a prompt that is an object": (body(prompt={"a": 1}), "prompt"),
    "texts and tokens": (body(prompt=["a", 1]), "prompt"),
    "token -1": (body(prompt=[-1]), "prompt[0] is -1"),
    "token beyond": (body(prompt=[VOCAB_SIZE]), f"prompt[0] is {VOCAB_SIZE}"),
    "token 2^70": (body(prompt=[2**70]), f"prompt[0] is {2**70}"),
    "token true": (body(prompt=[True]), "prompt"),
    "token 1.5": (body(prompt=[1.5]), "prompt"),
    "too many tokens": (body(prompt=[1] * POSITIONS), "maximum context length"),
    "a million tokens": (body(prompt=[1] * 1_000_000), "maximum context length"),
    "100,000 prompts": (body(prompt=[[1]] * 100_000), "at most 128 prompts"),
    "100,000 texts": (body(prompt=["a"] * 100_000), "more than 128 answers"),
    "too long a text": (body(prompt="a" * (2**16 + 1)), "at most 65,536 are taken"),
    "max_tokens 0": (body(max_tokens=0), "max_tokens"),
    "max_tokens -1": (body(max_tokens=-1), "max_tokens"),
    "max_tokens 10^9": (body(max_tokens=10**9), "max_tokens"),
    "max_tokens 1e308": (body(max_tokens=1e308), "max_tokens"),
    "max_tokens as text": (body(max_tokens="2"), "max_tokens"),
    "temperature -1": (body(temperature=-1), "temperature is -1"),
    "temperature of 400 digits": (body(temperature=10**400), "temperature"),
    "top_p 0": (body(top_p=0), "top_p is 0"),
    "top_p 2": (body(top_p=2), "top_p is 2"),
    "top_k -2": (body(top_k=-2), "top_k is -2"),
    "min_p 2": (body(min_p=2), "min_p is 2"),
    "repetition penalty 1e-300": (body(repetition_penalty=1e-300), "expected 0.01 to 100"),
    "presence penalty 1e308": (body(presence_penalty=1e308), "presence_penalty is 1e+308"),
    "seed -2^64": (body(seed=-(2**64)), "seed"),
    "n 0": (body(n=0), "n: input"),
    "n 10^9": (body(n=10**9), "n: input"),
    "logprobs 1000": (body(logprobs=1000), "logprobs"),
    "logprobs -1": (body(logprobs=-1), "logprobs"),
    "10^5 stops": (body(stop=["a"] * 100_000), "100000 stops are given"),
    "a stop of 1 MB": (body(stop="a" * 1_000_000), "stop[0] has 1000000 characters"),
    "half a million wrong stop tokens": (body(stop_token_ids=["a"] * 500_000), "stop_token_ids[0]"),
    "a stop token beyond": (body(stop_token_ids=[VOCAB_SIZE]), f"stop_token_ids[0] is {VOCAB_SIZE}"),
    "stream as a number": (body(stream=1), "stream"),
    "tools": (body(tools=[{}]), "tools is not supported"),
    "the first of two prompts": (spelt(b'"prompt": "a", "prompt": ""'), "prompt"),
    "no messages": (chat([]), "messages"),
    "a message that is a number": (chat([1]), "messages[0]"),
    "half a million messages": (chat([1] * 500_000), "messages[0]: input should be"),
    "300,000 messages": (chat([{"role": "user", "content": ""}] * 300_000), "at most 16384 items"),
    "300,000 parts": (
        chat([{"role": "user", "content": [{"type": "text", "text": ""}] * 300_000}]),
        "messages[0].content",
    ),
    "an unknown role": (chat([{"role": "oracle", "content": "a"}]), "template refuses these messages"),
    "a role of 1 MB": (chat([{"role": "r" * 1_000_000, "content": "a"}]), "role"),
    "an image": (chat([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content"),
    "a message of no content": (chat([{"role": "user", "content": None}]), "messages[0].content"),
    "a name of 10 MB": (chat([{"role": "user", "content": "a", "name": "n" * 10_000_000}]), "at most 65,536 are taken"),
    "10,000 messages that are too many tokens": (chat(HELLO * 10_000), "maximum context length"),
    "top_logprobs alone": (chat(HELLO, top_logprobs=3), "needs logprobs"),
}

LEGAL = {
    "the last of two values": spelt(b'"temperature": 5, "temperature": 0'),
    "a field nobody knows": body(unheard_of={"a": [1, None]}),
    "the largest top_k": body(top_k=2**63 - 1, temperature=1),
    "hot and strongly penalised": body(temperature=1e300, repetition_penalty=100, presence_penalty=-100),
    "a prompt of NULs": body(prompt="\0\0"),
    "escapes": b'{"\\u006dodel": "tiny", "prompt": "\\ud83d\\ude00", "max_tokens": 1}',
    "white space of 1 MB": b" " * 1_000_000 + body(),
}

CORPUS: dict[str, Exchange] = {
    **{f"no JSON: {name}": Exchange(400, "", data) for name, data in NO_JSON.items()},
    **{f"no JSON for a chat: {name}": Exchange(400, "", data, CHAT) for name, data in NO_JSON.items()},
    **{
        f"field: {name}": Exchange(400, says, data, CHAT if b'"messages"' in data[:40] else COMPLETIONS)
        for name, (data, says) in FIELDS.items()
    },
    **{f"legal: {name}": Exchange(200, '"choices"', data) for name, data in LEGAL.items()},
    "an unknown model": Exchange(404, "does not exist", body(model="gpt-4")),
    "a model of 1 MB": Exchange(404, "does not exist", body(model="m" * 1_000_000)),
    "a model with a path": Exchange(404, "does not exist", path="/v1/models/..%2F..%2Fetc%2Fpasswd%00", method="GET"),
    "a body of 33 MB": Exchange(413, "more than 33,554,432 bytes", bytes(33 * 2**20)),
    "no content type": Exchange(415, "expected application/json", body(), headers={}),
    "text": Exchange(415, "expected application/json", body(), headers={"content-type": "text/plain"}),
    "a form": Exchange(415, "", body(), headers={"content-type": "multipart/form-data; boundary=x"}),
    "a content type of 10 KB": Exchange(415, "", body(), headers={"content-type": "a" * 10_000}),
    "no such path": Exchange(404, "is not served here", path="/v1/nothing"),
    "a path that is not UTF-8": Exchange(404, "is not served here", path="/%ff%fe", method="GET"),
    "a path of 20 KB": Exchange(404, "is not served here", path="/" + "x" * 20_000, method="GET"),
    "GET of completions": Exchange(405, "takes POST", path=COMPLETIONS, method="GET"),
    "DELETE of a model": Exchange(405, "takes GET", path=f"/v1/models/{MODEL}", method="DELETE"),
    "TRACE": Exchange(405, "takes GET", path="/health", method="TRACE"),
    "a method nobody knows": Exchange(405, "takes POST", path=COMPLETIONS, method="BREW"),
    "a method that overrides": Exchange(
        200, '"choices"', body(), headers={**JSON, "x-http-method-override": "DELETE", "x-original-url": "/health"}
    ),
}
