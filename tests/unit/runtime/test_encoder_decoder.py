"""An engine with an encoder: what it asks experts for in a step, what it refuses, and what requests see. No hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_moe.errors import ExpertFailed, InvalidRequest
from ray_moe.models.experts import experts_modules, install
from ray_moe.models.families import adapt
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts
from ray_moe.ops.routed_experts import run_slots
from ray_moe.runtime.engine import Engine, EngineLimits
from ray_moe.runtime.kv_cache import KVPool
from ray_moe.runtime.scheduler import Sequence
from ray_moe.runtime.stepper import beginning, stepper_of
from ray_moe.types import GenerateRequest
from tests.tiny_encoder_decoder import LAYERS, build, save
from tests.tiny_models import save_tokenizer
from tests.unit.runtime.test_engine import collect, until

ENCODER, DECODER = LAYERS


class Experts:
    """A dispatcher whose experts are in this process; tells what it was asked."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        loaded = checkpoint.load_experts({path: range(5) for path in LAYERS})
        self._experts = {path: StackedExperts(module) for path, module in loaded.items()}

    def forward(self, layer: str, hidden: Any, index: Any, weight: Any, version: int = 0, meanwhile: Any = None) -> Any:
        return run_slots(self._experts[layer].run, hidden, index, weight, 5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("switch")
    model = save(folder, vocab_size=259, tie_word_embeddings=False)
    save_tokenizer(folder)
    return model, folder


def engine_of(folder: Path, **limits: Any) -> Engine:
    checkpoint = Checkpoint.open(folder, encoder_decoder=True)
    experts: Any = Experts(checkpoint)
    tokenizer = checkpoint.load_tokenizer()
    return Engine(checkpoint.load_backbone(), tokenizer, checkpoint.layers, experts, limits=EngineLimits(**limits))


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.text for chunk in chunks)


# --- one step ------------------------------------------------------------------------------------------------
class Setting:
    """A stepper whose experts are the model's own; it notes what they are asked."""

    def __init__(self) -> None:
        self.model = build()
        adapt(self.model)
        modules: dict[str, Any] = dict(experts_modules(self.model))
        self.asked: list[tuple[str, int]] = []
        self.fails_at = ""

        def answer(layer: str, hidden: Any, index: Any, weight: Any) -> Any:
            self.asked.append((layer, len(hidden)))
            if layer == self.fails_at:
                raise ExpertFailed("on purpose")
            return run_slots(StackedExperts(modules[layer]).run, hidden, index, weight, 5)

        install(self.model, answer)
        self.stepper = stepper_of(self.model)
        self.pool = KVPool(2**20, keeps_prefixes=self.stepper.keeps_prefixes)

    def sequence(self, *prompt: int) -> Sequence:
        tokens, num_source = beginning(self.model, prompt)
        made = Sequence(tokens, len(tokens) + 8, num_source=num_source)
        made.cache = self.pool.begin(tokens, made.max_tokens)
        return made

    def step(self, *sequences: Sequence) -> torch.Tensor:
        """All that is new of each, and its likeliest token behind it."""
        logits = self.stepper.compute([(one, one.num_new) for one in sequences], self.pool)
        for one, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            one.tokens.append(token)
        return logits


def test_experts_of_a_layer_are_asked_once_for_all_sequences_of_a_step() -> None:
    made = Setting()
    first, second, third = made.sequence(5, 9, 33), made.sequence(7, 8, 9, 10, 11), made.sequence(4)
    made.step(first, second)
    assert made.asked == [(ENCODER, 3 + 5), (DECODER, 1 + 1)]
    made.asked.clear()
    made.step(first, third, second)
    assert made.asked == [(ENCODER, 1), (DECODER, 1 + 1 + 1)]
    made.asked.clear()
    made.step(first, second, third)
    assert made.asked == [(DECODER, 3)]


def test_prompt_and_generated_tokens_take_the_same_room() -> None:
    made = Setting()
    one = made.sequence(5, 9, 33)
    made.step(one)
    config = made.model.config
    of_a_token = 2 * config.num_decoder_layers * config.num_heads * config.d_kv * 4
    assert made.pool.bytes_per_token == of_a_token
    assert (one.num_computed, one.room.length) == (4, 4)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_that_fails_is_simply_done_again(layer: str) -> None:
    made, other = Setting(), Setting()
    pairs = [(made.sequence(5, 9, 33), made.sequence(7, 8)), (other.sequence(5, 9, 33), other.sequence(7, 8))]
    for each, (first, _) in zip((made, other), pairs, strict=True):
        each.step(first)
    made.fails_at = layer
    with pytest.raises(ExpertFailed):
        made.step(*pairs[0])
    made.fails_at = ""
    assert torch.equal(made.step(*pairs[0]), other.step(*pairs[1]))
    assert torch.equal(made.step(*pairs[0]), other.step(*pairs[1]))


def test_logits_are_made_of_the_last_token_alone_when_all_are_computed_again() -> None:
    made, seen = Setting(), list[int]()
    made.model.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    one, other = made.sequence(5, 9, 33), made.sequence(7, 8)
    for _ in range(4):
        logits = made.step(one, other)
    again = made.sequence(5, 9, 33)  # as if it had lost its room
    again.tokens = one.tokens[:-1]
    assert again.num_new == 3 + 4
    torch.testing.assert_close(made.step(again)[0], logits[0])
    assert seen == [2] * 4 + [1]


def test_outside_of_a_step_the_model_computes_as_before() -> None:
    made, plain = Setting(), build()
    made.step(made.sequence(5, 9, 33))
    ids = torch.tensor([[5, 9, 33, 7], [1, 2, 3, 4]])
    ours, theirs = (model(input_ids=ids, decoder_input_ids=ids).logits for model in (made.model, plain))
    torch.testing.assert_close(ours, theirs)


# --- requests ------------------------------------------------------------------------------------------------
async def test_the_prompt_is_read_and_what_is_generated_is_told_in_pieces(saved: Any) -> None:
    model, folder = saved
    engine = engine_of(folder)
    tokenizer: Any = engine.texts.tokenizer
    chunks = await collect(engine, prompt="translate this", max_new_tokens=40, ignore_eos=True)
    theirs = model.generate(
        torch.tensor([tokenizer("translate this").input_ids]), max_new_tokens=40, do_sample=False, eos_token_id=[]
    )[0, 1:]
    assert [token for chunk in chunks for token in chunk.token_ids] == theirs.tolist()
    assert text_of(chunks) == tokenizer.decode(theirs, skip_special_tokens=True)
    assert {(chunk.num_prompt_tokens, chunk.num_cached_tokens) for chunk in chunks} == {(14, 0)}
    assert engine.vitals.num_prompt_tokens == 14


async def test_it_ends_at_a_stop_text_or_an_end_token(saved: Any) -> None:
    _, folder = saved
    engine = engine_of(folder)
    request = {"prompt": "translate this", "max_new_tokens": 40}
    free = await collect(engine, **request, ignore_eos=True)
    stop = text_of(free)[10:13]
    chunks = await collect(engine, **request, ignore_eos=True, stop=(stop,))
    assert text_of(chunks) == text_of(free)[: text_of(free).index(stop)]
    assert chunks[-1].finish_reason == "stop"
    tokens = [token for chunk in free for token in chunk.token_ids]
    engine._models[0].generation_config.eos_token_id = tokens[5]
    chunks = await collect(engine, **request)
    assert [token for chunk in chunks for token in chunk.token_ids] == tokens[: tokens.index(tokens[5]) + 1]


async def test_a_seed_repeats_a_text_whatever_runs_beside_it(saved: Any) -> None:
    engine = engine_of(saved[1])
    request = {"token_ids": (5, 9, 33), "max_new_tokens": 12, "temperature": 1.5, "ignore_eos": True}
    first, other, again = [await collect(engine, **request, seed=seed) for seed in (7, 8, 7)]
    assert first == again != other


async def test_leaving_a_stream_frees_its_room(saved: Any) -> None:
    engine = engine_of(saved[1])
    stream = engine.generate(GenerateRequest(token_ids=(5, 6), max_new_tokens=5000, ignore_eos=True))
    await anext(stream)
    await stream.aclose()
    await until(lambda: not engine.active_requests and not engine.kv_cache_bytes[0])
    assert engine.num_generated_tokens < 5000


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": "x" * 65}, r"65 tokens; the encoder reads a prompt at once.* at most 64 .*router\.max_step_tokens"),
    ],
)
async def test_prompts_that_do_not_fit_are_refused(saved: Any, request_: Any, message: str) -> None:
    engine = engine_of(saved[1], max_step_tokens=64)
    with pytest.raises(InvalidRequest, match=message):
        await collect(engine, **request_)
    assert len(await collect(engine, prompt="x" * 64, max_new_tokens=2, ignore_eos=True)) == 2


async def test_keys_and_values_of_the_prompt_count(saved: Any) -> None:
    engine = engine_of(saved[1], kv_cache_bytes=512 * 128)
    assert len(await collect(engine, prompt="x" * 60, max_new_tokens=67, ignore_eos=True)) == 67
    with pytest.raises(InvalidRequest, match=r"60 tokens and max_new_tokens is 68, but there is room .* of 128 "):
        await collect(engine, prompt="x" * 60, max_new_tokens=68)


@pytest.mark.parametrize("layer", LAYERS)
async def test_layers_of_both_halves_are_called_alone(saved: Any, layer: str) -> None:
    model, folder = saved
    engine = engine_of(folder)
    assert layer in engine.layers_with_gate
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((7, 32), dtype=np.float32)
    with torch.no_grad():
        theirs = model.get_submodule(layer.rpartition(".")[0])(torch.from_numpy(hidden)[None])[0]
        expert = model.get_submodule(layer)["expert_3"](torch.from_numpy(hidden))
    np.testing.assert_allclose(await engine.forward(layer, hidden, None), theirs, rtol=1e-5, atol=1e-5)
    routing = (np.full((7, 1), 3), np.full((7, 1), 0.5, np.float32))
    np.testing.assert_allclose(await engine.forward(layer, hidden, routing), 0.5 * expert, rtol=1e-5, atol=1e-5)
