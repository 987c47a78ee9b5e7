"""The files of a checkpoint: found, checked against each other, read lazily.

Reads only configuration files and safetensors headers until a tensor is asked for, so opening hundreds of gigabytes
takes moments. Knows nothing of model code: `models/huggingface.py` gives the tensors their meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ray_moe.errors import InvalidCheckpoint, NotFound

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# Other layouts of the same weights that some repositories carry along.
_OTHER_LAYOUTS = ["*/*", "consolidated*"]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    file: str
    dtype: str
    """safetensors' name: ``F32``, ``BF16``, ``F8_E4M3`` ..."""
    shape: tuple[int, ...]


class CheckpointFiles:
    """The folder of a checkpoint: its configuration at once, its tensors when they are first asked for."""

    def __init__(self, folder: Path, hub_name: str | None = None) -> None:
        """For `open`. With `hub_name`, the folder's weights are still to be downloaded."""
        self.folder = folder
        self.config = read_json(folder / CONFIG, "Name the folder that save_pretrained() wrote.")
        """`config.json` as it is."""
        self._hub_name = hub_name

    @classmethod
    def open(cls, model: str | Path) -> CheckpointFiles:
        """Find the checkpoint `model`: a directory, or a name on the Hugging Face hub.

        Raises:
            NotFound: there is no such directory, and no such name on the hub or in its local cache.
            InvalidCheckpoint: its configuration is missing or damaged.
        """
        path = Path(model).expanduser()
        if path.is_dir():
            return cls(path.resolve())
        if path.exists():
            raise InvalidCheckpoint(f"{path} is a file. Name the folder that holds it, with its {CONFIG}.")
        if isinstance(model, Path) or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise NotFound(f"there is no directory {path}. Name a checkpoint's folder, or a model of the hub.")
        return cls(_download(model, _SMALL_FILES), model)

    @cached_property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """Every tensor of the checkpoint, by its name on disk; asking for it fetches and checks the weight files.

        Raises:
            InvalidCheckpoint: a file is missing, damaged, or not what the index says; the message names it.
        """
        if self._hub_name is not None:
            # A snapshot's folder is named after its commit: configuration and weights are of one version.
            _download(self._hub_name, [*_SMALL_FILES, "*.safetensors"], revision=self.folder.name)
        return read_headers(self.folder)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Lazy access to the tensors; the files are closed at the end."""
        reader = Reader(self)
        try:
            yield reader
        except (OSError, SafetensorError) as error:
            raise InvalidCheckpoint(f"{self.folder} could not be read: {error}") from error
        finally:
            reader.close()


class Reader:
    """Open safetensors files, mapped into memory: what is read is a view of the file until it is copied."""

    def __init__(self, files: CheckpointFiles) -> None:
        self._files = files
        self._open: dict[str, Any] = {}

    def slice(self, name: str) -> Any:
        """A lazy tensor: ``[...]`` reads all of it, ``[a:b]`` only those rows."""
        file = self._files.tensors[name].file
        if file not in self._open:
            self._open[file] = safe_open(self._files.folder / file, framework="pt", device="cpu", backend="mmap")
        return self._open[file].get_slice(name)

    def close(self) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the weights in `folder`, by its name on disk. Raises: as `CheckpointFiles.tensors`."""
    index = _read_index(folder)
    tensors: dict[str, TensorHeader] = {}
    for file in sorted(set(index.values())) if index else [SINGLE]:
        held = read_header(folder / file)
        tensors.update({name: header for name, header in held.items() if index.get(name, file) == file})
    _check_index(folder, index, tensors)
    return tensors


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file, or `InvalidCheckpoint` with `advice` when it is absent or is not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path.parent} is not a checkpoint: it has no {path.name}. {advice}") from None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path} is not readable JSON ({error}). Fetch or write it again.") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{path} should hold a JSON object, not a {type(value).__name__}. Write it again.")
    return value


def _download(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """The local snapshot of a model of the hub, with the files that match `patterns`."""
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_LAYOUTS)
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise NotFound(
            f"{name!r} is neither a directory nor a model that could be had from the Hugging Face hub "
            f"({' '.join(str(error).split())[:300]}). Check the name, the network, and the access token (HF_TOKEN)."
        ) from error
    return Path(folder)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file; empty when all of the weights are in one file."""
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise InvalidCheckpoint(
                f"{folder} has its weights as pickle files ({', '.join(pickled[:3])}); only safetensors are loaded. "
                "Convert them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), "
                "and copy the tokenizer's files."
            )
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        found = f" It has {', '.join(others[:3])}, which transformers does not load by itself." if others else ""
        raise InvalidCheckpoint(
            f"{folder} has no weights: expected {SINGLE}, or {INDEX} and its files.{found} "
            "Fetch the checkpoint again, or write it with save_pretrained(), which writes safetensors."
        )
    index = read_json(folder / INDEX, "Fetch it again.").get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise InvalidCheckpoint(f"{folder / INDEX} has no weight_map from tensor names to files. Fetch it again.")
    missing = sorted(file for file in set(index.values()) if not (folder / file).is_file())
    if missing:
        raise InvalidCheckpoint(
            f"{folder} lacks {len(missing)} of the files that {INDEX} names: {_few(missing)}. Fetch them again."
        )
    return index


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, after checking that the file is as long as its header says."""
    actual_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InvalidCheckpoint(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull`.")
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > min(_MAX_HEADER_BYTES, actual_bytes - 8):
            raise InvalidCheckpoint(f"{path} ({actual_bytes} bytes) is not a whole safetensors file. Fetch it again.")
        header = file.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {
            name: TensorHeader(path.name, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()
        }
        expected_bytes = 8 + header_bytes + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if actual_bytes != expected_bytes:
            fault = "truncated" if actual_bytes < expected_bytes else "too long"
            raise InvalidCheckpoint(
                f"{path} is {fault}: its header tells of {expected_bytes} bytes, the file has {actual_bytes}. "
                "Fetch it again."
            )
        # The library's own check: every tensor as long as its shape and dtype say, none over another.
        with safe_open(path, framework="pt"):
            return tensors
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, SafetensorError) as error:
        raise InvalidCheckpoint(f"{path} has a damaged safetensors header ({error}). Fetch it again.") from error


def _check_index(folder: Path, index: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> None:
    absent = sorted(index.keys() - tensors.keys())
    if absent:
        raise InvalidCheckpoint(
            f"{folder / INDEX} and the files disagree: {len(absent)} tensors are not in the file the index names for "
            f"them: {_few([f'{name} ({index[name]})' for name in absent])}. Fetch index and files of one version."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
