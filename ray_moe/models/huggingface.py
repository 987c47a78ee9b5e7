"""The seam to `transformers`: a checkpoint, opened cheaply, whose backbone and experts are loaded apart.

Any family on `transformers`' experts interface works without code of its own here; `models/families.py` brings a few
more onto it. Called by the router (backbone) and by every expert host (its experts); knows nothing of either.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ray_moe.errors import InvalidCheckpoint, InvalidRequest, NotFound, WireError
from ray_moe.models.checkpoint import CheckpointFiles, Reader
from ray_moe.models.experts import drop_parameters, make_parts, make_shard
from ray_moe.models.generation_config import read_generation, start_token
from ray_moe.models.layout import Layout, classify
from ray_moe.models.lazy import OwnTensor
from ray_moe.models.loading import fill, fill_experts, finish, return_free_memory
from ray_moe.models.skeleton import Skeleton, build, read_config
from ray_moe.models.trial import num_bytes, try_backbone, try_experts
from ray_moe.ops.experts import ExpertArrays, unpack
from ray_moe.ops.parts import ExpertParts, axes_of
from ray_moe.ops.quantization import Quantization, QuantizedExperts, quantized_bytes
from ray_moe.types import LayerPath, LayerSpec

OnProgress = Callable[[int], None]
"""Told the bytes loaded since it was last told."""

_TOKENIZER_FILES = ("tokenizer*.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint that can be served: checked whole, nothing loaded yet. Made by `open`. Thread-safe."""

    name: str
    """As it was given to `open`."""
    config: Any
    """The checkpoint's configuration, of `transformers`."""
    layers: dict[LayerPath, LayerSpec]
    """The groups of routed experts, in model order."""
    backbone_bytes: int
    """Bytes of all weights but the routed experts', once loaded."""
    _files: CheckpointFiles
    _skeleton: Skeleton
    _layout: Layout
    _shared_bytes: dict[LayerPath, int]
    """What a shard of a layer holds beside its experts."""
    places: dict[str, torch.Tensor]
    """Every tensor of the whole model, by name: on the meta device, in the shape and dtype it has once loaded."""
    parts: ExpertParts = field(default_factory=ExpertParts)
    """How its experts are cut."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while experts are loaded through the skeleton."""

    @classmethod
    def open(cls, model: str | Path, *, encoder_decoder: bool = False) -> Checkpoint:
        """Find and check the checkpoint `model`, a directory or a name on the Hugging Face hub; load nothing.

        Args:
            model: which one.
            encoder_decoder: whether to open a model with an encoder, too. Who serves does; training, adapters and
                exporting take a decoder alone.

        Raises:
            NotFound: there is no such checkpoint.
            InvalidCheckpoint: a file is missing, damaged or contradicts another.
            UnsupportedModel: the checkpoint is sound, but its experts cannot be served apart.
        """
        files = CheckpointFiles.open(model)
        config = read_config(files, encoder_decoder)
        skeleton = build(config, files)
        if config.is_encoder_decoder:
            start_token(read_generation(files, config))
        layout = classify(skeleton, files.tensors)
        backbone_bytes = try_backbone(skeleton, layout, files.tensors)
        layers, shared_bytes = try_experts(skeleton, layout, files.tensors)
        return cls(
            name=str(model),
            config=config,
            layers=layers,
            backbone_bytes=backbone_bytes,
            _files=files,
            _skeleton=skeleton,
            _layout=layout,
            _shared_bytes=shared_bytes,
            # Taken now: while experts are loaded, a few of them take the place of the skeleton's own.
            places=skeleton.model.state_dict(),
        )

    def cut(self, num_parts: int) -> Checkpoint:
        """The same with each expert cut into `num_parts`, which are its experts then (`ops/parts.py`).

        `layers` counts those, and what is asked for by number are those (`policy/parts.py`). All else is shared.

        Raises:
            UnsupportedModel: the experts of this family are no sum of parts.
            InvalidConfig: their width is no multiple of `num_parts`.
        """
        if num_parts == self.parts.number:
            return self
        axes = {path: axes_of(experts, path, num_parts) for path, experts in self._skeleton.experts.items()}
        layers = {
            path: replace(spec, num_experts=num_parts * spec.num_experts, expert_bytes=spec.expert_bytes // num_parts)
            for path, spec in self.layers.items()
        }
        return replace(self, layers=layers, parts=ExpertParts(num_parts, axes))

    @property
    def model_type(self) -> str:
        model_type: str = self.config.model_type
        return model_type

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are once loaded."""
        return self._skeleton.dtype

    @property
    def files(self) -> CheckpointFiles:
        """What it is on disk."""
        return self._files

    @property
    def tied(self) -> dict[str, str]:
        """Weights that are one and the same under several names: each name -> another one."""
        tied: dict[str, str] = self._skeleton.model.all_tied_weights_keys
        return {origin: name for name, origin in tied.items()} | tied

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

    def peak_bytes(self, plan: Mapping[LayerPath, Sequence[int]]) -> int:
        """The same and what it takes besides for a moment: to cut an expert, the whole of it."""
        cut = [self.layers[path].expert_bytes * self.parts.number for path in plan] if self.parts.number > 1 else []
        return self.experts_bytes(plan) + max(cut, default=0)

    def layers_as(self, quantization: Quantization) -> tuple[LayerSpec, ...]:
        """The layers with the bytes that their experts have when they are held so."""
        layers = self.layers.values()
        if quantization == "none":
            return tuple(layers)
        return tuple(replace(each, expert_bytes=quantized_bytes(self._frame(each.path, [0]))) for each in layers)

    def check_same_architecture(self, other: Checkpoint) -> None:
        """Whether `other`'s weights can take the place of these: every one has the same name, shape and dtype.

        Raises:
            InvalidRequest: they cannot; the message says what differs.
        """
        for what in ("model_type", "vocab_size", "max_positions", "layers"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                told = f": {theirs}, not {mine}" if what != "layers" else " (number, shape or dtype of the experts)"
                raise InvalidRequest(f"{other.name} is of another architecture than {self.name}, by its {what}{told}")
        mine, theirs = (
            {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in each.places.items()}
            for each in (self, other)
        )
        if mine != theirs:
            name = min(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise InvalidRequest(
                f"{other.name} is of another architecture than {self.name}: {name} is {theirs.get(name, 'not there')}, "
                f"not {mine.get(name, 'not there')}"
            )

    def outline(self) -> nn.Module:
        """The whole model without weights, on the meta device: a new one."""
        model: nn.Module = build(self.config, self._files).model
        return model

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
        whole: Any = model
        whole.generation_config = read_generation(self._files, whole.config)
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
            with self._lock, self._files.reader() as reader:
                shards[path] = self._fill(path, ids, reader, device)
            return_free_memory()
            _tell(on_progress, num_bytes(shards[path]))
        return shards

    def experts_from(
        self, path: LayerPath, ids: Sequence[int], arrays: ExpertArrays, device: str | torch.device = "cpu"
    ) -> nn.Module:
        """The experts `ids` of one layer out of a host's copy of them (`ExpertHost.export`); reads no file.

        The module is what `load_experts` makes of the same ids.

        Raises:
            NotFound: the model has no such layer or expert.
            WireError: the copy is not of these experts.
        """
        shard = self._frame(path, ids)
        tensors = {name: tensor.to(device) for name, tensor in unpack(arrays).items()}
        try:
            shard.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:  # names or shapes differ
            raise WireError(f"this is not a copy of experts {sorted(set(ids))} of {path}: {error}") from error
        return shard.requires_grad_(False)

    def quantized_experts_from(
        self,
        path: LayerPath,
        ids: Sequence[int],
        arrays: ExpertArrays,
        quantization: Quantization,
        device: str | torch.device = "cpu",
    ) -> QuantizedExperts:
        """The same of experts that the host holds in 8 bits; nothing is quantised anew. Raises: as `experts_from`."""
        tensors = {name: tensor.to(device) for name, tensor in unpack(arrays).items()}
        return QuantizedExperts.from_tensors(self._frame(path, ids), tensors, quantization)

    def _frame(self, path: LayerPath, ids: Sequence[int]) -> nn.Module:
        """How the experts `ids` of a layer compute, on the meta device. Raises: `NotFound`."""
        checked = self._checked({path: ids})
        if path not in checked:
            raise NotFound(f"name at least one expert of {path} to build from a copy")
        return self._made(path, checked[path], lambda some: make_shard(self._skeleton.experts[path], some))

    def _fill(self, path: LayerPath, ids: Sequence[int], reader: Reader, device: str | torch.device) -> nn.Module:
        layer = self._layout.experts[path]
        return self._made(path, ids, lambda some: fill_experts(self._skeleton, path, layer, some, reader, device))

    def _made(self, path: LayerPath, ids: Sequence[int], make: Callable[[Sequence[int]], nn.Module]) -> nn.Module:
        """What `make` makes of whole experts; where they are cut, of each that `ids` has a part of."""
        if self.parts.number == 1:
            return make(ids)
        num_experts = self.layers[path].num_experts // self.parts.number
        return make_parts(lambda e: make([e]), num_experts, ids, self.parts.axes[path], self.parts.number)

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
            if path not in self.layers:
                raise NotFound(f"{self.name} has no experts at {path!r}. It has them at: {', '.join(self.layers)}.")
            last = self.layers[path].num_experts - 1
            if any(not 0 <= expert <= last for expert in ids):
                raise NotFound(f"{path} of {self.name} has the experts 0 to {last}, not all of {list(ids)}.")
        return {path: sorted(set(plan[path])) for path in self.layers if plan.get(path)}


def _tell(on_progress: OnProgress | None, num_bytes: int) -> None:
    if on_progress is not None and num_bytes > 0:
        on_progress(num_bytes)
