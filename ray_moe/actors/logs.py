"""Log lines of a service's processes: which are written, how they look, and what they say of the request.

`configure` is called once in every process of a service. Knows nothing of front doors: whoever answers a request puts
what its lines should have into `fields`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, TextIO

from ray_moe.config import LogsConfig

fields: ContextVar[Mapping[str, object]] = ContextVar("fields", default={})  # noqa: B039 -- nobody changes it
"""What every line has that is written by this task: ``request_id``, ``caller``, ``trace_id``."""

_encode = json.JSONEncoder(default=str).encode

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(config: LogsConfig, actor: str, stream: TextIO | None = None) -> None:
    """Write all log lines of this process to standard error (or `stream`), in place of what was set before.

    Args:
        config: of the service.
        actor: whose process it is: ``router``, ``expert-3``, ``controller``, ``launcher``, ``driver``.
        stream: where to.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_add_fields)
    handler.setFormatter((JsonFormatter if config.format == "json" else TextFormatter)(actor))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("ray_moe").setLevel(config.level.upper())


def _add_fields(record: logging.LogRecord) -> bool:
    """What the line itself says counts more than what the request says."""
    for name, value in fields.get().items():
        record.__dict__.setdefault(name, value)
    return True


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What it has beyond its message; names that begin with '_' are those of libraries (Ray's, for one)."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and name[0] != "_"}


def _time(record: logging.LogRecord) -> str:
    """UTC, in milliseconds, as of ISO 8601."""
    return (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.created * 1000) % 1000:03d}Z"
    )


class JsonFormatter(logging.Formatter):
    """One object for each line."""

    def __init__(self, actor: str) -> None:
        super().__init__()
        self._actor = actor

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "actor": self._actor,
            "pid": os.getpid(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode({**line, **_extra(record), **line})  # in this order, whatever the extra ones are called


class TextFormatter(logging.Formatter):
    """For people: what the request says, and other fields, stand behind the message as NAME=VALUE."""

    def __init__(self, actor: str) -> None:
        super().__init__()
        self._actor = actor

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {name}={_plain(value)}" for name, value in _extra(record).items())
        where = f"{_time(record)} {record.levelname:<7} {self._actor} {record.name}"
        line = f"{where}: {_printable(record.getMessage())}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and text and " " not in text else json.dumps(text)


def _printable(message: str) -> str:
    """A message stays on its line, so that nobody who has a say in it can write lines of their own."""
    return message if message.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
