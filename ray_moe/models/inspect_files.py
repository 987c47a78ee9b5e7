"""What somebody named, found: a folder, a single file, or a model of the hub; its configuration and its headers.

Of a model on the hub only the small files are fetched. Called by `models/inspect.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_moe.errors import InvalidCheckpoint, NotFound
from ray_moe.models.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    CheckpointFiles,
    TensorHeader,
    read_header,
    read_headers,
    read_json,
)
from ray_moe.models.gguf import GGUFHeader, GGUFTensor
from ray_moe.models.gguf import read_header as read_gguf

_MAX_CONFIG_BYTES = 64 * 2**20


@dataclass(slots=True)
class Files:
    """What there is of a model."""

    name: str
    folder: Path | None = None
    config: dict[str, Any] | None = None
    config_path: Path = Path()
    tensors: dict[str, TensorHeader] | None = None
    """By name on disk, where there are safetensors."""
    index: dict[str, Any] | None = None
    """The index, where its files are not there."""
    gguf: GGUFHeader | None = None
    gguf_bytes: int = 0

    @property
    def has_safetensors(self) -> bool:
        return self.tensors is not None

    @property
    def gguf_words(self) -> Mapping[str, Any]:
        """GGUF's metadata, as a configuration."""
        return {} if self.gguf is None else self.gguf.metadata


def open_files(model: str | Path) -> Files:
    """Find it.

    Raises:
        NotFound: there is no such file, folder or model.
        InvalidCheckpoint: a file is damaged, or is of no kind that is known.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path.resolve(), str(model))
    if path.is_file():
        return _file(path.resolve(), str(model))
    text = str(model)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in _SUFFIXES:
        raise NotFound(
            f"there is no file or directory {path}. Name a checkpoint's folder or file, or a model of the hub."
        )
    hub = CheckpointFiles.open(text)
    files = Files(text, config=hub.config, config_path=hub.folder)
    if (hub.folder / INDEX).is_file():
        files.index = read_json(hub.folder / INDEX, "Fetch it again.")
    return files


_SUFFIXES = (".json", ".safetensors", ".gguf", ".bin", ".pt", ".pth")


def _folder(folder: Path, name: str) -> Files:
    files = Files(name, folder)
    if (folder / CONFIG).is_file():
        files.config, files.config_path = read_json(folder / CONFIG, "Fetch it again."), folder
    ggufs = sorted(folder.glob("*.gguf"))
    others = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE).is_file():
        files.tensors = read_headers(folder)
    elif (folder / INDEX).is_file():
        files.index = read_json(folder / INDEX, "Fetch it again.")
        if others:
            files.tensors = read_headers(folder)
    elif others:
        files.tensors = {name: header for file in others for name, header in read_header(file).items()}
    elif ggufs:
        _add_gguf(files, ggufs)
    if files.config is None and files.tensors is None and files.index is None and files.gguf is None:
        found = ", ".join(sorted(each.name for each in folder.iterdir())[:3])
        raise InvalidCheckpoint(
            f"{folder} is no model: it has neither {CONFIG} nor safetensors or GGUF files"
            f"{f' (it has {found})' if found else ' (it is empty)'}. Name the folder that save_pretrained() wrote."
        )
    return files


def _file(path: Path, name: str) -> Files:
    if path.suffix == ".gguf":
        files = Files(name)
        _add_gguf(files, [path])
        return files
    if path.suffix == ".safetensors":
        return Files(name, tensors=read_header(path))
    if path.suffix == ".json":
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InvalidCheckpoint(f"{path} is too large for a configuration. Name a {CONFIG}.")
        tree = read_json(path, "Fetch it again.")
        if "weight_map" in tree:
            return Files(name, index=tree)
        return Files(name, config=tree, config_path=path)
    raise InvalidCheckpoint(
        f"{path} is no file that tells what a model is. Name a {CONFIG}, a safetensors or GGUF file, or a folder."
    )


def _add_gguf(files: Files, paths: list[Path]) -> None:
    headers = [read_gguf(path) for path in paths]
    tensors: dict[str, GGUFTensor] = {}
    for header in headers:
        tensors.update(header.tensors)
    files.gguf = GGUFHeader(headers[0].metadata, tensors)
    files.gguf_bytes = sum(path.stat().st_size for path in paths)
