"""Reading a checkpoint of training: checked first, then any experts by any host, whoever wrote them.

Called by whoever takes training up again, and by `export.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ray_moe.errors import InvalidCheckpoint, NotFound
from ray_moe.ops.parts import ExpertParts
from ray_moe.policy.parts import parts_of, whole_of
from ray_moe.training.checkpoints import MANIFEST
from ray_moe.training.manifest import Manifest, Shard, Stamp
from ray_moe.training.shards import EXPERTS, expert_of, sha256
from ray_moe.types import LayerPath

_HASHING_THREADS = 4
_ADVICE = "Take another checkpoint."


@dataclass(frozen=True, slots=True)
class TrainingCheckpoint:
    """A checkpoint of training, to be read by any number of hosts. Made by `open`."""

    folder: Path
    manifest: Manifest
    _home: Mapping[tuple[LayerPath, int], str]
    """The file that each expert, or part of one, is in."""

    @classmethod
    def open(cls, folder: Path, check_hashes: bool = True) -> TrainingCheckpoint:
        """Check the checkpoint at `folder`; read no tensor.

        Args:
            folder: one of `saved`.
            check_hashes: whether to read every file once. One process of many need do it.

        Raises:
            InvalidCheckpoint: it has no manifest, or a file is missing, damaged or of another checkpoint; the message
                names it.
        """
        manifest = _read_manifest(folder)
        missing = [shard.file for shard in manifest.shards if not (folder / shard.file).is_file()]
        if missing:
            raise InvalidCheckpoint(f"{folder} lacks {len(missing)} of its files: {_few(missing)}. {_ADVICE}")
        named = {shard.file for shard in manifest.shards}
        foreign = {f"{EXPERTS}/{path.name}" for path in (folder / EXPERTS).glob("*.safetensors")} - named
        if foreign:
            raise InvalidCheckpoint(
                f"{folder} has files that its manifest does not name: {_few(sorted(foreign))}. They are of another "
                "checkpoint; remove them."
            )
        for shard in manifest.shards:
            _check_header(folder, shard, manifest.stamp)
        home = {(path, i): shard.file for shard in manifest.shards for path, ids in shard.experts.items() for i in ids}
        opened = cls(folder, manifest, home)
        if check_hashes:
            opened.check_hashes()
        return opened

    def check_hashes(self) -> None:
        """Read every file once. Raises: `InvalidCheckpoint`: one is not what was written."""
        shards = self.manifest.shards
        paths = [self.folder / shard.file for shard in shards]
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            for shard, path, found in zip(shards, paths, pool.map(_hash, paths), strict=True):
                if found != shard.sha256:
                    raise InvalidCheckpoint(f"{path} is damaged: its content is not what was written. {_ADVICE}")

    @property
    def files(self) -> list[str]:
        """The files of the backbone."""
        return [shard.file for shard in self.manifest.shards if not shard.experts]

    def read(self, layer: LayerPath, experts: Sequence[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The state of these experts, one after the other, each read when its turn comes, in memory of its own.

        Raises:
            NotFound: there is no such layer or expert.
            InvalidCheckpoint: a file has changed since `open`.
        """
        num_experts = self.manifest.layers.get(layer, 0)
        unknown = [expert for expert in experts if not 0 <= expert < num_experts]
        if unknown:
            layers = ", ".join(f"{path} (0 to {number - 1})" for path, number in self.manifest.layers.items())
            raise NotFound(f"{self.folder} has no experts {unknown[:3]} of {layer!r}. It has: {layers}.")
        parts = self.manifest.parts
        if parts.number == 1:
            return self._read(layer, experts)
        written = self._read(layer, [part for e in experts for part in parts_of(e, num_experts, parts.number)])
        return ((e, parts.join(layer, [state for _, state in islice(written, parts.number)])) for e in experts)

    def read_parts(
        self, layer: LayerPath, wanted: Sequence[int], parts: ExpertParts
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The same of parts of experts that are cut as `parts` says, however those are that were written.

        Raises: as `read`; `InvalidCheckpoint` for what cannot be cut anew.
        """
        num_experts = self.manifest.layers.get(layer, 0)
        if parts.number == self.manifest.parts.number:
            self.read(layer, [whole_of(part, num_experts or 1)[0] for part in wanted])  # are they there?
            return self._read(layer, wanted)
        return self._cut(layer, sorted(wanted, key=lambda part: whole_of(part, num_experts or 1)), parts)

    def _cut(
        self, layer: LayerPath, wanted: Sequence[int], parts: ExpertParts
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for expert, group in groupby(wanted, key=lambda part: whole_of(part, self.manifest.layers[layer])[0]):
            ((_, whole),) = self.read(layer, [expert])
            for part in group:
                yield part, parts.cut(layer, whole, whole_of(part, self.manifest.layers[layer])[1])

    def tensors(self, file: str) -> dict[str, torch.Tensor]:
        """All tensors of a file of the backbone, in memory of their own.

        Raises:
            NotFound: there is no such file.
            InvalidCheckpoint: it has changed since `open`.
        """
        if file not in self.files:
            raise NotFound(f"{self.folder} has no {file}. It has: {', '.join(self.files) or 'experts only'}.")
        with _opened(self.folder / file) as content:
            return {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118

    def _read(self, layer: LayerPath, experts: Sequence[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        with ExitStack() as stack:
            contents: dict[str, Any] = {}
            names: dict[int, list[str]] = defaultdict(list)
            for expert in experts:
                file = self._home[layer, expert]
                if file not in contents:
                    contents[file] = stack.enter_context(_opened(self.folder / file))
                    for name in contents[file].keys():  # noqa: SIM118
                        path, number, _ = expert_of(name)
                        if path == layer:
                            names[number].append(name)
                if not names[expert]:
                    raise InvalidCheckpoint(f"{self.folder / file} lacks expert {expert} of {layer}. {_ADVICE}")
                yield expert, {expert_of(name)[2]: contents[file].get_tensor(name).clone() for name in names[expert]}


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise InvalidCheckpoint(
            f"{folder} is no checkpoint of training: it has no {MANIFEST}. Name a folder step-NNNNNNNN."
        ) from None
    except OSError as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}. {_ADVICE}") from error
    return Manifest.from_json(text, str(path))


def _check_header(folder: Path, shard: Shard, stamp: Stamp) -> None:
    path = folder / shard.file
    with _opened(path) as content:
        stamp.refuse_foreign(str(path), content.metadata())
    if path.stat().st_size != shard.num_bytes:
        raise InvalidCheckpoint(
            f"{path} is damaged: it has {path.stat().st_size} bytes, {shard.num_bytes} were written. {_ADVICE}"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"{path} is damaged: {error}. {_ADVICE}") from error


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}. {_ADVICE}") from error


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
