"""Fuzzing of what comes over HTTP: bodies of requests, and headers with keys. See `fuzzing.py`."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import Unauthenticated
from ray_moe.service.auth import KeyRing, presented_key
from ray_moe.service.keys import ApiKey, digest_of, editing
from ray_moe.service.openai.jobs import RequestLimits, check_chat, check_completion
from ray_moe.service.openai.schemas import ChatRequest, CompletionRequest, parse
from tests.unit.service.hostile.fuzzing import BACKEND, FLOATS, INT64, REFUSED, TEXTS, assert_sound, fuzz

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | INT64 | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "tools", "suffix", "x"}))
PROMPTS = st.text(max_size=20) | st.lists(st.integers(-1, 101), max_size=5) | JSON_VALUES
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "nobody"]), "content": TEXTS | JSON_VALUES}),
    max_size=3,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    body = draw(st.dictionaries(FIELDS, JSON_VALUES | FLOATS.filter(math.isfinite), max_size=6))
    if draw(st.booleans()):
        body |= {"model": "tiny", "prompt": draw(PROMPTS), "messages": draw(MESSAGES), "max_tokens": 2}
    data = bytearray(json.dumps(body, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass"))
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(data)


@fuzz
@given(bodies())
def test_the_body_of_a_completion_is_refused_or_sound(data: bytes) -> None:
    try:
        asked = parse(data, CompletionRequest)
        requests = check_completion(BACKEND, RequestLimits(), asked)
    except REFUSED as error:
        assert error.message
    else:
        for request in requests:
            assert_sound(request)


@fuzz
@given(bodies())
def test_the_body_of_a_chat_is_refused_or_sound(data: bytes) -> None:
    try:
        asked = parse(data, ChatRequest)
        said = check_chat(BACKEND, RequestLimits(max_prompt_bytes=50), asked)
    except REFUSED as error:
        assert error.message
    else:
        assert said
        assert sum(len(message["content"]) for message in said) <= 50


# --- keys ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    with editing(path) as entries:
        entries.append(ApiKey("ana", digest_of("rm_secret"), frozenset({"infer"})))
    ring = KeyRing(path)
    ring.load()
    return ring


HEADERS = (
    st.none()
    | st.text(max_size=20)
    | st.text(st.characters(max_codepoint=255), max_size=20)
    | st.builds(
        "{}{}{}".format,
        st.sampled_from(["Bearer", "bearer", "Basic", "", " "]),
        st.sampled_from([" ", "  ", "\t", ""]),
        st.sampled_from(["rm_secret", "rm_secre", "rm_secret ", "RM_SECRET", "rm_secret\0", "rm_secretrm_secret", ""]),
    )
)


@fuzz
@given(HEADERS, HEADERS)
def test_only_the_key_itself_is_let_in(ring: KeyRing, authorization: str | None, x_api_key: str | None) -> None:
    presented = presented_key(authorization, x_api_key)
    try:
        caller = ring.identify(presented)
    except Unauthenticated:
        assert presented != "rm_secret"
    else:
        assert (caller.name, presented) == ("ana", "rm_secret")
        assert "rm_secret" in {(authorization or "").strip().partition(" ")[2].strip(), (x_api_key or "").strip()}
