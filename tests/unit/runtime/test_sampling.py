"""The next token, by the rules written down once more in plain numpy."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.runtime.sampling import Sampler, logprob_of
from ray_moe.types import GenerateRequest

VOCABULARY = 12
PROMPT = [1, 1, 4, 7]

seeds = st.integers(0, 2**32 - 1)


def logits_of(seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32))


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def probabilities(
    logits,
    generated=(),
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
):
    """[V] how likely each token is to come behind `PROMPT` and `generated`."""
    scores = logits.numpy().astype(np.float64)
    for token in {*PROMPT, *generated}:
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    for token, times in Counter(generated).items():
        scores[token] -= presence_penalty + frequency_penalty * times
    scores = scores / temperature
    if top_k:
        scores[scores < np.sort(scores)[-min(top_k, VOCABULARY)]] = -np.inf
    order = np.argsort(-scores)
    likely = softmax(scores)[order]
    scores[order[np.cumsum(likely) - likely >= top_p]] = -np.inf
    likely = softmax(scores)
    scores[likely < min_p * likely.max()] = -np.inf
    return softmax(scores)


def draws(logits, number, **wishes):
    """So many tokens drawn behind `PROMPT`."""
    sampler = Sampler(GenerateRequest(**wishes))
    return [sampler.sample(PROMPT, logits.clone()) for _ in range(number)]


def continued(number, text=0, **wishes):
    """A whole generation: its tokens, and by what logits each of them was chosen, which are those of `text`."""
    sampler, tokens, given_ = Sampler(GenerateRequest(**wishes)), list(PROMPT), list[torch.Tensor]()
    for step in range(number):
        given_.append(logits_of([text, step]))
        tokens.append(sampler.sample(tokens, given_[-1].clone()))
    return tokens[len(PROMPT) :], given_


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.8},
        {"temperature": 2.5, "top_k": 8, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
    ],
)
def test_each_token_is_drawn_as_often_as_it_is_likely(wishes):
    number, logits = 3000, logits_of(1)
    often = np.bincount(draws(logits, number, **wishes, seed=0), minlength=VOCABULARY) / number
    expected = probabilities(logits, **wishes)
    assert ((often > 0) <= (expected > 0)).all()
    assert (np.abs(often - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / number)).all()


@given(
    seeds, st.floats(0.1, 10), st.integers(0, VOCABULARY + 2), st.floats(0.01, 1), st.floats(0, 1), st.floats(0.5, 2)
)
def test_only_the_likeliest_are_ever_drawn(seed, temperature, top_k, top_p, min_p, penalty):
    wishes = {"temperature": temperature, "top_k": top_k, "repetition_penalty": penalty}
    seen = set(draws(logits_of(seed), 40, **wishes, top_p=top_p, min_p=min_p, seed=seed))
    # What is at the very border may fall on either side of it.
    possible = probabilities(logits_of(seed), **wishes, top_p=top_p + 1e-4, min_p=min_p - 1e-4) > 0
    assert seen <= set(np.flatnonzero(possible))


@given(seeds, st.floats(-2, 2), st.floats(-2, 2), st.floats(0.5, 2))
@settings(max_examples=40)
def test_the_prompt_counts_for_repetition_and_what_was_generated_for_presence_and_frequency(
    text, presence, frequency, repetition
):
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
    tokens, logits = continued(20, text, **penalties)
    for step, token in enumerate(tokens):
        likely = probabilities(logits[step], tokens[:step], **penalties)
        assert likely[token] >= likely.max() * (1 - 1e-4)
    for temperature in (0.3, 5.0):  # they come first: the likeliest one is the same at any temperature
        assert continued(20, text, **penalties, temperature=temperature, top_k=1)[0] == tokens


def test_one_of_the_likeliest_one_is_greedy():
    for seed in range(20):
        logits = logits_of(seed)
        likeliest = [int(logits.argmax())] * 5
        assert draws(logits, 5) == likeliest
        assert draws(logits, 5, temperature=3.0, top_k=1) == likeliest
        assert draws(logits, 5, temperature=3.0, top_p=1e-6) == likeliest
        assert draws(logits, 5, temperature=3.0, min_p=1.0) == likeliest


def test_a_seed_repeats_what_was_drawn_and_nothing_else_does():
    tokens = [
        tuple(continued(40, temperature=3.0, frequency_penalty=0.5, seed=seed)[0]) for seed in (7, 7, 8, None, None)
    ]
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 4


@pytest.mark.parametrize(
    ("own", "checkpoints", "expected"), [(None, 1.0, 1), (None, 2.0, 11), (1.0, 2.0, 1), (1.2, 2.0, 1), (2.0, 1.0, 11)]
)
def test_the_checkpoints_repetition_penalty_is_for_those_who_ask_for_none(own, checkpoints, expected):
    logits = torch.linspace(1.0, 2.0, VOCABULARY)
    logits[1] = 3.0  # occurs in the prompt
    assert Sampler(GenerateRequest(repetition_penalty=own), checkpoints).sample(PROMPT, logits) == expected


def test_whole_numbers_are_numbers():
    whole = {"temperature": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 2, "presence_penalty": 1}
    with_fraction = {name: float(value) for name, value in whole.items()}
    assert continued(20, seed=0, **whole)[0] == continued(20, seed=0, **with_fraction)[0]


@pytest.mark.parametrize(
    ("wishes", "is_plain"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 1}, True),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": -0.1}, False),
        ({"frequency_penalty": 0.1}, False),
    ],
)
def test_without_temperature_and_penalties_it_is_simply_the_likeliest(wishes, is_plain):
    assert Sampler(GenerateRequest(**wishes)).is_plain == is_plain


@given(seeds, st.integers(0, VOCABULARY - 1), st.integers(0, VOCABULARY + 3))
def test_log_probabilities_are_those_of_the_logits_best_first(seed, token, num_top):
    logits = logits_of(seed)
    expected = np.log(softmax(logits.numpy().astype(np.float64)))
    told = logprob_of(token, logits, num_top)
    assert told.token_id == token
    assert told.logprob == pytest.approx(expected[token], abs=1e-5)
    assert [one.token_id for one in told.top] == np.argsort(-expected)[:num_top].tolist()
    assert [one.logprob for one in told.top] == pytest.approx(np.sort(expected)[::-1][:num_top].tolist(), abs=1e-5)
