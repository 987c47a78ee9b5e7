"""Tensors that are in files, and in memory only while somebody is at them: what `offload: disk` keeps things in.

A file has no name from the beginning: it ends with the last mapping of it, so that nothing stays behind, whatever ends
the process. Room on the disk is taken when a tensor is made; writing to it later cannot fail for want of room. Called
by `Optimizer` and `Snapshots`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from ray_moe.errors import InvalidConfig
from ray_moe.models.writing import refusal
from ray_moe.ops.experts import ExpertArrays, pack, unpack
from ray_moe.ops.optimizers import OptimizerSettings

SMALLEST_BYTES = 2**14
"""A smaller tensor stays in memory: it would not fill the pages it takes, and a process has some 65,000 mappings."""

NO_DISKS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""File systems that are in memory themselves."""


class DiskShelf:
    """Makes tensors in files of one folder, and has memory let go of them. Thread-safe."""

    def __init__(self, folder: str | Path = "") -> None:
        """
        Args:
            folder: made when it is not there; empty is the system's folder for temporary files, or ``/var/tmp`` where
                that one is in memory.

        Raises: `InvalidConfig` for a folder that is in memory, or that cannot be written.
        """
        self.folder = Path(folder or _default())
        with refusal(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if (kind := _file_system(self.folder)) in NO_DISKS:
            raise InvalidConfig(
                f"{self.folder} is a {kind}, which is in memory itself: name a folder on a disk "
                "(train.optimizer.offload_folder), or set train.optimizer.offload to cpu"
            )

    def takes(self, num_bytes: int) -> bool:
        return num_bytes >= SMALLEST_BYTES

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros like it, contiguous. Raises: `InsufficientResources` when the disk or the quota is full."""
        with refusal(self.folder / "offloaded"), tempfile.TemporaryFile(dir=self.folder) as file:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            name = f"/proc/self/fd/{file.fileno()}"
            flat = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return flat.view(tensor.shape)

    def let_go(self, tensors: Iterable[torch.Tensor]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # Of a shared mapping only the process's pages go: what was written is the file's.
            if libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(len(storage)), mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise")

    def put(self, arrays: ExpertArrays) -> ExpertArrays:
        """The same arrays, in files where that is worth it. Raises: as `empty_like`."""
        tensors = unpack(arrays)
        shelved = {name: self.empty_like(t).copy_(t) for name, t in tensors.items() if self.takes(t.nbytes)}
        self.let_go(shelved.values())
        return pack(tensors | shelved)


def shelf_for(settings: OptimizerSettings) -> DiskShelf | None:
    """Where an optimizer of these settings keeps what it keeps. Raises: as `DiskShelf`."""
    return DiskShelf(settings.offload_folder) if settings.offload == "disk" else None


def _default() -> str:
    folder = tempfile.gettempdir()
    return "/var/tmp" if _file_system(Path(folder)) in NO_DISKS and os.path.isdir("/var/tmp") else folder


def _file_system(folder: Path) -> str:
    """Its kind, as the system calls it; empty when it cannot be told."""
    resolved = folder.resolve()
    kinds = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((kinds[str(above)] for above in (resolved, *resolved.parents) if str(above) in kinds), "")
