"""Traffic as a simulation sees it: for each step of time, how many rows went to each expert.

A row is one choice of one token, so a token counts `top_k` times in every layer. Synthetic traffic is drawn from a
seed; `recording.py` has what was read from a service. `draw_batch` makes the single batches of a step.

Shape legend: L layers, E experts of the widest layer (a narrower one has no rows beyond its own).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ray_moe.errors import InvalidConfig
from ray_moe.simulate.checks import check_range
from ray_moe.types import LayerPath

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KINDS = ("zipf", "lognormal", "uniform")
MAX_SIZE = 2**24
"""Most (layer, expert) pairs of a trace."""
LEAST_LOG_WEIGHT = -50.0
"""Of an expert, relative to the hottest: none is so cold that its share vanishes."""
MAX_REDRAWS = 16
"""Rows above an expert's most are drawn anew so often; what is above it then is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What was routed in a stretch of time."""

    duration_s: float
    rows: Ints
    """[L, E]"""


class Trace(Protocol):
    """A finite sequence of steps, the same each time it is gone through."""

    @property
    def layers(self) -> tuple[LayerPath, ...]: ...

    @property
    def num_experts(self) -> tuple[int, ...]:
        """[L]"""
        ...

    @property
    def duration_s(self) -> float:
        """Of all steps."""
        ...

    def __iter__(self) -> Iterator[Step]: ...


@dataclass(frozen=True, slots=True)
class Jump:
    """From `at_s` on, something is `factor` times what it was."""

    at_s: float
    factor: float

    @classmethod
    def parse(cls, option: str, text: str) -> Jump:
        """``AT:FACTOR``. Raises: `InvalidConfig`."""
        try:
            at, factor = map(float, text.split(":"))
        except ValueError:
            raise InvalidConfig(f"{option} is {text!r}; expected SECONDS:FACTOR, such as 20:5") from None
        check_range(f"the time of {option}", at, 0)
        check_range(f"the factor of {option}", factor, 0)
        return cls(at, factor)


@dataclass(frozen=True, slots=True)
class SyntheticTrace:
    """Traffic drawn from a seed: popular and unpopular experts, whose popularity may drift or jump."""

    kind: str
    """``zipf``: weight 1 / rank^shape, ranks drawn for each layer; ``lognormal``: exp(shape * normal); ``uniform``."""
    shape: float
    num_layers: int
    experts_per_layer: int
    top_k: int
    tokens_per_s: float
    seconds: float
    step_s: float = 1.0
    drift: float = 0.0
    """The logarithm of each expert's weight walks at random by this much (standard deviation) in a second."""
    flash_crowd: Jump | None = None
    """One expert of each layer becomes so much hotter."""
    surge: Jump | None = None
    """The traffic becomes so much more."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: `InvalidConfig`."""
        check_range("--layers", self.num_layers, 1)
        check_range("--experts", self.experts_per_layer, 1)
        check_range("--layers times --experts", self.num_layers * self.experts_per_layer, 1, MAX_SIZE)
        check_range("--top-k", self.top_k, 1)
        if self.top_k > self.experts_per_layer:
            raise InvalidConfig(
                f"--top-k is {self.top_k}, but a layer has {self.experts_per_layer} experts and a token chooses each "
                "once at most; lower --top-k or raise --experts"
            )
        check_range(f"the number of --trace {self.kind}", self.shape, 0, 10)
        check_range("--tokens-per-second", self.tokens_per_s, 0)
        check_range("--seconds", self.seconds, 0, above=True)
        check_range("--step-seconds", self.step_s, 0, above=True)
        check_range("--drift", self.drift, 0, 10)
        check_range("--seed", self.seed, 0)

    @property
    def layers(self) -> tuple[LayerPath, ...]:
        return tuple(f"layers.{number}" for number in range(self.num_layers))

    @property
    def num_experts(self) -> tuple[int, ...]:
        return (self.experts_per_layer,) * self.num_layers

    @property
    def duration_s(self) -> float:
        return math.ceil(self.seconds / self.step_s) * self.step_s

    def __iter__(self) -> Iterator[Step]:
        random = np.random.default_rng([self.seed, 0])
        log_weight = self._log_weights(random)
        star = random.integers(self.experts_per_layer, size=self.num_layers)
        for number in range(math.ceil(self.seconds / self.step_s)):
            at_s = number * self.step_s
            now = log_weight.copy()
            if self.flash_crowd is not None and at_s >= self.flash_crowd.at_s:
                now[np.arange(self.num_layers), star] += math.log(max(self.flash_crowd.factor, 1e-9))
            share = capped(self._weights(now), np.full(self.num_layers, 1.0 / self.top_k))
            tokens = self.tokens_per_s * self.step_s
            if self.surge is not None and at_s >= self.surge.at_s:
                tokens *= self.surge.factor
            yield Step(self.step_s, np.rint(share * (tokens * self.top_k)).astype(np.int64))
            walk = random.standard_normal(log_weight.shape)
            log_weight += self.drift * math.sqrt(self.step_s) * walk

    @staticmethod
    def _weights(log_weight: Floats) -> Floats:
        weight: Floats = np.exp(np.maximum(log_weight - log_weight.max(-1, keepdims=True), LEAST_LOG_WEIGHT))
        return weight

    def _log_weights(self, random: np.random.Generator) -> Floats:
        size = (self.num_layers, self.experts_per_layer)
        if self.kind == "zipf":
            rank = np.tile(np.arange(1, self.experts_per_layer + 1), (self.num_layers, 1))
            log_weight: Floats = -self.shape * np.log(random.permuted(rank, axis=-1))
            return log_weight
        return self.shape * random.standard_normal(size) if self.kind == "lognormal" else np.zeros(size)


def parse_kind(text: str) -> tuple[str, float] | None:
    """``zipf:1.2`` -> its kind and number (1 where there is none); None if that is not how a synthetic trace is named.

    Raises: `InvalidConfig` for a number that is none.
    """
    kind, colon, number = text.partition(":")
    if kind not in KINDS:
        return None
    try:
        return kind, float(number) if colon else 1.0
    except ValueError:
        raise InvalidConfig(f"--trace is {text!r}; expected a number after the colon, such as {kind}:1.0") from None


def capped(weight: Floats, cap: Floats) -> Floats:
    """Shares in proportion to `weight`, none above its row's `cap`: no token chooses an expert twice.

    Args:
        weight: [L, E] 0 or more; a row without any stays 0.
        cap: [L] at least 1 / (experts of the row with a weight).

    Returns: [L, E] each row adding up to 1 (or 0).
    """
    total = weight.sum(-1, keepdims=True)
    share: Floats = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    most = cap[:, None]
    for _ in range(weight.shape[-1]):
        above = share > most * (1 + 1e-12)
        if not above.any():
            break
        full = share >= most * (1 - 1e-12)
        rest = np.where(full, 0.0, share).sum(-1, keepdims=True)
        left = np.maximum(1.0 - np.where(full, most, 0.0).sum(-1, keepdims=True), 0.0)
        grown = share * np.divide(left, rest, out=np.zeros_like(rest), where=rest > 0)
        share = np.where(above.any(-1, keepdims=True), np.where(full, most, grown), share)
    return share


def draw_batch(rows: Ints, num_tokens: int, top_k: int, noise: float, random: np.random.Generator) -> Ints:
    """One batch of a step: each expert's share of it times exp(noise * normal), then rows drawn from these shares.

    Args:
        rows: [L, E] of the step.
        num_tokens: in the batch; fewer where the step has not as many.

    Returns: [L, E]; no expert has more rows than the batch has tokens, unless it had in the whole step.
    """
    total = rows.sum(-1)
    share = rows / np.maximum(total, 1)[:, None]
    tokens = np.minimum(num_tokens, total / top_k)
    cap = np.maximum(1.0 / top_k, share.max(-1))
    share = capped(share * np.exp(noise * random.standard_normal(rows.shape)), cap)
    number = np.rint(tokens * top_k).astype(np.int64)
    count: Ints = random.multinomial(number, share / np.maximum(share.sum(-1, keepdims=True), 1e-300))
    most = np.ceil(cap * number).astype(np.int64)[:, None]
    for _ in range(MAX_REDRAWS):
        excess = np.maximum(count - most, 0).sum(-1)
        if not excess.any():
            break
        count = np.minimum(count, most)
        room = np.where(share > 0, most - count, 0).astype(np.float64)
        count += random.multinomial(excess, room / np.maximum(room.sum(-1, keepdims=True), 1e-300))
    kept: Ints = np.minimum(count, most)
    return kept
