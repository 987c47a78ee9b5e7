"""One host's part of a checkpoint of training: tensors copied at once, written in a thread.

A shard holds whole experts, as many as fit in `MAX_SHARD_BYTES`, and says which; so there are as many files as the
bytes need, however many experts there are, and any host can read the experts that it needs from whichever shards have
them.
Called by whatever holds experts or the backbone; the coordinator's part is `checkpoints.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ray_moe.errors import InvalidCheckpoint, InvalidRequest, Unavailable
from ray_moe.models.writing import TensorFile, TensorSpec, refusal, sync_folder
from ray_moe.training.manifest import Shard, Stamp, is_file_name
from ray_moe.types import LayerPath

ExpertState = Mapping[str, torch.Tensor]
"""All that is trained of an expert, by name: ``master.gate_up_proj``, ``exp_avg.gate_up_proj``, ``step`` ..."""

EXPERTS = "experts"
"""The folder of the experts' shards in that of the checkpoint."""
MAX_SHARD_BYTES = 2_000_000_000

_WRITER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_BLOCK_BYTES = 1 << 20


def write_experts(
    folder: Path,
    stamp: Stamp,
    writer: str,
    experts: Mapping[tuple[LayerPath, int], ExpertState],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Shard, ...]:
    """Write the experts of one writer into the unfinished checkpoint at `folder`.

    Raises:
        InvalidRequest: `writer` cannot be a part of a file's name.
        Unavailable: the checkpoint has been given up.
        InsufficientResources, InvalidConfig: it cannot be written.
    """
    if not _WRITER.fullmatch(writer):
        raise InvalidRequest(f"a writer is named {writer!r}; expected letters, digits, '-', '_' and '.'")
    shards = []
    for number, part in enumerate(_parts(experts, max_shard_bytes)):
        tensors = {tensor_name(*key, name): tensor for key in part for name, tensor in experts[key].items()}
        held: dict[LayerPath, list[int]] = defaultdict(list)
        for path, expert in sorted(part):
            held[path].append(expert)
        shard = write_tensors(folder, stamp, f"{EXPERTS}/{writer}-{number:05d}.safetensors", tensors)
        shards.append(
            Shard(shard.file, shard.num_bytes, shard.sha256, {path: tuple(ids) for path, ids in held.items()})
        )
    return tuple(shards)


def write_tensors(folder: Path, stamp: Stamp, file: str, tensors: Mapping[str, torch.Tensor]) -> Shard:
    """Write one file into the unfinished checkpoint at `folder`; it is on the disk when this returns.

    Raises: as `write_experts`.
    """
    if not is_file_name(file):
        raise InvalidRequest(f"{file!r} cannot be a file of a checkpoint; expected NAME.safetensors")
    path = folder / file
    if not folder.is_dir():
        raise Unavailable(
            f"{folder} is not there: the checkpoint has been given up, or this machine does not share the disk it is on"
        )
    if path.parent != folder:
        with refusal(path):
            path.parent.mkdir(exist_ok=True)
            sync_folder(folder)
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    new = TensorFile(path, specs, stamp.metadata())
    try:
        for name, tensor in tensors.items():
            new.put(name, tensor)
        new.close()
    finally:
        new.abandon()
    with refusal(path):
        sync_folder(path.parent)
        return Shard(file, new.num_bytes, sha256(path))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tensor_name(layer: LayerPath, expert: int, name: str) -> str:
    """Under which a tensor of an expert is in its shard."""
    return f"{layer}/{expert}/{name}"


def expert_of(tensor: str) -> tuple[LayerPath, int, str]:
    """The opposite of `tensor_name`. Raises: `InvalidCheckpoint`."""
    layer, _, rest = tensor.partition("/")
    expert, _, name = rest.partition("/")
    if not (expert.isdecimal() and name):
        raise InvalidCheckpoint(f"{tensor!r} is no tensor of an expert; expected LAYER/EXPERT/NAME")
    return layer, int(expert), name


def _parts(
    experts: Mapping[tuple[LayerPath, int], ExpertState], max_bytes: int
) -> Iterator[list[tuple[LayerPath, int]]]:
    """The experts in their order, cut where a file would become larger than `max_bytes`."""
    part: list[tuple[LayerPath, int]] = []
    part_bytes = 0
    for key, state in experts.items():
        num_bytes = sum(tensor.nbytes for tensor in state.values())
        if part and part_bytes + num_bytes > max_bytes:
            yield part
            part, part_bytes = [], 0
        part.append(key)
        part_bytes += num_bytes
    if part:
        yield part


class AsyncWriter:
    """Writes one host's parts of checkpoints, one after the other, while training goes on."""

    def __init__(self, name: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._name = name
        self._max_shard_bytes = max_shard_bytes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[tuple[Shard, ...]] | None = None
        self._closed = False

    def save(
        self,
        folder: Path,
        stamp: Stamp,
        experts: Iterable[tuple[tuple[LayerPath, int], ExpertState]],
        files: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Copy the tensors, and have them written into the unfinished checkpoint at `folder`.

        Returns as soon as they are copied. A save before it is waited for first, so there is never more than one copy.

        Args:
            folder: of the `Draft`.
            stamp: of the `Draft`.
            experts: ((layer, expert), state), each copied before the next one is asked for.
            files: what else to write, as file name -> tensors; ``backbone.safetensors`` for one.

        Raises: what went wrong since `save` or `wait` was last called, and then nothing is begun; `Unavailable` when
            closed.
        """
        self.wait()
        if self._closed:
            raise Unavailable("the writer of checkpoints is closed")
        own = {key: _copied(state) for key, state in experts}
        others = {file: _copied(tensors) for file, tensors in (files or {}).items()}
        self._pending = self._pool.submit(self._write, folder, stamp, own, others)

    def wait(self) -> tuple[Shard, ...]:
        """What was written, for `Draft.commit`, once it is on the disk; nothing when nothing was begun.

        Raises: what went wrong since `save` or `wait` was last called.
        """
        pending, self._pending = self._pending, None
        return () if pending is None else pending.result()

    def close(self) -> None:
        """Wait, and end the thread. Raises: as `wait`."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(
        self,
        folder: Path,
        stamp: Stamp,
        experts: Mapping[tuple[LayerPath, int], ExpertState],
        files: Mapping[str, ExpertState],
    ) -> tuple[Shard, ...]:
        written = write_experts(folder, stamp, self._name, experts, self._max_shard_bytes)
        return written + tuple(write_tensors(folder, stamp, file, tensors) for file, tensors in files.items())


def _copied(tensors: ExpertState) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
