"""From a checkpoint of training to one that anybody can load: the trained weights in the model they began with."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch

from ray_moe.errors import InvalidCheckpoint, NotFound
from ray_moe.models.export import export
from ray_moe.models.gates import router_state
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.lora import without_adapters
from ray_moe.models.sharded import OnWritten
from ray_moe.ops.lora import merged
from ray_moe.training.archive import LORA_SCALE
from ray_moe.training.checkpoints import BACKBONE, latest
from ray_moe.training.gating import check_writable
from ray_moe.training.manifest import fingerprint
from ray_moe.training.restoring import TrainingCheckpoint
from ray_moe.types import LayerPath

MASTER = "master."
"""What the weights' names begin with in an expert's state; the rest is the optimizer's."""

PUBLISHED = "published"
"""Folder, among the checkpoints of a run, of what was written to be served."""

_PUBLISHED = re.compile(r"step-\d{8,}-[0-9a-f]{6}")
"""What was written to be served; without the end it would be a checkpoint of training."""


def find(folder: Path) -> TrainingCheckpoint:
    """The checkpoint of training at `folder`, or the latest one in it; its hashes are still to be checked.

    Raises:
        NotFound: there is no such folder.
        InvalidCheckpoint: it is none, or is damaged.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}; name a checkpoint of training, or the folder they are in")
    return TrainingCheckpoint.open(latest(folder) or folder, check_hashes=False)


def export_trained(
    trained: TrainingCheckpoint,
    model: Checkpoint,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: OnWritten | None = None,
) -> Path:
    """Write the weights of `trained` as a checkpoint like `model`, which they began as. What was not trained is its.

    The arguments, and the errors too, are those of `models.export.export`; besides:

    Raises:
        InvalidCheckpoint: the weights are not of a model like that.
        InvalidConfig: `transformers` would not compute what was trained (`check_writable`).
    """
    check_origin(trained, model)
    check_writable(model, trained.manifest.gate)
    backbone, experts = trained_weights(trained, model)
    return export(model, folder, backbone, experts, dtype=dtype, overwrite=overwrite, on_progress=on_progress)


def trained_weights(
    trained: TrainingCheckpoint, model: Checkpoint
) -> tuple[dict[str, torch.Tensor], Callable[[LayerPath], Mapping[str, torch.Tensor]]]:
    """The state of the backbone, adapters merged and a gate's weights under its own names; and of a layer's experts."""
    backbone = _backbone(trained, model)
    scale = float(backbone.pop(LORA_SCALE, torch.zeros(())))  # without adapters it is not used

    def experts(path: LayerPath) -> Mapping[str, torch.Tensor]:
        states = trained.read(path, range(model.layers[path].num_experts))
        rows = ((expert, _masters(state)) for expert, state in states)
        return _layer(str(trained.folder), model, path, rows, scale)

    return without_adapters(backbone, scale), experts


def check_origin(trained: TrainingCheckpoint, model: Checkpoint) -> None:
    """Raises: `InvalidCheckpoint` where the weights are not of a model like that."""
    if trained.manifest.fingerprint != fingerprint(model.files.config):
        raise InvalidCheckpoint(
            f"{trained.folder} was trained from {trained.manifest.stamp.model}, and {model.name} is a model of another "
            "shape. Name the model that the training began with."
        )


def export_running(
    model: Checkpoint,
    root: str | Path,
    step: int,
    backbone: Mapping[str, torch.Tensor],
    weights: Callable[[LayerPath], Mapping[int, Mapping[str, torch.Tensor]]],
    held: Collection[str],
) -> Path:
    """Write weights that are being trained as a checkpoint like `model`, to publish it.

    Args:
        root: where such checkpoints are; this one is a new folder in it.
        step: after which they are.
        backbone: its state, adapters merged; with a gate in the place of its routers, one that `check_writable` allows.
        weights: of each expert of a layer.
        held: folders that were written before and must stay; the others are removed, as long as they are such folders,
            and not what `model` is.

    Returns: the folder.

    Raises: as `models.export.export`, and what `weights` raises.
    """
    root = Path(root).expanduser().resolve()
    kept = {Path(name).expanduser().resolve() for name in (*held, model.name)}
    for folder in root.glob("step-*"):
        if _PUBLISHED.fullmatch(folder.name) and folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    folder = root / f"step-{step:08d}-{secrets.token_hex(3)}"  # one of this step may be in use
    backbone = router_state(backbone, model.places)
    return export(
        model, folder, backbone, lambda path: _layer("the training", model, path, sorted(weights(path).items()))
    )


def _masters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(MASTER): tensor for name, tensor in state.items() if name.startswith(MASTER)}


def _backbone(trained: TrainingCheckpoint, model: Checkpoint) -> dict[str, torch.Tensor]:
    """The state of the backbone: what was trained of it, and the rest as it was in the beginning."""
    backbone = trained.tensors(BACKBONE) if BACKBONE in trained.files else {}
    routed = tuple(f"{path}." for path in model.layers)
    untrained = [
        name
        for name in model.places
        if not name.startswith(routed) and name not in backbone and model.tied.get(name) not in backbone
    ]
    if untrained:
        beginning = model.load_backbone().state_dict()
        backbone |= {name: beginning[name] for name in untrained}
    return backbone


def _layer(
    source: str,
    model: Checkpoint,
    path: LayerPath,
    states: Iterable[tuple[int, Mapping[str, torch.Tensor]]],
    scale: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The experts of a layer one above the other, as their module has them.

    Args:
        source: of their weights, by name.
        scale: of adapters that are still apart.
    """
    places = {
        name.removeprefix(f"{path}."): place for name, place in model.places.items() if name.startswith(f"{path}.")
    }
    layer: dict[str, torch.Tensor] = {}
    how = model.load_experts({path: [0]})[path]
    num_experts = model.layers[path].num_experts
    for expert, state in states:
        rows = merged(state, bool(how.is_transposed), scale)
        for name, place in places.items():
            row = rows.get(name)
            if row is None:
                continue
            if row.shape != place.shape[1:]:
                raise InvalidCheckpoint(
                    f"{source} has {name} of expert {expert} of {path} in shape {tuple(row.shape)}; "
                    f"expected {tuple(place.shape[1:])}. Take another checkpoint."
                )
            layer.setdefault(name, torch.empty(place.shape, dtype=row.dtype))[expert] = row
    if layer.keys() != places.keys():
        layer = {**model.load_experts({path: range(num_experts)})[path].state_dict(), **layer}
    return layer
