"""Writing files that are whole or not there: safetensors files tensor by tensor, and folders that appear at once.

Called by `models/export.py` and `training/checkpoints.py`. Whatever the disk refuses becomes an error that says what to
do about it (`refusal`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ray_moe.errors import InsufficientResources, InvalidConfig, InvalidRequest, RayMoEError
from ray_moe.models.lazy import TORCH_DTYPES

PARTIAL = ".partial-"
"""In the name of a folder that is still being written; the name it is going to have is before it."""

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        nbytes = self.dtype.itemsize
        for size in self.shape:
            nbytes *= size
        return nbytes


class TensorFile:
    """A new safetensors file whose tensors are known, and come one by one, in any order.

    Unlike `safetensors.torch.save_file`, it holds no more than one of them in memory.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        """Raises: `InsufficientResources`, `InvalidConfig`: it cannot be written; so do all methods."""
        self._path = path
        self._specs = specs
        self._missing = set(specs)
        header, self._offsets, self.num_bytes = _layout(specs, metadata)
        with refusal(path):
            self._file = path.open("xb")
        try:
            with refusal(path):
                self._file.write(header)
                self._file.flush()
        except BaseException:
            self.abandon()
            raise

    def put(self, name: str, tensor: torch.Tensor) -> int:
        """Write one tensor, in the dtype it is announced with; returns its bytes.

        Raises:
            InvalidRequest: it has another shape than announced, or was not announced.
        """
        spec = self._specs.get(name)
        if spec is None or tuple(tensor.shape) != spec.shape:
            expected = f"shape {spec.shape}" if spec else f"one of {len(self._specs)} others"
            raise InvalidRequest(
                f"{name} of shape {tuple(tensor.shape)} was given for {self._path.name}, not {expected}"
            )
        data = tensor.detach().to("cpu", spec.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        with refusal(self._path):
            self._file.seek(self._offsets[name])
            self._file.write(data.data)
        self._missing.discard(name)
        return spec.nbytes

    @property
    def is_complete(self) -> bool:
        return not self._missing

    def close(self) -> None:
        """Make sure that it is on the disk.

        Raises:
            InvalidRequest: not all of its tensors were given.
        """
        try:
            if self._missing:
                few = sorted(self._missing)[:3]
                raise InvalidRequest(f"{self._path.name} lacks {len(self._missing)} tensors: {few}")
            with refusal(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close it as it is."""
        with suppress(OSError):  # what is buffered may not be writable either
            self._file.close()


def _layout(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file, where each tensor's bytes begin in the file, and its length."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    # Wide dtypes first, so that every tensor is aligned when the file is mapped.
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[name] = end
        end += spec.nbytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (starts[name], end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def write_file(path: Path, data: bytes) -> None:
    """A new small file, on the disk when it returns."""
    with refusal(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def refusal(path: Path) -> Iterator[None]:
    """Around writing to `path`: what the operating system refuses becomes an error that says what to do.

    Raises:
        InsufficientResources: the disk or the quota is full.
        InvalidConfig: anything else is in the way (permissions, a read-only disk ...).
    """
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> RayMoEError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(path.parent).free} bytes are free"
        return InsufficientResources(f"there is no room for {path} ({reason}{free}). Make room, or write elsewhere.")
    return InvalidConfig(f"cannot write {path}: {reason}. Name a folder that this process may write.")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises: `InsufficientResources` when the disk of `folder` has less than `num_bytes` free."""
    with refusal(folder):
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InsufficientResources(
            f"{num_bytes} bytes are to be written to {folder}, where {free} are free. Make room, or write elsewhere."
        )


class NewFolder:
    """A folder to write into, which takes its name, at once, when it is committed.

    A folder that had the name before is whole until then, and gone afterwards. Aborted, nothing is left but what was
    there before; what a process that was killed has left is removed by the next one. As a context manager it commits,
    or aborts after an error.
    """

    def __init__(self, folder: Path) -> None:
        """Make it, beside `folder`.

        Raises:
            InsufficientResources, InvalidConfig: it cannot be written.
        """
        number = uuid.uuid4().hex[:12]
        self._folder = folder
        self._stack = ExitStack()
        self.path = folder.with_name(f".{folder.name}{PARTIAL}{number}")
        """Where to write."""
        with ExitStack() as stack, refusal(self.path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder.parent, glob.escape(folder.name))
            # Locked before it has the name under which others would take it for abandoned.
            begun = folder.with_name(f".{folder.name}.new-{number}")
            begun.mkdir()
            _lock(begun, stack)
            begun.rename(self.path)
            self._stack = stack.pop_all()

    def commit(self) -> None:
        """Raises: `InsufficientResources`, `InvalidConfig`: it cannot be written; then it is aborted."""
        try:
            with refusal(self._folder):
                put_in_place(self.path, self._folder)
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove it, if it has not been committed. Whoever is still writing there by its name fails."""
        gone = self.path.with_name(f"{self.path.name}-removed")
        with suppress(OSError):  # not there: it has been committed, and nothing had the name before
            self.path.rename(gone)  # or a file made meanwhile would keep the folder
            shutil.rmtree(gone, ignore_errors=True)
        self._stack.close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


def remove_abandoned(parent: Path, names: str) -> None:
    """Remove what processes that are no longer there have begun to write in `parent` under `names`, a glob."""
    for partial in parent.glob(f".{names}{PARTIAL}*"):
        with ExitStack() as stack:
            if _lock(partial, stack):
                shutil.rmtree(partial, ignore_errors=True)


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Whether this process has locked the folder, until the stack ends; False also where nothing can be locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a finished folder its name; what had it gets the other one. Both names are on the disk when it returns."""
    sync_folder(partial)
    if not folder.exists():
        partial.rename(folder)
    elif not _exchange(partial, folder):
        aside = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:12]}")
        folder.rename(aside)
        try:
            partial.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        aside.rename(partial)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make sure that the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step, so that the name is there at every moment; False where Linux cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0
