"""Refusals of options that make no sense, in words that name the option and what it takes."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

from ray_moe.errors import InvalidConfig


def check_range(name: str, value: float, least: float, most: float = math.inf, above: bool = False) -> None:
    """Raises `InvalidConfig` for a value outside of [least, most], or with `above` of (least, most].

    Args: name: of the option, as people write it.
    """
    if math.isfinite(value) and least <= value <= most and not (above and value == least):
        return
    expected = f"more than {least:g}" if above else f"{least:g} or more"
    expected += f", and at most {most:g}" if most < math.inf else ""
    raise InvalidConfig(f"{name} is {value:g}; expected a number that is {expected}")


def check_writable(file: Path) -> None:
    """Before there is anything to lose. Raises: `InvalidConfig` for a file that could not be written."""
    beside = file.with_name(f"{file.name}.part")
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise InvalidConfig(
            f"cannot write {file}: {error.strerror}; name a file in a directory that there is"
        ) from error
