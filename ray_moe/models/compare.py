"""A dense and an MoE model of a chosen ratio of active weights, trained and asked side by side.

Both are byte-level models with the same attention, made here and trained on Python's own library; steps alternate, so
that whatever else the machine does falls on both. Says what sparse weights buy on this machine: steps in a second, time
to a token, and the loss after the same time. Called by `cli/compare.py`.

The published pattern: with 54 % of the active weights (7 of 13 billion) and 4.3 times the weights, training 1.75 times
as fast and answers in 0.51 of the time.

Shape legend: D model width, F width of a network, E experts, B windows of a batch, S tokens of a window.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ray_moe.errors import InvalidConfig
from ray_moe.models.byte_level import END, MAX_TOKENS
from ray_moe.models.demo import corpus

_ROUND = 16
"""Widths of experts are multiples of it: rows of 16 bytes in every dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """The two models, and what they do."""

    active: float = 0.54
    """Weights that a token meets in the MoE model, as a multiple of the dense model's."""
    total: float = 4.3
    """All weights, likewise."""
    top_k: int = 2
    hidden_size: int = 256
    num_layers: int = 4
    dense_width: int = 2048
    """F of the dense model."""
    batch: int = 16
    """B."""
    window: int = 256
    """S."""
    steps: int = 10
    """Training steps of each model; the first one is not timed."""
    new_tokens: int = 48
    """Tokens of an answer that is timed."""
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One of the models."""

    name: str
    total: int
    active: int
    step_s: float
    """Median time of a training step."""
    token_s: float
    """Median time of a token of a single answer."""
    losses: tuple[float, ...]
    """Nats per byte on each step's batch."""


@dataclass(frozen=True, slots=True)
class Comparison:
    dense: Measured
    moe: Measured

    @property
    def speedup(self) -> float:
        """How many times as fast the MoE model trains, on the same tokens."""
        return self.dense.step_s / self.moe.step_s

    @property
    def latency(self) -> float:
        """Its time to a token, as a multiple of the dense model's."""
        return self.moe.token_s / self.dense.token_s

    def losses_after_the_same_time(self) -> tuple[float, float]:
        """Of (dense, MoE): when the one that is first through its steps is done."""
        num_steps = len(self.dense.losses)
        time_s = num_steps * min(self.dense.step_s, self.moe.step_s)
        at = [min(max(int(time_s / each.step_s), 1), num_steps) - 1 for each in (self.dense, self.moe)]
        return self.dense.losses[at[0]], self.moe.losses[at[1]]


def expert_sizes(settings: CompareSettings) -> tuple[int, int]:
    """(F, E) of the MoE model whose active and total weights are nearest to what is asked for.

    Raises:
        InvalidConfig: no experts can be so small, or so few.
    """
    dense = _count(_dense(settings))
    rest = dense - settings.num_layers * 3 * settings.hidden_size * settings.dense_width
    neuron = settings.num_layers * 3 * settings.hidden_size
    width = round((settings.active * dense - rest) / (neuron * settings.top_k) / _ROUND) * _ROUND
    if width < _ROUND:
        raise InvalidConfig(
            f"active is {settings.active}, but {rest / dense:.2f} of the dense model's weights are no networks; "
            "expected more"
        )
    number = round((settings.total * dense - rest) / (neuron * width))
    if number < settings.top_k:
        raise InvalidConfig(f"total is {settings.total}, less than the active weights need; expected more")
    return width, number


def compare(settings: CompareSettings, on_step: Callable[[int, int], None] = lambda done, total: None) -> Comparison:
    """Train both models, in turns, and ask both. `on_step` is told the steps that are done, and how many there will be.

    Raises:
        InvalidConfig: there are no such models.
        InsufficientResources: this Python comes without the sources of its library.
    """
    models = [_dense(settings), _moe(settings)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=settings.learning_rate) for model in models]
    data, generator = corpus(), torch.Generator().manual_seed(settings.seed)
    times: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    for step in range(settings.steps + 1):
        starts = torch.randint(len(data) - settings.window, (settings.batch, 1), generator=generator)
        tokens_BS = data[starts + torch.arange(settings.window)].long()
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            started_s = time.perf_counter()
            optimizer.zero_grad()
            loss = model(tokens_BS, labels=tokens_BS).loss
            loss.backward()
            optimizer.step()
            if step:
                times[number].append(time.perf_counter() - started_s)
                losses[number].append(float(loss.detach()))
        on_step(step + 1, settings.steps + 1)
    tokens_s = _answer(models, settings)
    measured = [
        Measured(name, *_weights(model), statistics.median(taken), token_s, tuple(curve))
        for name, model, taken, token_s, curve in zip(("dense", "moe"), models, times, tokens_s, losses, strict=True)
    ]
    return Comparison(*measured)


@torch.no_grad()
def _answer(models: list[Any], settings: CompareSettings) -> list[float]:
    """Median time of a token of each, generated one by one with a cache, in turns."""
    prompt = torch.arange(32, 64)[None]
    states = [(model.eval(), model(prompt, use_cache=True)) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(settings.new_tokens):
        for number, (model, state) in enumerate(states):
            token = state.logits[:, -1:].argmax(-1)
            started_s = time.perf_counter()
            states[number] = (model, model(token, past_key_values=state.past_key_values, use_cache=True))
            times[number].append(time.perf_counter() - started_s)
    return [statistics.median(each) for each in times]


def _common(settings: CompareSettings) -> dict[str, Any]:
    heads = max(settings.hidden_size // 32, 1)
    return {
        "vocab_size": END + 1,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": MAX_TOKENS,
    }


def _dense(settings: CompareSettings) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(LlamaConfig(**_common(settings), intermediate_size=settings.dense_width))


def _moe(settings: CompareSettings) -> Any:
    width, number = expert_sizes(settings)
    experts = {"intermediate_size": width, "num_local_experts": number, "num_experts_per_tok": settings.top_k}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return MixtralForCausalLM(MixtralConfig(**_common(settings), **experts))


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _weights(model: Any) -> tuple[int, int]:
    """All weights, and those that a token meets."""
    total = _count(model)
    number = getattr(model.config, "num_local_experts", 1)
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return total, total - routed * (number - chosen) // number
