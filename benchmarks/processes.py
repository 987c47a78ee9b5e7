"""Contestants that are processes of their own: asked by lines of JSON, they take turns and otherwise wait.

A process says ``{"ready": true}`` once, and then answers each line of its standard input with one of its standard
output, until that is closed. Used by `train_step.py` and `layer.py`; needs neither Ray nor torch.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

END_TIMEOUT_S = 30.0


@dataclass
class Processes:
    """A contestant of one or more processes."""

    name: str
    about: str
    commands: Sequence[Sequence[str]]
    log: Path
    """What they write besides answers."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Changes to that of this process."""
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> None:
        """Returns when all are ready."""
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **self.environment}
        with self.log.open("w") as log:
            for command in self.commands:
                self._processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
                    )
                )
        self._answers()

    def ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The answer of every process. Raises SystemExit, with the end of the log, if one of them has ended."""
        for process in self._processes:
            try:
                _pipe(process.stdin).write(json.dumps(request) + "\n")
                _pipe(process.stdin).flush()
            except BrokenPipeError:
                pass  # it has ended, which its answer says
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        lines = [_pipe(process.stdout).readline() for process in self._processes]
        if not all(lines):
            raise SystemExit(f"{self.name} has ended:\n{self.log.read_text()[-3000:]}")
        return [json.loads(line) for line in lines]

    def cpu_s(self) -> float:
        """CPU seconds of all its processes, and of theirs, since their start."""
        return sum(cpu_s(process.pid) for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            _pipe(process.stdin).close()
        for process in self._processes:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _pipe(process.stdout).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, and of those that it has started, since their start."""
    total = 0.0
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
