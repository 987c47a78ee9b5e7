"""`ray-moe serve` as a process of its own, with a Ray of its own: however it ends, nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from ray_moe.actors import warm
from ray_moe.client.sync import Client
from tests.ray.support import PROMPT, Streams, greedy, prompts, unix_sockets

START_TIMEOUT_S = 150
END_TIMEOUT_S = 90

RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""When Ray's head is killed, these two try for 60 s to tell it that its raylet is gone (`publish_error_to_driver`), and
then end. They hold nothing of ours, and no setting of Ray's shortens it."""

# Two CPUs and the default reservations: the router and one actor fill them to the last.
SETTINGS = ("ray.num_cpus=2", "ray.auth=disabled", "server.grace_s=1")


class Command:
    """A running `ray-moe serve`, and what belongs to it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.address = ""
        self.children: dict[psutil.Process, str] = {}
        """Their names, while they have them."""
        self.sockets: set[str] = set()

    def wait_until_it_serves(self) -> None:
        end_by = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"serving .* on (\S+) \(gRPC\)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end_by, self.log.read_text()
            time.sleep(0.05)
        self.address = found[1]
        self.record_children()
        names = {name[:16] for name in self.children.values()}
        assert {"raylet", "ray::Router", "ray::ExpertActor", warm.NAME} <= names
        assert self.sockets

    def record_children(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.children = {child: child.name() for child in children}
        self.sockets = set(unix_sockets({child.pid for child in children}))

    def assert_nothing_is_left(self, shared_memory: set[str], slow: Sequence[str] = ()) -> None:
        """All children have ended, but for those of the names `slow`."""
        expected = [child for child, name in self.children.items() if name not in slow]
        _, alive = psutil.wait_procs(expected, END_TIMEOUT_S)
        assert not alive, [(child.pid, self.children[child]) for child in alive]
        names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
        assert not self.sockets & names
        assert set(os.listdir("/dev/shm")) <= shared_memory


@contextmanager
def command(model: Path, log: Path) -> Iterator[Command]:
    """Start the command in a process group of its own, as a shell does; kill whatever outlives the block."""
    arguments = [sys.executable, "-m", "ray_moe.cli.main", "serve", str(model), "--actors", "1", "--port", "0"]
    arguments += ["--set", "server.http_port=null"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*arguments, *(part for setting in SETTINGS for part in ("--set", setting))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            text=True,
        )
    running = Command(process, log)
    try:
        yield running
    finally:
        if process.poll() is None:
            running.record_children()
            process.kill()
            process.wait()
        for child in running.children:
            if child.is_running():
                child.kill()


def test_it_answers_and_ends_when_interrupted(mixtral, tmp_path):
    reference, folder = mixtral
    shared_memory = set(os.listdir("/dev/shm"))
    with command(folder, tmp_path / "log") as serve:
        serve.wait_until_it_serves()
        with Client(serve.address) as client:
            given = client.generate(token_ids=PROMPT, max_new_tokens=32, ignore_eos=True)
        assert [given.token_ids] == greedy(reference, [PROMPT], 32)
        os.killpg(serve.process.pid, signal.SIGINT)  # Ctrl-C reaches everything in the terminal's foreground
        assert serve.process.wait(END_TIMEOUT_S) == 0, serve.log.read_text()
        serve.assert_nothing_is_left(shared_memory)
        assert "Traceback" not in serve.log.read_text()


def test_nothing_outlives_it_when_it_is_killed(mixtral, tmp_path):
    shared_memory = set(os.listdir("/dev/shm"))
    with command(mixtral[1], tmp_path / "log") as serve:
        serve.wait_until_it_serves()
        with Streams(serve.address, prompts(2), 1900) as streams:
            streams.wait_for(5)
            serve.process.kill()
            serve.process.wait()
        assert {type(error).__name__ for error in streams.errors} == {"Unavailable"}
        serve.assert_nothing_is_left(shared_memory, slow=RAYS_AGENTS)


def test_it_is_told_to_end_while_it_starts(mixtral, tmp_path):
    shared_memory = set(os.listdir("/dev/shm"))
    with command(mixtral[1], tmp_path / "log") as serve:
        end_by = time.monotonic() + START_TIMEOUT_S
        while "loading" not in serve.log.read_text():
            assert time.monotonic() < end_by, serve.log.read_text()
            time.sleep(0.05)
        serve.record_children()
        serve.process.send_signal(signal.SIGTERM)
        assert serve.process.wait(END_TIMEOUT_S) == 0, serve.log.read_text()
        serve.assert_nothing_is_left(shared_memory)
        assert "Traceback" not in serve.log.read_text()
