"""Several dense models that were fine-tuned apart become one MoE model, an expert for each.

In every MoE layer, expert m is the feed-forward network of model m; all the rest is the average of the models, or the
first one's (Branch-Train-MiX, arXiv:2403.07816). The gate is random, or each expert's row is the mean of what a gate
sees in prompts for that expert (after the gate mode "hidden_avg" of mergekit's MoE merging, arXiv:2403.13257, which
takes the states before attention). The result is where training begins; with a random gate nothing says yet which
expert is for what. Tensors are read and written one by one; only for a gate from prompts is the first model loaded.
Called by `cli/upcycle.py`, and by whoever has `ray_moe.merge`.

Shape legend: D model width, E experts (models), S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.models.dense import Dense
from ray_moe.models.ffn import FFN, gate_rows, seeded
from ray_moe.models.layer_choice import chosen_layers
from ray_moe.models.moe_targets import Blueprint, Pairing, pairing
from ray_moe.models.moe_writing import NewMoE, Output, Readers, write_moe
from ray_moe.models.quiet import no_progress_bars
from ray_moe.models.sharded import MAX_FILE_BYTES, OnWritten

_MAY_DIFFER = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id",
    "transformers_version", "use_cache",
}  # fmt: skip
"""Settings that say nothing about how a model computes; the first one's are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSettings:
    """How dense models become one MoE model."""

    top_k: int = 2
    """Experts for each token."""
    backbone: str = "average"
    """What all tokens go through: the ``average`` of the models, or the ``first`` one."""
    prompts: Sequence[Sequence[str]] = ()
    """For each model, texts that it is for: the gates are made of them. Empty is random gates."""
    layers: str = "all"
    """Which layers become MoE: see `chosen_layers`. The others are part of the backbone."""
    gate_std: float | None = None
    """Deviation of random gates' weights; None is the first model's `initializer_range`."""
    seed: int = 0
    dtype: torch.dtype | None = None
    """Of the weights; None keeps the first model's."""


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    settings: MergeSettings | None = None,
    *,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_progress: OnWritten | None = None,
) -> NewMoE:
    """Write the MoE model of the dense checkpoints `models` to the folder `out`, with the first one's tokenizer.

    Raises:
        NotFound: there is no such checkpoint.
        InvalidCheckpoint: one is damaged.
        UnsupportedModel: no MoE family has their block.
        InvalidRequest: they are not of one architecture.
        InvalidConfig: the settings do not fit the models, or `out` is taken or cannot be written.
        InsufficientResources: the disk is full.
    """
    settings = settings or MergeSettings()
    _check(settings, len(models))
    sources = [Dense.open(model) for model in models]
    first = sources[0]
    plan = Blueprint(
        num_experts=len(sources),
        top_k=settings.top_k,
        expert_width=first.width,
        dense_width=first.width,
        layers=chosen_layers(settings.layers, first.num_layers),
        num_layers=first.num_layers,
        shared=False,
    )
    pair = pairing(first.config, plan)
    for other in sources[1:]:
        _check_same(first, other, pair, plan)
    gates = gates_from_prompts(first, settings.prompts) if settings.prompts else {}
    output = Output(
        folder=out,
        dtype=settings.dtype,
        overwrite=overwrite,
        max_file_bytes=max_file_bytes,
        on_progress=on_progress,
    )
    return write_moe(sources, pair, plan, _Merged(sources, settings, gates), output)


@torch.no_grad()
def gates_from_prompts(dense: Dense, prompts: Sequence[Sequence[str]]) -> dict[int, torch.Tensor]:
    """Rows [E, D] for the gate of each layer: row e is the direction of the mean input of the layer's feed-forward
    network, which is what a gate there sees, over all tokens of `prompts[e]`.

    Loads the whole model, in its own dtype. Raises: `InvalidConfig`: it has no tokenizer, or a prompt no tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(dense.files.folder, trust_remote_code=False)
    except Exception as error:  # whatever the many tokenizer classes raise
        raise InvalidConfig(
            f"{dense.name} has no tokenizer that can be read, so prompts cannot make the gates: {error}"
        ) from error
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(dense.files.folder, trust_remote_code=False).eval()
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, given, layer=layer: seen.update({layer: given[0][0].float()}))
    rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(dense.num_layers)}
    for number, texts in enumerate(prompts):
        sums = {layer: torch.zeros(dense.hidden_size) for layer in rows}
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt").input_ids
            if tokens.numel() == 0 or tokens.max() >= dense.config.vocab_size:
                raise InvalidConfig(f"a prompt of model {number} has no tokens that {dense.name} knows: {text!r}")
            model(tokens, use_cache=False)
            for layer, hidden_SD in seen.items():
                sums[layer] += hidden_SD.sum(0)
        for layer, total in sums.items():
            rows[layer].append(torch.nn.functional.normalize(total, dim=0))  # of a sum or a mean: one direction
    return {layer: torch.stack(each) for layer, each in rows.items()}


class _Merged:
    """The tensors of the new model."""

    same_function = False
    shared = None

    def __init__(self, models: Sequence[Dense], settings: MergeSettings, gates: Mapping[int, torch.Tensor]) -> None:
        self._models = models
        self._settings = settings
        self._gates = gates

    def backbone(self, name: str, readers: Readers) -> torch.Tensor:
        first: torch.Tensor = readers[0].slice(name)[...]
        if self._settings.backbone == "first" or not first.is_floating_point():
            return first
        total = first.float()
        for reader in readers[1:]:
            total = total + reader.slice(name)[...]
        return total / len(readers)

    def gate(self, layer: int) -> torch.Tensor:
        if self._gates:
            return self._gates[layer]
        settings, config = self._settings, self._models[0].config
        deviation = config.initializer_range if settings.gate_std is None else settings.gate_std
        return gate_rows(len(self._models), 1, config.hidden_size, deviation, seeded(settings.seed, layer, "gate"))

    def expert(self, layer: int, number: int, readers: Readers) -> FFN:
        return self._models[number].ffn(readers[number], layer)


def _check(settings: MergeSettings, num_models: int) -> None:
    """Raises: `InvalidConfig`: settings that do not fit so many models."""
    checks = (
        (num_models >= 2, f"{num_models} models were named; expected 2 or more to merge"),
        (1 <= settings.top_k <= num_models, f"top_k is {settings.top_k}; expected 1 to {num_models}, one per model"),
        (settings.backbone in ("average", "first"), f"backbone is {settings.backbone!r}; expected average or first"),
        (
            not settings.prompts or len(settings.prompts) == num_models,
            f"there are prompts for {len(settings.prompts)} models; expected them for all {num_models}, or none",
        ),
        (all(settings.prompts), "a model has no prompts; expected at least one for each"),
        (settings.gate_std is None or settings.gate_std >= 0, f"gate_std is {settings.gate_std}; expected 0 or more"),
    )
    for holds, message in checks:
        if not holds:
            raise InvalidConfig(message)


def _check_same(first: Dense, other: Dense, pair: Pairing, plan: Blueprint) -> None:
    """Raises: `InvalidRequest`: the models differ in more than their weights."""
    say = f"{other.name} is of another architecture than {first.name}, so they have no common backbone:"
    if other.config.model_type != first.config.model_type:
        raise InvalidRequest(f"{say} {other.config.model_type}, not {first.config.model_type}")
    mine, theirs = (_settings(pair, each.config, plan) for each in (first, other))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise InvalidRequest(f"{say} its {name} is {theirs.get(name)!r}, not {mine.get(name)!r}")
    if first.backbone != other.backbone:
        name = min({*first.backbone} ^ {*other.backbone})
        raise InvalidRequest(f"{say} {name} is in one of them only")


def _settings(pair: Pairing, config: Any, plan: Blueprint) -> dict[str, Any]:
    settings: dict[str, Any] = pair.config(config, plan).to_dict()
    own = {"intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers}
    return {name: value for name, value in (settings | own).items() if name not in _MAY_DIFFER}
