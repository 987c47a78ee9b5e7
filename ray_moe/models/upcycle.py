"""A dense model becomes a Mixture-of-Experts model that begins where the dense one is.

Every feed-forward network becomes experts (`models/ffn.py`), the rest stays as it is, in an MoE family of
`transformers` with the same block (`models/moe_targets.py`). Nothing is trained here, and no more than one expert is in
memory. Called by `cli/upcycle.py`, and by whoever has `ray_moe.upcycle`.

Methods, which go together:

- *copies* of the network (sparse upcycling, arXiv:2212.05055);
- copies with *noise*;
- copies of which a share is *reinitialised* (drop-upcycling, arXiv:2502.19261);
- *parts*: the network cut along its width into fine-grained experts, with virtual groups (arXiv:2410.07524);
- a *shared* expert that every token meets (arXiv:2401.06066), here the whole network, for half of the output.

Chosen weights sum to one in all target families, so copies give the dense output whatever the gate chooses. Parts are
multiplied by their number, since each gets its share of that one; parts of one network have the same row in the gate,
so that `top_k`, a multiple of their number, chooses all of them or none.

Shape legend: D model width, F width of the dense network, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ray_moe.errors import InvalidConfig
from ray_moe.models.dense import Dense
from ray_moe.models.ffn import FFN, gate_rows, noisy, reinitialised, scaled, seeded
from ray_moe.models.layer_choice import chosen_layers
from ray_moe.models.moe_targets import Blueprint, pairing
from ray_moe.models.moe_writing import NewMoE, Output, Readers, write_moe
from ray_moe.models.sharded import MAX_FILE_BYTES, OnWritten

SHARED_PART = 0.5
"""Of the dense output, what comes from the shared expert: what a sigmoid gate of zeros lets through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleSettings:
    """How a dense model becomes an MoE model."""

    num_experts: int = 8
    """E, in each MoE layer."""
    top_k: int = 2
    """Experts for each token."""
    parts: int = 1
    """How many experts a network is cut into; a divisor of `num_experts`, whose quotient is the number of copies."""
    noise: float = 0.0
    """Deviation of the noise on experts' weights, as a multiple of the weights' own."""
    reinit: float = 0.0
    """Share of each expert's neurons that are drawn anew."""
    shared: bool = False
    """Whether there is a shared expert beside them."""
    layers: str = "all"
    """Which layers become MoE: see `chosen_layers`."""
    gate_std: float | None = None
    """Deviation of the new gates' weights; None is the dense model's `initializer_range`."""
    seed: int = 0
    dtype: torch.dtype | None = None
    """Of the weights; None keeps the dense model's."""

    def __post_init__(self) -> None:
        """Raises: `InvalidConfig`: they contradict each other."""
        checks = (
            (self.num_experts >= 2, f"num_experts is {self.num_experts}; expected 2 or more"),
            (1 <= self.top_k <= self.num_experts, f"top_k is {self.top_k}; expected 1 to {self.num_experts} (all)"),
            (
                self.parts >= 1 and self.num_experts % max(self.parts, 1) == 0,
                f"parts is {self.parts}; expected a divisor of num_experts, {self.num_experts}",
            ),
            (self.noise >= 0, f"noise is {self.noise}; expected 0 or more"),
            (0 <= self.reinit <= 1, f"reinit is {self.reinit}; expected 0 (copies) to 1 (all drawn anew)"),
            (self.gate_std is None or self.gate_std >= 0, f"gate_std is {self.gate_std}; expected 0 or more"),
        )
        for holds, message in checks:
            if not holds:
                raise InvalidConfig(message)


def upcycle(
    dense: str | Path,
    out: str | Path,
    settings: UpcycleSettings | None = None,
    *,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_progress: OnWritten | None = None,
) -> NewMoE:
    """Write the MoE model of the dense checkpoint `dense`, a directory or a name on the hub, to the folder `out`.

    The same settings and seed give the same bytes. `out` is there whole or not at all.

    Raises:
        NotFound: there is no such checkpoint.
        InvalidCheckpoint: it is damaged.
        UnsupportedModel: no MoE family has its block.
        InvalidConfig: the settings do not fit the model, or `out` is taken or cannot be written.
        InsufficientResources: the disk is full.
    """
    settings = settings or UpcycleSettings()
    source = Dense.open(dense)
    if source.width % settings.parts:
        raise InvalidConfig(
            f"the width of the networks of {source.name}, {source.width}, cut into {settings.parts} parts leaves a "
            "remainder; choose a divisor"
        )
    plan = Blueprint(
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        expert_width=source.width // settings.parts,
        dense_width=source.width,
        layers=chosen_layers(settings.layers, source.num_layers),
        num_layers=source.num_layers,
        shared=settings.shared,
    )
    pair = pairing(source.config, plan)
    output = Output(
        folder=out,
        dtype=settings.dtype,
        overwrite=overwrite,
        max_file_bytes=max_file_bytes,
        on_progress=on_progress,
    )
    return write_moe([source], pair, plan, _Upcycled(source, settings, pair.target.shared_gate), output)


class _Upcycled:
    """The tensors of the new model."""

    def __init__(self, dense: Dense, settings: UpcycleSettings, shared_gate: bool) -> None:
        self._dense = dense
        self._settings = settings
        self._shared_scale = 1.0 if shared_gate else SHARED_PART
        self._scale = settings.parts * (1 - SHARED_PART if settings.shared else 1.0)

    @property
    def same_function(self) -> bool:
        settings = self._settings
        return settings.noise == 0 and settings.reinit == 0 and settings.top_k % settings.parts == 0

    def backbone(self, name: str, readers: Readers) -> torch.Tensor:
        tensor: torch.Tensor = readers[0].slice(name)[...]
        return tensor

    def gate(self, layer: int) -> torch.Tensor:
        settings, config = self._settings, self._dense.config
        deviation = config.initializer_range if settings.gate_std is None else settings.gate_std
        group = settings.parts if settings.top_k % settings.parts == 0 else 1
        rows = seeded(settings.seed, layer, "gate")
        return gate_rows(settings.num_experts, group, self._dense.hidden_size, deviation, rows)

    def expert(self, layer: int, number: int, readers: Readers) -> FFN:
        settings = self._settings
        ffn = self._dense.ffn(readers[0], layer, number % settings.parts, settings.parts)
        draw = seeded(settings.seed, layer, "expert", number)
        return scaled(noisy(reinitialised(ffn, settings.reinit, draw), settings.noise, draw), self._scale)

    def shared(self, layer: int, readers: Readers) -> FFN:
        return scaled(self._dense.ffn(readers[0], layer), self._shared_scale)
