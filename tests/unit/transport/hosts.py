"""Hosts in processes of their own, and ways to reach them, for the tests of the streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.connection import StreamConnection
from ray_moe.transport.settings import TransportSettings
from ray_moe.types import HostAddress

ROOT = Path(__file__).parents[3]
TOKEN = "a token"
NODE = "this node"


def python(script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A Python process that finds this repository, with `variables` in its environment."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name(script)), *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@dataclass
class HostProcess:
    """`host_process.py`, running."""

    process: subprocess.Popen[str]
    incarnation: str = "first life"

    @classmethod
    def start(cls, settings: TransportSettings | None = None) -> HostProcess:
        """Start it; it is not ready before `address` was asked for."""
        return cls(
            python("host_process.py", TOKEN, cls.incarnation, json.dumps(asdict(settings)) if settings else "{}")
        )

    @property
    def address(self) -> HostAddress:
        if not hasattr(self, "_address"):
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                assert self.process.stderr is not None
                raise AssertionError(self.process.stderr.read())
            self._address = HostAddress("expert-0", self.incarnation, NODE, **json.loads(line))
        return self._address

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.address.pid, number)

    def stop(self) -> str:
        """Let it end by itself; returns what it had to complain about."""
        _, complaints = self.process.communicate(timeout=30)
        return complaints


def call(layer: str, hidden: torch.Tensor, **others: Any) -> ExpertCall:
    """A call for one expert with as many rows as `token` or `hidden` has."""
    gather, token = others.get("gather"), others.get("token")
    rows = token if token is not None else gather if gather is not None else hidden
    weight, grad = others.get("weight"), others.get("grad")
    return ExpertCall(layer, 1, hidden, gather, token, [0], [len(rows)], weight, grad)


def ask(connection: StreamConnection, layer: str, hidden: torch.Tensor, **others: Any) -> torch.Tensor:
    """Call and wait; the rows are a copy, and what they lay in is released."""
    return rows_of(connection.submit(call(layer, hidden, **others)).result(60))


def rows_of(reply: ExpertReply) -> torch.Tensor:
    rows = reply.rows.clone()
    reply.release()
    return rows


def is_listening(address: HostAddress) -> bool:
    """Whether the abstract socket of this address exists."""
    return f"@{address.unix}" in Path("/proc/net/unix").read_text()
