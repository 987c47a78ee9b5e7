"""What is told of a generation: all of its text but the stops, when and why it ends, how likely its tokens were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ray_moe.runtime.stream import StopTexts, Stream
from ray_moe.types import GenerateRequest

END = ord(".")
PROMPT = [ord(letter) for letter in "say ab"]


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(token) for token in tokens if not (skip_special_tokens and token == END))


LETTERS = Letters()


def stream(max_new_tokens=100, tokenizer=LETTERS, **wishes):
    request = GenerateRequest(token_ids=tuple(PROMPT), max_new_tokens=max_new_tokens, **wishes)
    return Stream(request, list(PROMPT), tokenizer, frozenset({END}), 1.0, lambda items: None, None)


def tell(made, text):
    """What is told while the model says `text`, until it ends."""
    chunks = []
    for letter in text:
        chunks.append(made.take(ord(letter)))
        if chunks[-1].finish_reason:
            break
    return chunks


def text_of(chunks):
    return "".join(chunk.text for chunk in chunks)


# --- stop texts ----------------------------------------------------------------------------------------------
pieces_of_text = st.lists(st.text("abc", max_size=5), max_size=12)
stop_texts = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple)


@given(pieces_of_text, stop_texts)
@example(["a", "b", "cab"], ("abcb", "ca"))
@example(["aab", "ab", "c"], ("abab", "abc"))
def test_all_is_told_that_can_be_no_part_of_a_stop_and_nothing_else(pieces, stops):
    made, told, text = StopTexts(stops), "", ""
    for piece in pieces:
        text += piece
        new, is_stopped = made.add(piece)
        told += new
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        if found:  # the one that is complete first counts, the longest of several
            assert (told, is_stopped) == (text[: min(found)[1]], True)
            return
        begun = [text[at:] for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in stops)]
        assert (told + max(begun, key=len, default=""), is_stopped) == (text, False)
    told += made.add("", last=True)[0]
    assert told == text


@given(st.text("abc", max_size=30), st.text("abc", min_size=1, max_size=4), st.data())
def test_a_stop_is_found_however_the_text_is_cut(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    made, told, is_stopped = StopTexts((stop,)), "", False
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        new, is_stopped = made.add(text[begin:end], last=end == len(text))
        told += new
        if is_stopped:
            break
    assert (told, is_stopped) == (text.partition(stop)[0], stop in text)


def test_the_earliest_of_several_stops_counts():
    assert StopTexts(("world", "lo", "o w")).add("hello world") == ("hel", True)


# --- why it ends ---------------------------------------------------------------------------------------------
def test_it_ends_at_its_length_with_all_that_was_held_back():
    chunks = tell(stream(5, stop=("lot",)), "hello world")
    assert text_of(chunks) == "hello"
    assert [chunk.text for chunk in chunks] == ["h", "e", "", "l", "lo"]
    assert [chunk.finish_reason for chunk in chunks] == ["", "", "", "", "length"]
    assert [chunk.token_ids for chunk in chunks] == [(ord(letter),) for letter in "hello"]


def test_it_ends_before_a_stop_text_that_lies_across_tokens():
    chunks = tell(stream(stop=("o w",)), "hello world")
    assert text_of(chunks) == "hell"
    assert [chunk.finish_reason for chunk in chunks] == [""] * 6 + ["stop"]


def test_stops_in_the_prompt_are_the_callers_own():
    assert text_of(tell(stream(6, stop=("ab", "bc")), "cde ab")) == "cde "


def test_an_end_token_ends_it_with_all_that_was_held_back():
    chunks = tell(stream(stop=("lot",)), "hel.lo")
    assert text_of(chunks) == "hel"
    assert [chunk.finish_reason for chunk in chunks] == ["", "", "", "stop"]


def test_an_end_token_is_the_reason_even_at_the_last_place():
    assert tell(stream(3), "he.")[-1].finish_reason == "stop"
    assert tell(stream(3, stop=("el",)), "hel")[-1].finish_reason == "stop"


def test_end_tokens_may_be_ignored_but_not_those_of_the_caller():
    ignores = tell(stream(6, ignore_eos=True), "a.b.c.d")
    assert (text_of(ignores), ignores[-1].finish_reason) == ("abc", "length")
    stops = tell(stream(6, ignore_eos=True, stop_token_ids=(ord("b"),)), "a.b.c.d")
    assert (stops[-1].token_ids, stops[-1].finish_reason) == ((ord("b"),), "stop")
    assert len(stops) == 3


def test_without_a_tokenizer_tokens_are_all_there_is():
    chunks = tell(stream(3, tokenizer=None), "abc")
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("", ""), ("", ""), ("", "length")]


def test_what_is_told_of_the_prompt_is_how_long_it_is_and_how_much_was_known():
    made = stream(2)
    made.sequence.num_cached = 4
    assert {(chunk.num_prompt_tokens, chunk.num_cached_tokens) for chunk in tell(made, "xy")} == {(len(PROMPT), 4)}
    assert made.sequence.tokens == [*PROMPT, ord("x"), ord("y")]


# --- which token comes next ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wishes", "wants_greedy"),
    [({}, True), ({"logprobs": 0}, False), ({"temperature": 1.0}, False), ({"presence_penalty": 1.0}, False)],
)
def test_only_the_likeliest_token_is_wanted_where_nothing_else_was_asked_for(wishes, wants_greedy):
    assert stream(**wishes).wants_greedy == wants_greedy


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"repetition_penalty": 2.0},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 2.0, "top_k": 2, "seed": 0},
    ],
)
def test_tokens_are_as_likely_as_they_were_before_all_penalties_and_choices(wishes):
    made, random = stream(20, ignore_eos=True, logprobs=3, **wishes), torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(128, generator=random)
        logits[ord("b")] += 2.0
        expected = logits.log_softmax(-1)
        chunk = made.choose(logits.clone())
        (told,), (token,) = chunk.logprobs, chunk.token_ids
        assert (told.token_id, told.logprob) == (token, pytest.approx(float(expected[token])))
        assert [one.token_id for one in told.top] == expected.topk(3).indices.tolist()
        assert [one.logprob for one in told.top] == pytest.approx(expected.topk(3).values.tolist())
    assert chunk.finish_reason == "length"


def test_log_probabilities_are_for_those_who_ask():
    logits = torch.randn(128, generator=torch.Generator().manual_seed(0))
    assert stream(temperature=1.0, seed=0).choose(logits.clone()).logprobs == ()
    (told,) = stream(logprobs=0).choose(logits.clone()).logprobs
    assert (told.token_id, told.top) == (int(logits.argmax()), ())
