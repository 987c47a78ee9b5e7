"""Processes for Ray's workers that are forked from one that has imported already what actors import.

An actor that computes takes 6.6 s of a core to start, 5.4 of them for imports, most of it torch and transformers, and
the tests start hundreds. Here these imports are made once, and an actor takes 0.7 s. All else is as ever: each is a
process of its own, with its own environment, that connects to Ray and is killed by signals. Actors start with all their
imports where a Ray of its own is started (`test_serve_command.py`, `test_deploy.py`), and in tests with the fixture
`cold`.

Ray runs this file as a script for each worker, in place of its own ``setup_worker.py``: `ask` hands over what the
process would have been, and ends. `Warm` is what `conftest.py` starts. Must import only what is quickly there.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = "RAY_MOE_TEST_WARM"
"""The variable that says where the warm process listens."""

MODULES = (
    "ray_moe.config",
    "ray_moe.models.huggingface",
    "ray_moe.policy.cluster_state",
    "ray_moe.runtime.engine",
    "ray_moe.runtime.host_loop",
    "ray_moe.training.trainees",
    "ray_moe.training.trainer",
    "ray_moe.transport.host_server",
    "transformers.models.mixtral.modeling_mixtral",
    # What Ray and the front doors import of others.
    "aiohttp",
    "fastapi",
    "grpc.aio",
    "jsonschema",
    "psutil",
    "requests",
    "uvicorn",
    "yaml",
)
"""None may start a thread, which a forked process would not have, nor import Ray: it reads once, when it is imported,
of which job and node a process is."""

MAX_BYTES = 2**20
"""Of what is handed over."""

COLD = ".cold"
"""A file of that suffix beside the socket: nothing is forked while it is there."""

CONTEXT = "--serialized-runtime-env-context="


class Warm:
    """The process that is forked from; it ends with the one that made it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray-moe-warm-")
        self.address = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", self.address],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the warm process did not start"

    @contextmanager
    def cold(self) -> Iterator[None]:
        """What starts in this block starts as Ray starts it."""
        mark = Path(f"{self.address}{COLD}")
        mark.touch()
        try:
            yield
        finally:
            mark.unlink()

    def close(self) -> None:
        """End it. What was forked has an end of its own."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)
        self._folder.cleanup()


# --- The warm process ----------------------------------------------------------------------------------------
def serve(address: str) -> dict[str, Any] | None:
    """Fork for whoever asks. Returns None when standard input ends, and in each process that is forked what it is to
    be."""
    import importlib
    import select

    for module in MODULES:
        importlib.import_module(module)
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > 1 or "ray" in sys.modules:
        raise RuntimeError(f"to fork from: {num_threads} threads instead of one, or Ray imported already")
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in readable:
                return None
            asking, _ = listener.accept()
            with asking:
                message, descriptors, _, _ = socket.recv_fds(asking, MAX_BYTES, 3)
                if os.fork() == 0:
                    for number, descriptor in enumerate(descriptors):
                        os.dup2(descriptor, number)
                        os.close(descriptor)
                    wanted: dict[str, Any] = json.loads(message)
                    return wanted
            for descriptor in descriptors:
                os.close(descriptor)


def become(wanted: dict[str, Any]) -> None:
    """Be the process that was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = wanted["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


# --- Instead of Ray's setup_worker.py ------------------------------------------------------------------------
def ask(arguments: Sequence[str]) -> None:
    """Let the warm process fork, with `arguments` and this process' environment, folder and files."""
    address = os.environ[ADDRESS]
    (context,) = [json.loads(one.removeprefix(CONTEXT)) for one in arguments if one.startswith(CONTEXT)] or [{}]
    variables = context.pop("env_vars", {})
    is_plain = context.pop("py_executable", sys.executable) == sys.executable and not any(context.values())
    if not is_plain or Path(f"{address}{COLD}").exists():
        from ray._private.workers import setup_worker

        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *arguments])
    wanted = {
        "argv": [one for one in arguments if not one.startswith((CONTEXT, "--language="))],
        "environment": {**os.environ, **variables},
        "cwd": os.getcwd(),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as warm:
        warm.connect(address)
        socket.send_fds(warm, [json.dumps(wanted).encode()], [0, 1, 2])
        warm.recv(1)  # its end is the answer


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        wanted = serve(sys.argv[2])
        if wanted is not None:
            become(wanted)
    else:
        ask(sys.argv[1:])
