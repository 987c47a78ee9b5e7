"""The seam to `transformers`: a checkpoint, opened cheaply, whose backbone and experts are loaded apart.

Any family on `transformers`' experts interface works without code of its own here; `models/families.py` brings a few
more onto it. Called by the router (backbone) and by every expert host (its experts); knows nothing of either.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ray_moe.errors import InvalidCheckpoint, NotFound
from ray_moe.models.checkpoint import CheckpointFiles
from ray_moe.models.experts import drop_parameters, experts_modules, is_per_expert, make_shard
from ray_moe.models.layout import classify
from ray_moe.models.lazy import BlankTensors, OwnTensor, TensorSource
from ray_moe.models.loading import fill, finish, return_free_memory
from ray_moe.models.skeleton import build, read_config
from ray_moe.types import LayerPath, LayerSpec

OnProgress = Callable[[int], None]
"""Told the bytes loaded since it was last told."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)


class Checkpoint:
    """A checkpoint that can be served: checked whole, nothing loaded yet. Thread-safe."""

    def __init__(self, name: str, files: CheckpointFiles) -> None:
        """For `open`, which says what can go wrong."""
        self.name = name
        self.config: Any = read_config(files)
        self._files = files
        self._skeleton = build(self.config, files)
        self._experts = experts_modules(self._skeleton.model)
        self._layout = classify(self._skeleton, files.tensors)
        # Loading experts puts the new modules into the skeleton for a moment.
        self._lock = threading.Lock()

        blank = BlankTensors(files.tensors)
        self.backbone_bytes = self._try_backbone(blank)
        """Bytes of all weights but the routed experts', once loaded."""
        samples = {path: self._load_layer(path, [0], blank, "meta") for path in self._experts}
        self.layers: dict[LayerPath, LayerSpec] = {
            path: _spec(path, self._experts[path], sample) for path, sample in samples.items()
        }
        """The groups of routed experts, in model order."""
        self._shared_bytes = {path: _nbytes(samples[path]) - spec.expert_bytes for path, spec in self.layers.items()}

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Find and check the checkpoint `model`, a directory or a name on the Hugging Face hub; load nothing.

        Raises:
            NotFound: there is no such checkpoint.
            InvalidCheckpoint: a file is missing, damaged or contradicts another.
            UnsupportedModel: the checkpoint is sound, but its experts cannot be served apart.
        """
        return cls(str(model), CheckpointFiles.open(model))

    @property
    def model_type(self) -> str:
        model_type: str = self.config.model_type
        return model_type

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are once loaded."""
        return self._skeleton.dtype

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, in tokens, that the model was made for; None when it sets no limit."""
        return getattr(self._text_config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        vocab_size: int = self._text_config.vocab_size
        return vocab_size

    @property
    def num_experts(self) -> int:
        """Of the layer that has most."""
        return max(spec.num_experts for spec in self.layers.values())

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts, once loaded."""
        return self.experts_bytes({path: range(spec.num_experts) for path, spec in self.layers.items()})

    def experts_bytes(self, plan: Mapping[LayerPath, Sequence[int]]) -> int:
        """Bytes that `load_experts` of the same plan will take."""
        return sum(
            self._shared_bytes[path] + len(ids) * self.layers[path].expert_bytes
            for path, ids in self._checked(plan).items()
        )

    def load_backbone(self, device: str | torch.device = "cpu", on_progress: OnProgress | None = None) -> nn.Module:
        """The model with everything but the routed experts, whose modules have no parameters.

        In evaluation mode, with the checkpoint's generation configuration. `experts.install` makes it run.

        Raises:
            InvalidCheckpoint: the files have changed since `open`.
        """
        skeleton = build(self.config, self._files)
        drop_parameters(skeleton.model)
        places: dict[str, torch.Tensor] = skeleton.model.state_dict()
        missing = set(places)
        loaded_bytes = 0
        for names in self._layout.backbone:
            with self._files.reader() as reader:
                left = fill(skeleton, {name: OwnTensor(reader.slice(name)) for name in names}, device)
            step_bytes = sum(places[name].nbytes for name in missing - left)
            missing &= left
            loaded_bytes += step_bytes
            return_free_memory()
            _tell(on_progress, step_bytes)
        model: nn.Module = finish(skeleton, missing, device)
        self._set_generation_config(model)
        _tell(on_progress, self.backbone_bytes - loaded_bytes)
        return model

    def load_experts(
        self,
        plan: Mapping[LayerPath, Sequence[int]],
        device: str | torch.device = "cpu",
        on_progress: OnProgress | None = None,
    ) -> dict[LayerPath, nn.Module]:
        """The experts that `plan` names, by layer: the family's own experts class with one row for each of them.

        Row r is the r-th smallest id. The modules compute by themselves and need no gradient. Layers are read one
        after the other, so the memory needed on top of the result is about that of one layer's share.

        Raises:
            NotFound: the model has no such layer or expert.
            InvalidCheckpoint: the files have changed since `open`.
        """
        shards: dict[LayerPath, nn.Module] = {}
        for path, ids in self._checked(plan).items():
            # A file is open, and its pages count as this process's memory, no longer than its layer needs it.
            with self._files.reader() as reader:
                shards[path] = self._load_layer(path, ids, reader, device)
            return_free_memory()
            _tell(on_progress, _nbytes(shards[path]))
        return shards

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer; None when it has none.

        Raises:
            InvalidCheckpoint: it has one that cannot be read.
        """
        folder = self._files.folder
        if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
            return None
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever the many tokenizer classes raise
            raise InvalidCheckpoint(f"the tokenizer in {folder} cannot be read: {error}") from error
        return tokenizer

    @property
    def _text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    def _checked(self, plan: Mapping[LayerPath, Sequence[int]]) -> dict[LayerPath, list[int]]:
        """The plan in model order, ids ascending, layers without ids left out."""
        for path, ids in plan.items():
            if path not in self._experts:
                raise NotFound(f"{self.name} has no experts at {path!r}. It has them at: {', '.join(self._experts)}.")
            last = self.layers[path].num_experts - 1
            if any(not 0 <= expert <= last for expert in ids):
                raise NotFound(f"{path} of {self.name} has the experts 0 to {last}, not all of {list(ids)}.")
        return {path: sorted(set(plan[path])) for path in self._experts if plan.get(path)}

    def _load_layer(
        self, path: LayerPath, ids: Sequence[int], source: TensorSource, device: str | torch.device
    ) -> nn.Module:
        """Load some experts of one layer, in the place of the skeleton's own, where the conversion looks for them."""
        shard = make_shard(self._experts[path], ids)
        with self._lock:
            self._skeleton.model.set_submodule(path, shard)
            try:
                missing = fill(self._skeleton, self._layout.experts[path].select(ids, source), device)
            finally:
                self._skeleton.model.set_submodule(path, self._experts[path])
        _refuse_missing(sorted(missing & {f"{path}.{name}" for name in shard.state_dict()}))
        return shard.requires_grad_(False)

    def _try_backbone(self, source: TensorSource) -> int:
        """Try the backbone's conversion without data, and say how many bytes it makes.

        Raises:
            InvalidCheckpoint: tensors are missing or have the wrong shape.
        """
        model = self._skeleton.model
        names = [name for group in self._layout.backbone for name in group]
        missing = fill(self._skeleton, {name: source.slice(name) for name in names}, "meta")
        tied: dict[str, str] = model.all_tied_weights_keys
        for target, origin in tied.items():
            if target not in missing or origin not in missing:
                missing -= {target, origin}
        optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        inside_experts = tuple(f"{path}." for path in self._experts)
        _refuse_missing(
            sorted(
                name
                for name in missing
                if not name.startswith(inside_experts) and not any(pattern.search(name) for pattern in optional)
            )
        )
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return sum(
            tensor.nbytes for name, tensor in held.items() if name not in tied and not name.startswith(inside_experts)
        )

    def _set_generation_config(self, model: Any) -> None:
        path = self._files.folder / "generation_config.json"
        if not path.is_file():
            return  # the model's own is made from its configuration
        try:
            model.generation_config = GenerationConfig.from_pretrained(self._files.folder)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidCheckpoint(f"{path} cannot be read: {error}. Repair or remove it.") from error


def _spec(path: LayerPath, experts: Any, sample: Any) -> LayerSpec:
    """What a layer's experts are, from the whole module and a shard of it with one expert."""
    up = sample._parameters["gate_up_proj" if sample.has_gate else "up_proj"]
    down = sample._parameters["down_proj"]
    # [1, out, in], or [1, in, out] when transposed.
    into, out = (1, 2) if sample.is_transposed else (2, 1)
    return LayerSpec(
        path=path,
        num_experts=experts.num_experts,
        hidden_size=up.shape[into],
        output_size=down.shape[out],
        dtype=str(down.dtype).removeprefix("torch."),
        expert_bytes=sum(p.nbytes for name, p in sample._parameters.items() if is_per_expert(sample, name)),
    )


def _refuse_missing(names: list[str]) -> None:
    if names:
        raise InvalidCheckpoint(
            f"the checkpoint lacks {len(names)} tensors that the model needs: {', '.join(names[:3])}"
            f"{' ...' if len(names) > 3 else ''}. Fetch configuration and weights of one version."
        )


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _tell(on_progress: OnProgress | None, num_bytes: int) -> None:
    if on_progress is not None and num_bytes > 0:
        on_progress(num_bytes)
