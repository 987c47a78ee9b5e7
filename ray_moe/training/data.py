"""What a training step learns from: batches that are the same however often, and wherever, they are asked for.

A batch is decided by the request alone (seed, step, worker, micro-batch), so a step that is replayed after a loss sees
what it saw before, and a training that goes on from a checkpoint needs to remember nothing but its step. No Ray, no
threads; called by `training/worker.py`.

Shape legend: B windows of a micro-batch, S tokens of a window.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.training.documents import Corpus, Tokenize, Tokens, byte_tokens, check_sources, read_corpus, tokens_of

IGNORED = -100
"""The label of a position that is not learned from."""

Batch = dict[str, torch.Tensor]
"""``input_ids`` and ``labels``, both [B, S] int64. As in `transformers` labels stand at their own token's place: it is
the model's loss that compares each position with the next label."""

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Which batch is wanted. A step has ``num_workers * num_micro_batches`` of them."""

    step: int
    """From 0."""
    batch_size: int
    """B."""
    window: int
    """S."""
    worker: int = 0
    num_workers: int = 1
    micro_batch: int = 0
    num_micro_batches: int = 1
    seed: int = 0
    split: Split = "train"

    @property
    def first(self) -> int:
        """Number of its first window among those of all steps.

        A step has the same windows however they are divided, as long as there are equally many of them.
        """
        batches = self.step * self.num_workers * self.num_micro_batches
        return (batches + self.worker * self.num_micro_batches + self.micro_batch) * self.batch_size


class Data(Protocol):
    """Where batches come from."""

    def batch(self, request: BatchRequest) -> Batch:
        """Equal for equal requests. Raises: `InvalidRequest` for what a model could not learn from."""
        ...


def open_data(
    sources: str | Sequence[str], *, vocab_size: int, tokenizer: Any = None, validation_share: float = 0.05
) -> Data:
    """The data that `sources` name.

    Args:
        sources: files, folders, globs, JSON Lines files with a ``text`` in each line, and ``stdlib`` (see
            `training/documents.py`); or, alone, ``module:function``: asked with a `BatchRequest`, it answers the batch.
        vocab_size: of the model; every batch is checked against it.
        tokenizer: the checkpoint's; None for bytes, with `models.byte_level.END` after each document.
        validation_share: of the documents, about so many are kept for the split ``validation``.

    Raises: `InvalidConfig` for a source that is not there or has nothing to read.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if _is_function(names):
        return CheckedData(FunctionData(_function(names[0])), vocab_size)
    tokenize: Tokenize = byte_tokens if tokenizer is None else tokens_of(tokenizer)
    return windows_of(read_corpus(names, tokenize, validation_share), vocab_size)


def windows_of(corpus: Corpus, vocab_size: int) -> Data:
    """Windows of documents that have been read."""
    return CheckedData(WindowData({"train": corpus.train, "validation": corpus.validation}), vocab_size)


def check_data(sources: str | Sequence[str]) -> None:
    """Raises: `InvalidConfig` for sources that `open_data` would refuse at once; reads nothing."""
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise InvalidConfig("there is nothing to learn from: set train.data (files, folders, 'stdlib' ...)")
    if not _is_function(names):
        check_sources(names)


def _is_function(names: Sequence[str]) -> bool:
    return len(names) == 1 and bool(re.fullmatch(r"[\w.]+:\w+", names[0])) and not Path(names[0]).exists()


class WindowData:
    """Windows of a long row of tokens, shuffled: an epoch has every window once, and no two are cut the same way."""

    def __init__(self, tokens: Mapping[Split, Tokens]) -> None:
        self._tokens = tokens
        self._starts = lru_cache(maxsize=4)(_window_starts)

    def num_windows(self, window: int, split: Split = "train") -> int:
        """Of one epoch. Raises: `InvalidConfig` when there is not even one."""
        num_tokens = len(self._tokens[split])
        if num_tokens < window:
            raise InvalidConfig(
                f"the {split} split has {num_tokens} tokens and a window takes {window}; give more data, a shorter "
                f"window{', or a larger share for validation' if split == 'validation' else ''}"
            )
        # Room to begin each epoch somewhere else, if that costs no more than a window.
        return max(1, (num_tokens - window + 1) // window)

    def batch(self, request: BatchRequest) -> Batch:
        tokens, count = self._tokens[request.split], self.num_windows(request.window, request.split)
        numbers = range(request.first, request.first + request.batch_size)
        starts = [
            self._starts(count, request.window, len(tokens), request.seed, number // count)[number % count]
            for number in numbers
        ]
        rows = np.stack([tokens[start : start + request.window] for start in starts]).astype(np.int64)
        input_ids = torch.from_numpy(rows)
        return {"input_ids": input_ids, "labels": input_ids.clone()}


def _window_starts(count: int, window: int, num_tokens: int, seed: int, epoch: int) -> Any:
    """[count] where the windows of an epoch begin, in its order."""
    rng = np.random.default_rng((seed, epoch))
    shift = rng.integers(0, min(window, num_tokens - count * window + 1))
    return rng.permutation(count) * window + shift


class FunctionData:
    """Batches of a user's own making."""

    def __init__(self, function: Callable[[BatchRequest], Mapping[str, Any]]) -> None:
        self._function = function

    def batch(self, request: BatchRequest) -> Batch:
        batch = self._function(request)
        if not isinstance(batch, Mapping) or set(batch) != {"input_ids", "labels"}:
            has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise InvalidRequest(f'a batch must be {{"input_ids": [B, S], "labels": [B, S]}}; got {has}')
        try:
            return {name: torch.as_tensor(batch[name]) for name in ("input_ids", "labels")}
        except (ValueError, TypeError, RuntimeError) as error:  # torch raises any of them
            raise InvalidRequest(f"a batch must have two arrays [B, S] of integers: {error}") from error


def _function(name: str) -> Callable[[BatchRequest], Mapping[str, Any]]:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InvalidConfig(f"the data {name!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise InvalidConfig(f"the data {name!r} is a {type(function).__name__}; give a function of a BatchRequest")
    return function  # type: ignore[no-any-return]


class CheckedData:
    """What another one gives, if a model can learn from it."""

    def __init__(self, data: Data, vocab_size: int) -> None:
        self.data, self.vocab_size = data, vocab_size

    def batch(self, request: BatchRequest) -> Batch:
        return check_batch(self.data.batch(request), self.vocab_size)


def check_batch(batch: Mapping[str, torch.Tensor], vocab_size: int) -> Batch:
    """The batch in int64.

    Raises: `InvalidRequest` for shapes other than [B, S] or that differ, for what is no integer, and for a token or
    label that the vocabulary does not have, naming it and where it stands.
    """
    input_ids, labels = batch["input_ids"], batch["labels"]
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.shape != labels.shape:
        raise InvalidRequest(
            f"input_ids have the shape {list(input_ids.shape)} and labels {list(labels.shape)}; both must be [B, S], "
            "the same, and not empty"
        )
    return {
        "input_ids": _checked("input_ids", input_ids, vocab_size),
        "labels": _checked("labels", labels, vocab_size, IGNORED),
    }


def _checked(name: str, tokens: torch.Tensor, vocab_size: int, allowed: int | None = None) -> torch.Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise InvalidRequest(f"{name} are {str(tokens.dtype).removeprefix('torch.')}; they must be integers")
    tokens = tokens.long()
    bad = (tokens < 0) | (tokens >= vocab_size)
    if allowed is not None:
        bad &= tokens != allowed
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        also = "" if allowed is None else f", or {allowed} for a position that is not learned from"
        raise InvalidRequest(
            f"{name}[{row}, {column}] is {int(tokens[row, column])}; the vocabulary has 0 to {vocab_size - 1}{also}"
        )
    return tokens
