"""What a checkpoint of training says of itself: its manifest, as JSON, and the stamp on each of its files.

Values and their text alone: reads and writes no file. Called by `checkpoints.py` and `shards.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_moe.errors import InvalidCheckpoint, InvalidRequest
from ray_moe.ops.gates.registry import GateChoice
from ray_moe.ops.parts import Axis, ExpertParts
from ray_moe.types import LayerPath

VERSIONS = (1, 2, 3)
"""Of the format: a later one may not be readable to this program. The second is of experts that are cut into parts, the
third of models that were trained with a gate of this package."""

_FILE = re.compile(r"(experts/)?[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PLACE_BLIND = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"}
"""Settings of a model that say nothing about which parameters it has."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which checkpoint a file belongs to. Every file carries it."""

    run_id: str
    """Of the training run, the same in all its lives."""
    step: int
    """Optimizer steps that are done."""
    model: str
    """What the training began with, as `Checkpoint.open` takes it."""

    def metadata(self) -> dict[str, str]:
        return {"format": "pt", "run_id": self.run_id, "step": str(self.step), "model": self.model}

    def refuse_foreign(self, file: str, metadata: Mapping[str, str] | None) -> None:
        """Raises: `InvalidCheckpoint` when the file with this metadata belongs to another checkpoint."""
        for name, expected in self.metadata().items():
            found = (metadata or {}).get(name)
            if found != expected:
                raise InvalidCheckpoint(
                    f"{file} belongs to another checkpoint: its {name} is {found!r}, that of the manifest is "
                    f"{expected!r}. Put back the file that was written there, or take another checkpoint."
                )


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a checkpoint."""

    file: str
    """Its path in the checkpoint's folder."""
    num_bytes: int
    sha256: str
    """Of the whole file, in hexadecimal."""
    experts: Mapping[LayerPath, tuple[int, ...]] = field(default_factory=dict)
    """Whose tensors are in it, ascending; empty for files of the backbone. Parts, where experts are cut."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is to be known of a checkpoint of training before its tensors are read."""

    stamp: Stamp
    fingerprint: str
    """`fingerprint` of the model's configuration."""
    layers: Mapping[LayerPath, int]
    """The groups of routed experts, in model order -> how many there are. All of them are in the shards."""
    shards: tuple[Shard, ...]
    position: Any = None
    """Where the data goes on, as whoever reads the data wrote it: anything that JSON can say."""
    rng: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """States of random number generators [bytes] uint8, by name."""
    parts: ExpertParts = field(default_factory=ExpertParts)
    """How the experts in the shards are cut."""
    gate: GateChoice | None = None
    """What was in the place of the model's routers; None for these."""

    def to_json(self) -> bytes:
        """Raises: `InvalidRequest`: `position` is nothing that JSON can say."""
        tree: dict[str, Any] = {
            "version": VERSIONS[-1] if self.gate is not None else VERSIONS[self.parts.number > 1],
            "run_id": self.stamp.run_id,
            "step": self.stamp.step,
            "model": self.stamp.model,
            "fingerprint": self.fingerprint,
            "layers": dict(self.layers),
            "position": self.position,
            "rng": {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in self.rng.items()},
            "files": [
                {"file": shard.file, "bytes": shard.num_bytes, "sha256": shard.sha256, "experts": dict(shard.experts)}
                for shard in self.shards
            ],
        }
        if self.parts.number > 1:
            tree["parts"] = {"number": self.parts.number, "axes": {p: dict(a) for p, a in self.parts.axes.items()}}
        if self.gate is not None:
            tree["gate"] = {"name": self.gate.name, "options": dict(self.gate.options)}
        try:
            return json.dumps({**tree, "checksum": _checksum(tree)}, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the data's position is {self.position!r}, which JSON cannot hold ({error}); give numbers, texts, "
                "lists and dictionaries with texts as keys"
            ) from error

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Raises: `InvalidCheckpoint`: it is damaged, or of a later version; `where` is said to be at fault."""
        try:
            tree = json.loads(text)
            version = tree.pop("version")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidCheckpoint(f"{where} is damaged ({error!r}). {_ADVICE}") from error
        if version not in VERSIONS:
            raise InvalidCheckpoint(
                f"{where} is of format version {version!r}; this program reads versions up to {VERSIONS[-1]}. Update "
                "ray-moe."
            )
        try:
            if tree.pop("checksum") != _checksum({"version": version, **tree}):
                raise ValueError("its checksum is not that of its content")
            return cls(
                stamp=Stamp(tree["run_id"], tree["step"], tree["model"]),
                fingerprint=tree["fingerprint"],
                layers=tree["layers"],
                position=tree["position"],
                rng={name: _tensor(state) for name, state in tree["rng"].items()},
                shards=tuple(_shard(entry) for entry in tree["files"]),
                parts=_parts(tree["parts"]) if "parts" in tree else ExpertParts(),
                gate=GateChoice(tree["gate"]["name"], dict(tree["gate"]["options"])) if "gate" in tree else None,
            )
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            raise InvalidCheckpoint(f"{where} is damaged ({error!r}). {_ADVICE}") from error


_ADVICE = "Take another checkpoint."


def fingerprint(config: Mapping[str, Any]) -> str:
    """Tells apart models whose parameters do not fit each other, from the content of their ``config.json``."""
    told = {name: value for name, value in config.items() if name not in _PLACE_BLIND}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def is_file_name(name: str) -> bool:
    """Whether it can be the name of a file of a checkpoint; none of them leads out of the folder."""
    return _FILE.fullmatch(name) is not None


def _checksum(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _tensor(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(state, validate=True)), dtype=torch.uint8)


def _parts(entry: Mapping[str, Any]) -> ExpertParts:
    axes = {path: {name: Axis(*axis) for name, axis in each.items()} for path, each in entry["axes"].items()}
    return ExpertParts(entry["number"], axes)


def _shard(entry: Mapping[str, Any]) -> Shard:
    if not is_file_name(entry["file"]):
        raise ValueError(f"{entry['file']!r} is no name of a file of a checkpoint")
    experts = {path: tuple(ids) for path, ids in entry["experts"].items()}
    return Shard(entry["file"], entry["bytes"], entry["sha256"], experts)
