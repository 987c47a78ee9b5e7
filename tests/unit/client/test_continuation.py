"""Streams that break off and are continued by others, cut into other pieces."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.client.attempts import Attempts
from ray_moe.client.continuation import Continuation, Diverged
from ray_moe.client.requests import Generation
from ray_moe.types import GenerateChunk, TokenLogprob
from ray_moe.wire.v1 import inference_pb2 as pb

GREEDY = pb.GenerateRequest(prompt="x")
WORDS = ["Grü", "", "ße", " an", "", "", "🙂", " alle", "", "n"]
"""What each token adds to the text; nothing while a character is unfinished."""


def stream(held: list[int], cuts: list[int]) -> list[GenerateChunk]:
    """The whole generation in pieces that end at `cuts`, each text `held` back by so many characters."""
    text, given_up_to, chunks, begin = "".join(WORDS), 0, [], 0
    ends = list(accumulate(map(len, WORDS)))
    for number, end in enumerate(sorted({*cuts, len(WORDS)})):
        is_last = end == len(WORDS)
        told = ends[end - 1] if is_last else max(given_up_to, ends[end - 1] - held[number])
        tokens = tuple(range(begin, end))
        logprobs = tuple(TokenLogprob(token, -0.5) for token in tokens)
        reason = "length" if is_last else ""
        chunks.append(GenerateChunk(tokens, text[given_up_to:told], reason, 7, number, logprobs))
        begin, given_up_to = end, told
    return chunks


WHOLE = Generation.of(stream([0] * 20, list(range(1, 10))))
STREAMS = st.builds(
    stream, st.lists(st.integers(0, 3), min_size=20, max_size=20), st.lists(st.integers(1, 9), max_size=9)
)


@given(streams=st.lists(STREAMS, min_size=1, max_size=4), breaks=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_whatever_breaks_where_nothing_is_lost_or_doubled(
    streams: list[list[GenerateChunk]], breaks: list[int]
) -> None:
    attempts = Attempts(5, None, 0.0)
    continuation = Continuation(GREEDY, attempts)
    got: list[GenerateChunk] = []
    for number, chunks in enumerate(streams):
        continuation.restart()
        is_last = number == len(streams) - 1
        for chunk in chunks if is_last else chunks[:-1][: breaks[number]]:
            new = continuation.add(chunk)
            if new is not None:
                assert new.token_ids or new.text or new.finish_reason
                assert tuple(logprob.token_id for logprob in new.logprobs) == new.token_ids
                got.append(new)
        assert attempts.is_over == is_last
        assert attempts.num_received == sum(len(chunk.token_ids) for chunk in got)
    whole = Generation.of(got)
    assert (whole.text, whole.token_ids, whole.logprobs) == (WHOLE.text, WHOLE.token_ids, WHOLE.logprobs)
    assert whole.finish_reason == "length"


def passed_on(*chunks: GenerateChunk, message: pb.GenerateRequest = GREEDY) -> tuple[Continuation, Attempts]:
    """After a stream that broke off behind `chunks`."""
    attempts = Attempts(5, None, 0.0)
    continuation = Continuation(message, attempts)
    continuation.restart()
    for chunk in chunks:
        continuation.add(chunk)
    continuation.restart()
    return continuation, attempts


@pytest.mark.parametrize(
    "chunk",
    [
        GenerateChunk((1, 9), "ab"),
        GenerateChunk((1, 2, 5), "abc"),
        GenerateChunk((1, 2, 3), "abd"),
        GenerateChunk((1, 2), "ab", "stop"),
        GenerateChunk((1, 2, 3, 4), "ab", "stop"),
    ],
    ids=["token", "later token", "text", "ends before", "ends with less text"],
)
def test_another_generation_is_not_passed_on(chunk: GenerateChunk) -> None:
    continuation, _ = passed_on(GenerateChunk((1,), "a"), GenerateChunk((2, 3), "bc"))
    with pytest.raises(Diverged, match=r"broke off after 3 tokens, and what another router .* differs"):
        continuation.add(chunk)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.GenerateRequest(prompt="x"), True),
        (pb.GenerateRequest(prompt="x", temperature=0.7, seed=0), True),
        (pb.GenerateRequest(prompt="x", temperature=0.7), False),
    ],
    ids=["greedy", "seeded", "drawn"],
)
def test_what_is_repeated_once_it_has_begun(message: pb.GenerateRequest, expected: bool) -> None:
    _, attempts = passed_on(message=message)
    assert attempts.repeatable  # nothing has been passed on
    _, attempts = passed_on(GenerateChunk((1,), "a"), message=message)
    assert attempts.repeatable == expected


def test_what_goes_on_elsewhere_is_asked_of_the_same_version() -> None:
    message = pb.GenerateRequest(prompt="x")
    continuation = Continuation(message, Attempts(5, None, 0.0))
    continuation.restart()
    assert not message.HasField("version")
    continuation.add(GenerateChunk((7,), "a", version=3))
    continuation.restart()
    assert message.version == 3
