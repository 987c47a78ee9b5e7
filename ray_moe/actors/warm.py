"""Processes for actors that are forked from one that has imported already what they import.

An actor that computes takes 6 s of a core to start, five sixths of them for imports, most of it torch and transformers.
Where a service has its actors started by this file (`ray.warm_start`), the first one of a node makes the imports once,
in a process that stays for it, and each takes 0.7 s; what they have imported they share in memory. All else is as ever:
each is a process of its own, with its own environment, that connects to Ray and dies alone: it has a process group of
its own, too, for Ray ends an actor with its group. Not with GPUs: a process in which CUDA may have begun cannot be
forked.

Ray runs it as the Python of a worker (`py_executable`): ``warm.py SCRIPT ARGUMENTS...``. The first becomes the warm
process, has itself forked to be the worker, and ends with the raylet, its parent. Others ask it to fork, and end. Who
starts a Ray here may have one `begin` meanwhile, which ends with the caller. Where all that is not possible a worker
starts with all its imports. Must import only what is there at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

NAME = "ray-moe-warm"
"""What the warm process is called in lists of processes."""

OWNER = "RAY_MOE_WARM_OWNER"
"""The environment variable with the number of the process with which the warm one ends, if that is not the raylet."""

SERVE = "--serve"

READY_S = 120.0
"""For the imports; then a worker starts by itself."""
MAX_BYTES = 2**20
"""Of what is handed over."""
_CREDENTIALS = struct.Struct("iII")


def py_executable() -> str:
    """For the runtime environment of an actor."""
    return f"{shlex.quote(sys.executable)} {shlex.quote(__file__)}"


def address_of(owner: int) -> str:
    """Of the warm process that ends with the process `owner`: an abstract socket, of this user and these processes."""
    return f"\0ray-moe-warm-{os.getuid()}-{os.readlink('/proc/self/ns/pid')}-{owner}"


_begun: list[subprocess.Popen[bytes]] = []


def begin(environment: Mapping[str, str]) -> None:
    """Start a warm process for the Ray that this process is about to start, with `environment` added to its own."""
    end()
    listener = _bound(address_of(os.getpid()))  # here: whoever asks from now on is heard, however slowly it starts
    if listener is None:
        return
    with listener:
        _begun.append(
            subprocess.Popen(
                [sys.executable, __file__, SERVE, str(os.getpid()), str(listener.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )
        )
    os.environ[OWNER] = str(os.getpid())


def end() -> None:
    """End what was begun, if anything was."""
    for process in _begun:
        process.kill()
        process.wait()
        del os.environ[OWNER]
    _begun.clear()


# --- A worker to be ------------------------------------------------------------------------------------------
def request(arguments: Sequence[str], environment: Mapping[str, str]) -> bytes:
    """What asks for a process ``python ARGUMENTS...``."""
    return json.dumps({"arguments": [*arguments], "environment": {**environment}, "folder": os.getcwd()}).encode()


def ask(address: str, wanted: bytes) -> bool:
    """Have the warm process fork the process of a `request`, with this one's files.

    Returns: False when it does not do it.

    Raises: `ConnectionRefusedError` where there is none, or not yet.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as warm:
            warm.settimeout(READY_S)
            warm.connect(address)
            if _user(warm) != os.getuid():  # anybody can take a name; it must not see the environment
                return False
            socket.send_fds(warm, [wanted], [0, 1, 2])
            return warm.recv(1) == b"."
    except ConnectionRefusedError:
        raise
    except OSError:
        return False


def _user(line: socket.socket) -> int:
    credentials: tuple[int, int, int] = _CREDENTIALS.unpack(
        line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return credentials[1]


def become(wanted: bytes) -> None:
    """Be the process of a `request`."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request: dict[str, Any] = json.loads(wanted)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    random.seed()  # or all would draw the same
    importlib.import_module("numpy").random.seed()
    runpy.run_path(sys.argv[0], run_name="__main__")


# --- The warm process ----------------------------------------------------------------------------------------
def serve(listener: socket.socket, owner: int, own: bytes | None = None) -> bytes | None:
    """Fork for whoever asks, while `owner` lives; first the process of `own`, with this one's files.

    Returns: None when `owner` has ended, and in each process that is forked the `request` for it.

    Raises: what the imports do; `RuntimeError` when they have made a thread.
    """
    Path("/proc/self/comm").write_text(NAME)
    with listener:
        alive = os.pidfd_open(owner)
        for module in MODULES:
            importlib.import_module(module)
        if (num_threads := len(os.listdir("/proc/self/task"))) > 1 or "ray" in sys.modules:
            raise RuntimeError(f"to fork from: {num_threads} threads instead of one, or Ray imported already")
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
        if own is not None and os.fork() == 0:
            os.close(alive)
            return own
        while True:
            select.select([listener.fileno(), alive], [], [])
            if select.select([alive], [], [], 0)[0]:
                return None
            asking, _ = listener.accept()
            with asking:
                if _user(asking) == os.getuid() and (wanted := _fork(asking)) is not None:
                    os.close(alive)
                    return wanted


def _bound(address: str) -> socket.socket | None:
    """For `serve`, and who asks before that is ready waits for it; None where somebody has that address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        return None
    return listener


def _fork(asking: socket.socket) -> bytes | None:
    """What the new process is to be; None in the one that stays."""
    asking.settimeout(1)  # it has sent already, or is not one of us
    files: list[int] = []
    try:
        wanted, files, _, _ = socket.recv_fds(asking, MAX_BYTES, 3)
        if len(files) != 3:
            return None
        if os.fork() == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            return wanted
        asking.send(b".")
    except OSError:  # who asked has ended, or there is no room for another process
        pass
    finally:
        for file in files:
            os.close(file)
    return None


def main(arguments: Sequence[str]) -> None:
    """``warm.py SCRIPT ARGUMENTS...``: that script, by a process that is warm or becomes it."""
    owner, wanted = os.getppid(), request(arguments, os.environ)
    if OWNER in os.environ:
        with contextlib.suppress(ConnectionRefusedError):
            if ask(address_of(int(os.environ[OWNER])), wanted):
                return
    address, until_s = address_of(owner), time.monotonic() + READY_S
    while time.monotonic() < until_s:
        try:
            if ask(address, wanted):
                return
            break
        except ConnectionRefusedError:
            pass
        listener = _bound(address)
        if listener is None:  # another worker was quicker, and listens in a moment
            time.sleep(0.01)
            continue
        try:
            os.environ["OMP_NUM_THREADS"] = "1"  # numpy starts its threads when it is imported
            mine = serve(listener, owner, wanted)
        except Exception as error:  # whatever an import raises: the worker says it better
            sys.stderr.write(f"actors start without a warm process: {error!r}\n")
            break
        if mine is not None:
            become(mine)
        return
    os.environ.update(json.loads(wanted)["environment"])
    os.execv(sys.executable, [sys.executable, *arguments])


def _serve_only(owner: int, listener: socket.socket) -> None:
    """What `begin` starts."""
    wanted = serve(listener, owner)
    if wanted is not None:
        become(wanted)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    if sys.argv[1] == SERVE:
        _serve_only(int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])))
    else:
        main(sys.argv[1:])
