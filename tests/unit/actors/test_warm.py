"""A process that forks for others: what is forked is what was asked for, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_moe.actors import warm
from ray_moe.actors.launcher import runtime_env
from ray_moe.config import RayConfig

ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, os, random, sys, time
told = {"argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "name": os.environ["NAME"], "pid": os.getpid(),
    "group": os.getpgid(0), "parent": os.getppid(), "home": os.environ.get("HOME"), "torch": "torch" in sys.modules,
    "drawn": random.random(), "main": __name__, "files": sorted(os.listdir("/proc/self/fd"))}
print("said", flush=True)
open(sys.argv[1] + "-", "w").write(json.dumps(told))
os.rename(sys.argv[1] + "-", sys.argv[1])
time.sleep(float(os.environ.get("SLEEP", 0)))
"""

PARENT = """
import os, subprocess, sys
for line in sys.stdin:
    name, told, out, *sleep = line.split()
    kept = {one: os.environ[one] for one in ("PATH", "PYTHONPATH", "RAY_MOE_WARM_OWNER") if one in os.environ}
    environment = kept | {"NAME": name, "SLEEP": "".join(sleep) or "0"}
    subprocess.Popen([*sys.argv[1:], told], env=environment, stdout=open(out, "w"), cwd=os.path.dirname(told),
        start_new_session=True)
"""
"""A raylet of a sort: a process that starts workers and does not wait for them."""


class Raylet:
    def __init__(self, script: Path, path: str = str(ROOT)) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PARENT, sys.executable, warm.__file__, str(script)],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.pid = self._process.pid

    def begin(self, told: Path, name: str, sleep: float = 0) -> Path:
        """Start a worker as Ray does. Returns the file that it prints to."""
        out = told.with_suffix(".out")
        assert self._process.stdin is not None
        print(name, told, out, sleep, file=self._process.stdin, flush=True)
        return out

    def start(self, told: Path, name: str, sleep: float = 0) -> tuple[dict[str, Any], Path]:
        """What a worker says of itself, and the file that it prints to."""
        out = self.begin(told, name, sleep)
        _until(told.exists, 60)
        said: dict[str, Any] = json.loads(told.read_text())
        return said, out

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scripts") / "script.py"
    file.write_text(SCRIPT)
    return file


@pytest.fixture(scope="module")
def raylet(script: Path) -> Iterator[Raylet]:
    made = Raylet(script)
    yield made
    made.kill()


def test_what_is_forked_is_what_was_asked_for(script: Path, tmp_path: Path, raylet: Raylet) -> None:
    said = []
    for name in ("one", "two"):
        told = tmp_path / f"{name}.json"
        found, out = raylet.start(told, name)
        assert found["argv"] == [str(script), str(told)]
        assert (found["name"], found["folder"], found["main"]) == (name, str(tmp_path), "__main__")
        assert found["path"] == str(script.parent)
        assert found["home"] is None  # the environment is the one that was given, and no more
        assert found["torch"] is True
        assert found["group"] == found["pid"]  # what ends one with its group leaves the others
        assert len(found["files"]) <= 4  # its three, and the folder that it lists
        assert out.read_text() == "said\n"
        said.append(found)
    assert said[0]["parent"] == said[1]["parent"] != raylet.pid
    assert said[0]["drawn"] != said[1]["drawn"]


def test_a_worker_that_is_killed_with_its_group_leaves_the_others(tmp_path: Path, raylet: Raylet) -> None:
    first, _ = raylet.start(tmp_path / "first.json", "first", sleep=60)
    second, _ = raylet.start(tmp_path / "second.json", "second", sleep=60)
    os.killpg(first["group"], signal.SIGKILL)
    _until(lambda: not _is_alive(first["pid"]))
    assert _is_alive(second["pid"])
    third, _ = raylet.start(tmp_path / "third.json", "third")
    assert third["parent"] == second["parent"]
    os.kill(second["pid"], signal.SIGKILL)


def test_many_at_once_make_one_warm_process_which_ends_with_its_owner(script: Path, tmp_path: Path) -> None:
    mortal = Raylet(script)
    try:
        files = [tmp_path / f"{number}.json" for number in range(4)]
        for file in files:
            mortal.begin(file, "many")
        _until(lambda: all(file.exists() for file in files), 60)
        said = [json.loads(file.read_text()) for file in files]
        (parent,) = {one["parent"] for one in said}
        assert len({one["pid"] for one in said}) == 4
        assert _is_alive(parent)
    finally:
        mortal.kill()
    _until(lambda: not _is_alive(parent))


def test_who_asks_at_once_is_heard_by_one_that_has_hardly_begun() -> None:
    warm.begin({})
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.connect(warm.address_of(os.getpid()))
    finally:
        warm.end()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking, pytest.raises(ConnectionRefusedError):
        asking.connect(warm.address_of(os.getpid()))


def test_one_may_be_begun_before_there_is_a_raylet(script: Path, tmp_path: Path) -> None:
    warm.begin({})
    raylet = Raylet(script)
    try:
        mine = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        said, _ = raylet.start(tmp_path / "told.json", "any")
        assert str(said["parent"]) in mine
        warm.end()
        assert not _is_alive(said["parent"])
    finally:
        warm.end()
        raylet.kill()


def test_where_it_cannot_be_the_worker_starts_by_itself(tmp_path: Path, script: Path) -> None:
    (tmp_path / "pydantic.py").write_text("raise ImportError('broken')")
    raylet = Raylet(script, f"{tmp_path}:{ROOT}")
    try:
        said, out = raylet.start(tmp_path / "told.json", "cold")
        assert (said["name"], said["torch"], said["parent"]) == ("cold", False, raylet.pid)
        assert out.read_text() == "said\n"
    finally:
        raylet.kill()


def test_nobody_else_s_process_is_asked(tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who took the name first does not get the environment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        address = warm.address_of(os.getpid())
        other.bind(address)
        other.listen()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert not warm.ask(address, b"secret")
        line, _ = other.accept()
        with line:
            assert line.recv(100) == b""


def test_what_has_a_gpu_is_not_forked() -> None:
    assert runtime_env(RayConfig(warm_start=True), 1, 0)["py_executable"] == warm.py_executable()
    assert "py_executable" not in runtime_env(RayConfig(warm_start=True), 1, 0.5)
    assert "py_executable" not in runtime_env(RayConfig(warm_start=False), 1, 0)


def _is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _until(holds: Any, timeout_s: float = 10.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.01)
