"""The header of a GGUF file: metadata, and the names, shapes and types of its tensors. No weight is read.

After the format's own description (ggml/docs/gguf.md): versions 2 and 3, little-endian; a reader of headers is shorter
than a dependency. A list is read as far as it has numbers, of a list of texts (the vocabulary) only its length is kept.
Called by `models/inspect.py`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ray_moe.errors import InvalidCheckpoint

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_COUNT = 2**24
"""Tensors, entries or letters that no real header exceeds: a damaged one is refused before memory is asked for."""
_MAX_LIST = 2**26

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9

_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""Type of a tensor -> (numbers, bytes) of one of its blocks (ggml.h)."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    shape: tuple[int, ...]
    """In `torch`'s order, the outermost dimension first."""
    num_bytes: int | None
    """None for a type that is not known here."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        """The value of ``ARCHITECTURE.key``; None where there is none."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_header(path: Path) -> GGUFHeader:
    """Read it.

    Raises:
        InvalidCheckpoint: it is no GGUF file, or a damaged one, or of a version that is not known.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise InvalidCheckpoint(f"{path} has a damaged or truncated GGUF header ({error}). Fetch it again.") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{path} could not be read: {error.strerror}.") from error


def _read(path: Path, file: BinaryIO) -> GGUFHeader:
    if file.read(4) != MAGIC:
        raise InvalidCheckpoint(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}. Fetch it again.")
    (version,) = _unpack(file, "I")
    if version not in _VERSIONS:
        raise InvalidCheckpoint(f"{path} has GGUF version {version}; versions 2 and 3 (little-endian) are read.")
    num_tensors, num_entries = _unpack(file, "QQ")
    if max(num_tensors, num_entries) > _MAX_COUNT:
        raise struct.error(f"{num_tensors} tensors, {num_entries} entries")
    metadata = {}
    for _ in range(num_entries):
        key = _text(file)
        metadata[key] = _value(file, *_unpack(file, "I"))
    tensors = {}
    for _ in range(num_tensors):
        name = _text(file)
        (num_dims,) = _unpack(file, "I")
        if num_dims > 8:
            raise struct.error(f"{name} has {num_dims} dimensions")
        shape = tuple(reversed(_unpack(file, "Q" * num_dims)))
        kind, _offset = _unpack(file, "IQ")
        block = _BLOCKS.get(kind)
        num_bytes = None if block is None else -(-math.prod(shape) // block[0]) * block[1]
        tensors[name] = GGUFTensor(shape, num_bytes)
    return GGUFHeader(metadata, tensors)


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _SCALARS:
        return _unpack(file, _SCALARS[kind])[0]
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        raise struct.error(f"metadata of type {kind}")
    inner, length = _unpack(file, "IQ")
    if length > _MAX_LIST:
        raise struct.error(f"a list of {length}")
    if inner in _SCALARS:
        return list(_unpack(file, f"{length}{_SCALARS[inner]}"))
    for _ in range(length):
        _value(file, inner)
    return length


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    if length > _MAX_COUNT:
        raise struct.error(f"a text of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise struct.error("the file ends in a text")
    return data.decode()


def _unpack(file: BinaryIO, what: str) -> tuple[Any, ...]:
    layout = struct.Struct(f"<{what}")
    return layout.unpack(file.read(layout.size))
