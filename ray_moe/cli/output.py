"""Numbers of a run in a file, for programs and for `ray-moe report`: `--json FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ray_moe.errors import InvalidConfig

STDOUT = Path("-")


def write_json(file: Path, value: Any) -> None:
    """All at once; ``-`` is standard output. Raises: `InvalidConfig`."""
    text = json.dumps(value, indent=2) + "\n"
    if file == STDOUT:
        sys.stdout.write(text)
        return
    write_text(file, text)


def write_text(file: Path, text: str) -> None:
    """Raises: `InvalidConfig`."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"cannot write {file}: {error.strerror}") from error


class JsonLines:
    """A line for each value, at once: what was written outlives a process that is killed. Appends, as a run goes on."""

    def __init__(self, file: Path) -> None:
        try:
            self._stream = file.open("a", encoding="utf-8")
        except OSError as error:
            raise InvalidConfig(f"cannot write {file}: {error.strerror}") from error

    def write(self, value: Any) -> None:
        self._stream.write(json.dumps(value) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()
