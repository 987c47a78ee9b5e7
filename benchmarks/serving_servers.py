"""The servers that `benchmarks/serving.py` compares, as processes of their own that can be stopped while others run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.processes import cpu_s, free_port

START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 30.0
REPOSITORY = Path(__file__).parents[1]
WAIT_POLICY = os.environ.get("OMP_WAIT_POLICY", "passive")
"""How threads wait for their next work: on cores that are shared, spinning ones hold up those that have work."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server to compare."""

    name: str
    model: Path
    """The checkpoint, and what clients call the model."""
    command: tuple[str, ...]
    """``{port}`` in it is the port to listen on."""
    num_threads: int
    """That each of its processes computes with."""
    can_be_suspended: bool = True
    """Whether it may be stopped (SIGSTOP) while others are measured; processes that watch each other may not."""


def ray_moe(name: str, model: Path, num_actors: int, num_threads: int, extra: Sequence[str]) -> Contestant:
    """`ray-moe serve` with a Ray of its own, all its processes of `num_threads`, and `extra` settings (KEY=VALUE).

    All may use all cores: a router waits while its experts are computed, and of two actors one is done sooner.
    """
    settings = {
        "model_name": model,
        "server.http_port": "{port}",
        "router.num_threads": num_threads,
        "experts.num_threads": num_threads,
        "ray.num_cpus": num_actors + 1,
        "ray.auth": "disabled",
    }
    chosen = [*(f"{key}={value}" for key, value in settings.items()), *extra]
    options = [part for setting in chosen for part in ("--set", setting)]
    serve = (sys.executable, "-m", "ray_moe.cli.main", "serve", str(model), "--port", "0")
    return Contestant(name, model, (*serve, "--actors", str(num_actors), *options), 1, can_be_suspended=False)


def one_process(name: str, model: Path, num_threads: int) -> Contestant:
    """The engine of `benchmarks/one_process.py`."""
    script = str(REPOSITORY / "benchmarks" / "one_process.py")
    command = (sys.executable, script, str(model), "--port", "{port}", "--threads", str(num_threads))
    return Contestant(name, model, command, num_threads)


def transformers_serve(name: str, model: Path, python: str, num_threads: int, options: Sequence[str]) -> Contestant:
    """`transformers serve` of the environment that `python` belongs to."""
    start = "from transformers.cli.transformers import main; main()"
    serve = (python, "-c", start, "serve", str(model), "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu")
    return Contestant(name, model, (*serve, *options), num_threads)


class Server:
    """A contestant that runs."""

    def __init__(self, contestant: Contestant, port: int, process: subprocess.Popen[bytes]) -> None:
        self.name, self.model = contestant.name, str(contestant.model)
        self.url = f"http://127.0.0.1:{port}"
        self._process = process
        self._can_be_suspended = contestant.can_be_suspended

    def suspend(self) -> None:
        """Nothing of it runs until `resume`, if that can be."""
        if self._can_be_suspended:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._can_be_suspended:
            self._process.send_signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU seconds of all its processes since their start."""
        return cpu_s(self._process.pid)


@contextmanager
def running(contestant: Contestant, log: Path) -> Iterator[Server]:
    """The server, ready to answer; what it writes goes to `log`. Raises RuntimeError when it does not start."""
    port = free_port()
    environment = {**os.environ, **_environment(contestant.num_threads)}
    command = [part.replace("{port}", str(port)) for part in contestant.command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=REPOSITORY,
        )
    server = Server(contestant, port, process)
    try:
        _await_health(server, process, log)
        yield server
    finally:
        server.resume()
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(num_threads: int) -> Mapping[str, str]:
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": WAIT_POLICY,
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
    }


def _await_health(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"{server.url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > give_up_s:
            ended = "does not answer" if process.poll() is None else f"ended with code {process.returncode}"
            raise RuntimeError(f"{server.name} {ended}:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
