"""A dense and an MoE model of a chosen ratio of active weights, trained and asked side by side.

All are byte-level models, made here. They train on Python's own library and are asked to go on with it. They take
turns, in rotating order, so that whatever else the machine does falls on all of them, and every ratio is taken turn by
turn. A third model, dense, with the layers, the width and the active weights of the MoE model, tells what choosing
costs from what the size alone does. Called by `cli/compare.py` and `benchmarks/compare_dense.py`.

The published pattern: with 54 % of the active weights (7 of 13 billion) and 4.3 times the weights, training 1.75 times
as fast and answers in 0.51 of the time. Dense models of these sizes have 32 layers of width 4096 and 40 of 5120
(LLaMA, arXiv:2302.13971), so here too the MoE model has 0.8 of the dense one's layers and width.

Shape legend: D model width, F width of a network, E experts, B windows of a batch, S tokens of a window.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ray_moe.errors import InvalidConfig
from ray_moe.models.byte_level import END, MAX_TOKENS
from ray_moe.models.demo import corpus
from ray_moe.models.experts import compute_touched

_ROUND = 16
"""Widths of experts are multiples of it: rows of 16 bytes in every dtype."""

Clock = Callable[[], float]

_ENOUGH_STEPS = 100
"""Losses of fewer steps say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """The models, and what they do."""

    active: float = 0.54
    """Weights that a token meets in the MoE model, as a multiple of the dense model's."""
    total: float = 4.3
    """All weights, likewise."""
    shape: float = 0.8
    """Layers and width of the MoE model, likewise."""
    top_k: int = 2
    hidden_size: int = 640
    """D of the dense model."""
    num_layers: int = 5
    """Of the dense model."""
    dense_width: int = 2560
    """F of the dense model."""
    batch: int = 32
    """B."""
    window: int = 256
    """S."""
    steps: int = 3
    """Training steps of each model; one more goes first and is not timed. None for no training."""
    answers: int = 5
    """Answers of each model; one more goes first and is not timed. None for no answers."""
    prompt: int = 128
    """Tokens of a prompt."""
    new_tokens: int = 16
    """Tokens of an answer, after the first one."""
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a ratio, turn by turn."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"


@dataclass(slots=True)
class Measured:
    """One of the models, and what it took in each turn."""

    name: str
    total: int
    active: int
    """Weights that a token meets; of the embeddings it is a row."""
    gradient_s: list[float] = field(default_factory=list)
    """Forward and backward of a training step."""
    update_s: list[float] = field(default_factory=list)
    """Its update of the weights."""
    losses: list[float] = field(default_factory=list)
    """Nats per byte on the step's batch, which is new to the model."""
    prompt_s: list[float] = field(default_factory=list)
    """From a prompt to the first token."""
    token_s: list[float] = field(default_factory=list)
    """Each further token: the median of an answer."""

    @property
    def step_s(self) -> list[float]:
        return [gradient_s + update_s for gradient_s, update_s in zip(self.gradient_s, self.update_s, strict=True)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ratios are None for what was not done."""

    dense: Measured
    small: Measured
    """Dense, with the MoE model's layers, width and active weights."""
    moe: Measured

    @property
    def models(self) -> tuple[Measured, ...]:
        return self.dense, self.small, self.moe

    def speedup(self, model: Measured, *, with_update: bool = True) -> Spread | None:
        """How many times as fast as the dense model one trains, on the same tokens."""
        if with_update:
            return spread(self.dense.step_s, model.step_s)
        return spread(self.dense.gradient_s, model.gradient_s)

    def first_token(self, model: Measured) -> Spread | None:
        """A model's time to the first token, as a multiple of the dense model's."""
        return spread(model.prompt_s, self.dense.prompt_s)

    def latency(self, model: Measured) -> Spread | None:
        """A model's time to a further token, likewise."""
        return spread(model.token_s, self.dense.token_s)

    def losses_after_the_same_time(self) -> tuple[float, ...] | None:
        """Of each model, when the one that is first through its steps is done: the mean of the tenth before.

        None after fewer than 100 steps.
        """
        num_steps = len(self.dense.losses)
        if num_steps < _ENOUGH_STEPS:
            return None
        steps_s = [statistics.median(each.step_s) for each in self.models]
        done = [min(int(num_steps * min(steps_s) / step_s), num_steps) for step_s in steps_s]
        last = num_steps // 10
        return tuple(
            statistics.mean(each.losses[max(end - last, 0) : max(end, 1)])
            for each, end in zip(self.models, done, strict=True)
        )


def spread(of: Sequence[float], to: Sequence[float]) -> Spread | None:
    """Of ``of / to``."""
    each = [a / b for a, b in zip(of, to, strict=True)]
    return Spread(statistics.median(each), min(each), max(each)) if each else None


def expert_sizes(settings: CompareSettings) -> tuple[int, int]:
    """(F, E) of the MoE model whose active and total weights are nearest to what is asked for.

    Raises:
        InvalidConfig: no experts can be so small, or so few.
    """
    like_moe = _reshaped(settings)
    neuron = like_moe.num_layers * 3 * like_moe.hidden_size
    with torch.device("meta"):
        dense = _count(LlamaForCausalLM(_dense_config(settings)))
        rest = _count(LlamaForCausalLM(_dense_config(like_moe))) - neuron * settings.dense_width
    width = round((settings.active * dense - rest) / (neuron * settings.top_k) / _ROUND) * _ROUND
    if width < _ROUND:
        raise InvalidConfig(
            f"active is {settings.active}, but what is no networks is {rest / dense:.2f} of the dense model's "
            "weights; expected more"
        )
    number = round((settings.total * dense - rest) / (neuron * width))
    if number < settings.top_k:
        raise InvalidConfig(f"total is {settings.total}, less than the active weights need; expected more")
    return width, number


def compare(
    settings: CompareSettings,
    on_turn: Callable[[str, int, int], None] = lambda *_: None,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Train the models, in turns, and ask them.

    Args:
        settings: what is compared.
        on_turn: told what is done, how often it was, and how often it will have been.
        clock: what times are taken with. With one thread, `time.process_time` leaves out what other processes of a
            shared machine took of its core.

    Raises:
        InvalidConfig: there are no such models.
        InsufficientResources: this Python comes without the sources of its library.
    """
    width, number = expert_sizes(settings)
    like_moe = _reshaped(settings)
    models = [
        _made(LlamaForCausalLM, _dense_config(settings), settings.seed),
        _made(LlamaForCausalLM, _dense_config(replace(like_moe, dense_width=settings.top_k * width)), settings.seed),
        _made(MixtralForCausalLM, _moe_config(like_moe, width, number), settings.seed),
    ]
    measured = [Measured(name, *_weights(each)) for name, each in zip(("dense", "small", "moe"), models, strict=True)]
    data, generator = corpus(), torch.Generator().manual_seed(settings.seed)

    def windows(number: int, length: int) -> torch.Tensor:
        starts = torch.randint(len(data) - length, (number, 1), generator=generator)
        return data[starts + torch.arange(length)].long()

    if settings.steps:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True) for model in models]
        for turn in range(settings.steps + 1):
            tokens_BS = windows(settings.batch, settings.window)
            for each in _rotated(turn):
                _train(models[each], optimizers[each], tokens_BS, clock, measured[each] if turn else None)
            on_turn("training", turn + 1, settings.steps + 1)
        del optimizers
    if settings.answers:
        for turn in range(settings.answers + 1):
            tokens_BS = windows(1, settings.prompt + settings.new_tokens)
            for each in _rotated(turn):
                _answer(models[each].eval(), tokens_BS, settings.prompt, clock, measured[each] if turn else None)
            on_turn("asking", turn + 1, settings.answers + 1)
    return Comparison(*measured)


def _rotated(turn: int) -> list[int]:
    return [(turn + number) % 3 for number in range(3)]


def _train(
    model: Any, optimizer: torch.optim.Optimizer, tokens_BS: torch.Tensor, clock: Clock, into: Measured | None
) -> None:
    """One step. The MoE model's loss has that of its balance beside it, as it is trained everywhere."""
    options = {"output_router_logits": True} if hasattr(model, "router_aux_loss_coef") else {}
    started_s = clock()
    out = model(tokens_BS, labels=tokens_BS, **options)
    out.loss.backward()
    learnt_s = clock()
    optimizer.step()
    optimizer.zero_grad()
    done_s = clock()
    if into is not None:
        into.gradient_s.append(learnt_s - started_s)
        into.update_s.append(done_s - learnt_s)
        beside = model.router_aux_loss_coef * out.aux_loss if options else 0.0
        into.losses.append(float((out.loss - beside).detach()))


@torch.inference_mode()
def _answer(model: Any, tokens_BS: torch.Tensor, prompt: int, clock: Clock, into: Measured | None) -> None:
    """One answer with a cache. Its tokens are given, so that all models go on with the same text."""
    started_s = clock()
    state = model(tokens_BS[:, :prompt], use_cache=True, logits_to_keep=1)
    prompt_s, tokens_s = clock() - started_s, []
    for token_BS in tokens_BS[:, prompt:].split(1, dim=1):
        started_s = clock()
        state = model(token_BS, past_key_values=state.past_key_values, use_cache=True)
        tokens_s.append(clock() - started_s)
    if into is not None:
        into.prompt_s.append(prompt_s)
        into.token_s.append(statistics.median(tokens_s))


def _reshaped(settings: CompareSettings) -> CompareSettings:
    """With the layers and the width of the MoE model."""
    unit = 64 if settings.hidden_size >= 64 else 16  # a head, or what can be one
    return replace(
        settings,
        num_layers=max(round(settings.shape * settings.num_layers), 1),
        hidden_size=max(round(settings.shape * settings.hidden_size / unit), 1) * unit,
    )


def _common(settings: CompareSettings) -> dict[str, Any]:
    heads = max(settings.hidden_size // 64, 1)
    return {
        "vocab_size": END + 1,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": MAX_TOKENS,
    }


def _dense_config(settings: CompareSettings) -> LlamaConfig:
    return LlamaConfig(**_common(settings), intermediate_size=settings.dense_width)


def _moe_config(settings: CompareSettings, width: int, number: int) -> MixtralConfig:
    return MixtralConfig(
        **_common(settings),
        intermediate_size=width,
        num_local_experts=number,
        num_experts_per_tok=settings.top_k,
    )


def _made(model: type[Any], config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model(config)
    compute_touched(made)
    return made


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _weights(model: Any) -> tuple[int, int]:
    """All weights, and those that a token meets."""
    total = _count(model)
    number = getattr(model.config, "num_local_experts", 1)
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return total, total - routed * (number - chosen) // number
