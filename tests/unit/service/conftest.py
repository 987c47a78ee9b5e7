"""What a process of the service writes to its log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from ray_moe.actors import logs
from ray_moe.config import LogsConfig


class Log:
    """What a process writes."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    def configure(self, actor: str = "router-0", **settings: Any) -> None:
        logs.configure(LogsConfig.model_validate(settings), actor, self.stream)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["message"] == "request"]


@pytest.fixture
def log() -> Iterator[Log]:
    root, ours = logging.getLogger(), logging.getLogger("ray_moe")
    before = root.handlers[:], root.level, ours.level
    log = Log()
    log.configure(format="json")
    yield log
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])
