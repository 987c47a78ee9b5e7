"""What settings are made of: numbers with a range, sizes, files, names of Ray's; and what a section of them is.

Called by `config.py` and `config_train.py`, which are the tree.
"""

from __future__ import annotations

import glob
import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

BYTE_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


# --- Types of settings ---------------------------------------------------------------------------------------
def parse_bytes(value: object) -> object:
    """A size such as `2GiB` as a number of bytes; anything else but text as it is. Raises: ValueError."""
    if not isinstance(value, str) or value.strip().isdecimal():
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", value.strip().lower())
    if match is None or match[2] not in BYTE_UNITS:
        raise ValueError("should be a number of bytes, or a size such as 64KiB, 256MiB or 2GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("should be a whole number, or at most 1: Ray shares out one device, never one and a half")
    return value


def check_address(value: str) -> str:
    if value in ("local", "auto") or re.fullmatch(r"(ray://)?[^\s:/]+:\d{1,5}", value):
        return value
    raise ValueError("should be 'local', 'auto' or the HOST:PORT of a running cluster")


def check_device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return value
    raise ValueError("should be 'auto', 'cpu', 'cuda' or 'cuda:N'")


def _absolute(file: str) -> str:
    """Actors have another working directory than whoever wrote this."""
    return os.path.abspath(os.path.expanduser(file)) if file else ""


def absolute_if_here(name: str) -> str:
    """A file, folder or pattern that there is on this machine as an absolute path, for the same reason; else as it is:
    the name of something on the hub, of a function, or of what only other nodes have."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if glob.glob(path, recursive=True) else name


_RESERVED = {
    "CPU": "set experts.num_cpus",
    "GPU": "set experts.num_gpus",
    "memory": "the service checks memory itself",
    "object_store_memory": "set ray.object_store_bytes",
}


def check_custom_resources(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name in _RESERVED or not name:
            raise ValueError(f"should name custom resources, not {name!r}: {_RESERVED.get(name, 'it is empty')}")
    return resources


def check_endpoint(value: str) -> str:
    if value and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
        raise ValueError("should be the http(s) address of an OTLP collector, such as http://localhost:4318")
    return value


_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"


def check_label_selector(selector: dict[str, str]) -> dict[str, str]:
    """Ray's rules (those of Kubernetes), which Ray itself applies only when an actor is made."""
    for key, wanted in selector.items():
        prefix, _, name = key.rpartition("/")
        parts = prefix.split(".") if "/" in key else []
        if len(prefix) > 253 or not all(re.fullmatch(_LABEL, part) for part in (*parts, name)):
            raise ValueError(
                f"should have labels as keys, not {key!r}: up to 63 letters, digits, '-', '_' and '.', the first and "
                "the last a letter or digit, such as market-type or ray.io/node-group"
            )
        if wanted and not re.fullmatch(rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))", wanted):
            raise ValueError(f"has {wanted!r} for {key}; should be a label's value, !value, in(a,b) or !in(a,b)")
    return selector


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Number = BeforeValidator(_not_bool)
Count = Annotated[int, Field(ge=1), Number]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Number]
Seconds = Annotated[float, Field(gt=0), Number]
Source = Annotated[str, AfterValidator(absolute_if_here)]
File = Annotated[str, AfterValidator(_absolute)]
Devices = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one), Number]


class Section(BaseModel):
    """A part of the tree: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
