"""Services on tiny checkpoints, the traces they must not leave, and streams to disturb them under."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import RayError

from ray_moe.client.sync import Client
from ray_moe.config import Config
from ray_moe.service import ports
from ray_moe.service.composition import Service
from ray_moe.types import ServiceStatus

PROMPT = (5, 17, 3, 42, 8, 11, 60, 23, 9, 31, 77, 4)

GPU_SHARE = float(os.environ.get("RAY_MOE_TEST_GPU_SHARE", "0"))
"""Of a GPU, for each actor: on a machine that has one, 0.1 runs these tests on it. References are of the CPU."""

_numbers = itertools.count()


# --- Services ------------------------------------------------------------------------------------------------
def make_config(model: Path | str, settings: Mapping[str, Any]) -> Config:
    """A configuration for the shared Ray; `settings` are sections, such as ``experts={"num_actors": 2}``."""
    tree: dict[str, Any] = {
        "model": str(model),
        "service_name": f"test-{next(_numbers)}",
        "ray": {"warm_start": True},  # as a service has it that starts a Ray; this one finds one
        "experts": {"num_cpus": 0.1, "num_gpus": GPU_SHARE, "num_actors": 2, "start_timeout_s": 120},
        "router": {"num_cpus": 0.1, "num_gpus": GPU_SHARE, "max_concurrent_requests": 16},
        "balance": {"enabled": False},  # what a test does not ask for does not move
        "server": {"port": 0, "http_port": None, "grace_s": 1},
    }
    for name, value in settings.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return Config.model_validate(tree)


@contextmanager
def serving(model: Path, **settings: Any) -> Iterator[Service]:
    """A service that runs inside the block; afterwards nothing of it may be left."""
    config = make_config(model, settings)
    with no_leaks(config.service_name), Service(config) as service:
        yield service


# --- Commands ---------------------------------------------------------------------------------------------------
@contextmanager
def running(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends, with all it has started, when the block is left."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    family: dict[int, psutil.Process] = {}
    watching = threading.Event()

    def watch() -> None:  # what the autoscaler starts is orphaned when its parent goes
        while not watching.wait(0.5):
            try:
                family.update({child.pid: child for child in psutil.Process(process.pid).children(recursive=True)})
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield process
    except BaseException:
        print(log.read_text()[-4000:])
        raise
    finally:
        watching.set()
        watcher.join()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in family.values():
            if child.is_running():
                child.kill()
        psutil.wait_procs(list(family.values()), timeout=10)


# --- What is left behind -------------------------------------------------------------------------------------
@contextmanager
def no_leaks(service_name: str, timeout_s: float = 10.0) -> Iterator[None]:
    """Fails when the services started inside the block leave a process, an actor, a socket or shared memory."""
    before = _actor_processes()
    shared_before = set(os.listdir("/dev/shm"))
    yield
    end_by = time.monotonic() + timeout_s
    while True:
        processes = _actor_processes() - before
        left = {
            "processes": {_describe(pid) for pid in processes},
            "actors": _actor_names(service_name),
            "sockets": set(unix_sockets(processes)),
            "shared memory": set(os.listdir("/dev/shm")) - shared_before,
            "mapped": {line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:ray-moe" in line},
        }
        left = {kind: names for kind, names in left.items() if names}
        if not left:
            return
        assert time.monotonic() < end_by, f"{service_name} left behind: {left}"
        time.sleep(0.05)


def _actor_names(service_name: str) -> set[str]:
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith(f"{service_name}/")}


def _actor_processes() -> set[int]:
    """Processes of this Ray that run an actor (or died as one and were not waited for)."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            title = process.name() + " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if any(
            name in title
            for name in ("ray::ExpertActor", "ray::Router", "ray::Controller", "ray::Launcher", "ray::TrainerActor")
        ):
            found.add(process.pid)
    return found


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"{pid} {' '.join(process.cmdline())} ({process.status()})"
    except psutil.NoSuchProcess:
        return str(pid)


def unix_sockets(pids: set[int]) -> dict[str, int]:
    """Abstract sockets of expert hosts that `pids` hold: name -> process."""
    names = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[7].startswith("@ray-moe-"):
            names[f"socket:[{fields[6]}]"] = fields[7]
    held = {}
    for pid in pids:
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        held.update({names[link]: pid for link in links if link in names})
    return held


# --- Looking at a service ------------------------------------------------------------------------------------
def await_status(
    client: Client, wanted: Callable[[ServiceStatus], bool], timeout_s: float = 60.0, what: str = "that"
) -> ServiceStatus:
    """The first status for which `wanted` holds."""
    end_by = time.monotonic() + timeout_s
    while True:
        status = client.status()
        if wanted(status):
            return status
        assert time.monotonic() < end_by, f"not {what} after {timeout_s:g} s: {status}"
        time.sleep(0.05)


def free_port() -> int:
    """One that no process is given by the system before its server listens."""
    return ports.lasting("127.0.0.1")


def agent_ports() -> dict[str, int]:
    """Ports of the agents of one of Ray's nodes. For those that are not given it waits, 15 s at the most, and on a busy
    machine it ends where the agents need longer."""
    return {name: free_port() for name in ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port")}


def all_ready(status: ServiceStatus) -> bool:
    return status.state == "ready" and all(host.state in ("ready", "standby") for host in status.hosts)


def has_actors(number: int) -> Callable[[ServiceStatus], bool]:
    """For `await_status`: as many actors, all ready, and no change under way."""
    return lambda status: all_ready(status) and not status.changing and len(status.hosts) == number


def has_routers(number: int) -> Callable[[ServiceStatus], bool]:
    """For `await_status`: as many routers, all ready."""
    return lambda status: [router.ready for router in status.routers] == [True] * number


def await_rest(client: Client, number: int, quiet_s: float = 1.0) -> ServiceStatus:
    """The status when nothing has changed for a while with as many actors: what was repaired may be followed by a plan,
    and while one is carried out others are refused."""
    at_rest = has_actors(number)
    while True:
        await_status(client, at_rest, what=f"{number} actors")
        end_by = time.monotonic() + quiet_s
        while at_rest(status := client.status()):
            if time.monotonic() > end_by:
                return status
            time.sleep(0.05)


def pid_of(service: Service, role: str) -> int:
    """The process of an actor that the status does not tell (the controller)."""
    actor = ray.get_actor(f"{service.config.service_name}/{role}")
    pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return pid


def await_other(service: Service, role: str, pid: int, timeout_s: float = 60.0) -> None:
    """Return when the actor is another process than `pid`."""
    end_by = time.monotonic() + timeout_s
    while time.monotonic() < end_by:
        with contextlib.suppress(RayError):  # it is being restarted
            if pid_of(service, role) != pid:
                return
        time.sleep(0.1)
    raise AssertionError(f"the {role} is not another one after {timeout_s:g} s")


# --- Generating ----------------------------------------------------------------------------------------------
def greedy(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[int, ...]]:
    """What `transformers` continues each of `prompts` (of one length) with, in this process."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor(prompts), max_new_tokens=num_tokens, do_sample=False, eos_token_id=[], pad_token_id=0
        )
    return [tuple(row[len(prompts[0]) :]) for row in out.tolist()]


def prompts(count: int) -> list[tuple[int, ...]]:
    """Different prompts of one length."""
    return [tuple((token + 7 * number) % 90 + 3 for token in PROMPT) for number in range(count)]


class Streams:
    """Generations that run at the same time, each in a thread. Leave the block to wait for their ends."""

    def __init__(
        self, address: str | Sequence[str], wanted: Sequence[Sequence[int]], num_tokens: int, **options: Any
    ) -> None:
        """`options` are those of the client."""
        self.longest_stall_s = 0.0
        """Longest time between two tokens of a stream."""
        self.errors: list[BaseException | None] = [None] * len(wanted)
        self.tokens: list[list[int]] = [[] for _ in wanted]
        self._num_tokens = num_tokens
        self._running = len(wanted)
        self._changed = threading.Condition()
        self._client = Client(address, **options)
        self._threads = [
            threading.Thread(target=self._run, args=(number, list(prompt))) for number, prompt in enumerate(wanted)
        ]

    def _run(self, number: int, prompt: list[int]) -> None:
        last_s = math.inf  # the wait for the first token is no stall
        try:
            for chunk in self._client.stream(token_ids=prompt, max_new_tokens=self._num_tokens, ignore_eos=True):
                now_s = time.monotonic()
                with self._changed:
                    self.longest_stall_s = max(self.longest_stall_s, now_s - last_s)
                    self.tokens[number].extend(chunk.token_ids)
                    self._changed.notify_all()
                last_s = now_s
        except BaseException as error:
            self.errors[number] = error
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def wait_for(self, num_tokens: int, timeout_s: float = 60.0) -> None:
        """Return when every stream has that many tokens; they must be running still."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: not self._running or min(map(len, self.tokens)) >= num_tokens, timeout_s
            )
            assert there, f"only {[len(tokens) for tokens in self.tokens]} tokens after {timeout_s:g} s"
            assert self._running, f"the streams ended before they were disturbed: {self.errors}"

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
        self._client.close()

    @property
    def are_running(self) -> bool:
        """Whether any has not ended."""
        with self._changed:
            return self._running > 0

    @property
    def results(self) -> list[tuple[int, ...]]:
        """The tokens of all streams, none of which failed."""
        failed = [error for error in self.errors if error is not None]
        if failed:
            raise failed[0]
        return [tuple(tokens) for tokens in self.tokens]


@contextmanager
def undisturbed(
    service: Service, expected: Sequence[Sequence[int]], num_tokens: int | None = None
) -> Iterator[Streams]:
    """Streams over `prompts` during which something happens: all end, with the tokens that are `expected`.

    Without `num_tokens`, with as many as are expected.
    """
    num_tokens = len(expected[0]) if num_tokens is None else num_tokens
    with Streams(service.address, prompts(len(expected)), num_tokens) as streams:
        streams.wait_for(10)
        yield streams
    assert streams.results == [tuple(tokens[:num_tokens]) for tokens in expected]
    print(f"longest stall {streams.longest_stall_s:.3f} s")
