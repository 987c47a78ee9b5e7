"""How long a service takes to start, beside importing torch and reading the checkpoint; one more actor; their memory.

`python benchmarks/start.py [--rounds 3] [--quick]`, or `ray-moe bench start`. In each round, in turns: a process that
imports torch, one that reads the checkpoint's files, and `ray-moe serve` with 8 actors, which also starts a Ray, from
its command until it says that it is ready: with actors that are forked from a warm process (`ray.warm_start`), and with
such that make all imports themselves. Then one more actor (`resize`) while another one is on standby, how long it takes
until there is a standby again, and what each actor's process takes beyond its weights, beside a process that has only
imported torch. Results go to `benchmarks/results/start.{json,md}`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import report
from benchmarks.processes import free_port
from benchmarks.serving_servers import Contestant, running
from ray_moe.client.sync import Client
from ray_moe.types import HostStatus, ServiceStatus

GOALS = {"start": 2.0, "added_s": 1.0, "rss": 1.3}
ONLY_TORCH = "import torch, psutil; print(psutil.Process().memory_info().rss)"
READ = """
import pathlib, sys
room = bytearray(16 << 20)
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(room):
            pass
"""
WAIT_S = 120.0
WAYS = {"warm": True, "cold": False}
"""`ray.warm_start`."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of the checkpoint, a Mixtral in float32, and of the service."""

    hidden_size: int = 1024
    intermediate_size: int = 1792
    num_local_experts: int = 8
    num_hidden_layers: int = 8
    actors: int = 8

    def write(self, folder: Path) -> int:
        """Returns the bytes of its files."""
        from tests.tiny_models import save

        save("mixtral", folder, **{key: value for key, value in asdict(self).items() if key != "actors"})
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


QUICK = Size(64, 128, 4, 2, actors=2)


def seconds(command: list[str]) -> tuple[float, str]:
    """Of a process, from its start to its end, and what it printed."""
    began_s = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began_s, run.stdout


def service(model: Path, size: Size, grpc_port: int, is_warm: bool) -> Contestant:
    """With one actor on standby."""
    settings = {
        "server.http_port": "{port}",
        "ray.num_cpus": size.actors + 3,
        "ray.auth": "disabled",
        "ray.warm_start": str(is_warm).lower(),
        "experts.standby_actors": 1,
        "experts.num_cpus": 0.5,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    serve = (sys.executable, "-m", "ray_moe.cli.main", "serve", str(model), "--port", str(grpc_port))
    return Contestant("service", model, (*serve, "--actors", str(size.actors), *options), 1, can_be_suspended=False)


def await_status(client: Client, wanted: Callable[[ServiceStatus], bool], what: str) -> ServiceStatus:
    """The first status that is as wanted. Raises SystemExit."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        status = client.status()
        if wanted(status):
            return status
        time.sleep(0.01)
    raise SystemExit(f"not {what} after {WAIT_S:.0f} s: {[host.state for host in client.status().hosts]}")


def serving(status: ServiceStatus) -> list[HostStatus]:
    return [host for host in status.hosts if host.state == "ready"]


def floor(model: Path) -> dict[str, float]:
    """Importing torch, and reading the files."""
    import_s, printed = seconds([sys.executable, "-c", ONLY_TORCH])
    read_s, _ = seconds([sys.executable, "-c", READ, str(model)])
    return {"import_s": import_s, "read_s": read_s, "torch_rss_bytes": int(printed)}


def start(model: Path, size: Size, log: Path, is_warm: bool) -> dict[str, float]:
    """Start a service, add an actor, look at their memory, and end it."""
    port = free_port()
    began_s = time.perf_counter()
    with running(service(model, size, port, is_warm), log):
        ready_s = time.perf_counter() - began_s
        with Client(f"127.0.0.1:{port}") as client:
            await_status(client, _has_standby, "a standby actor")
            before = await_status(client, lambda s: len(serving(s)) == size.actors, "all actors ready")
            began_s = time.perf_counter()
            client.resize(size.actors + 1)
            await_status(client, lambda s: len(serving(s)) == size.actors + 1, "one more actor")
            added_s = time.perf_counter() - began_s
            await_status(client, _has_standby, "another standby actor")
            again_s = time.perf_counter() - began_s
            hosts = serving(before)
            own = [psutil.Process(host.pid).memory_full_info().pss - host.weight_bytes for host in hosts]
    beyond = [host.rss_bytes - host.weight_bytes for host in hosts]
    return {
        "ready_s": ready_s,
        "added_s": added_s,
        "standby_again_s": again_s,
        "beyond_weights_bytes": max(beyond),
        "own_bytes": sum(own) / len(own),
    }


def _has_standby(status: ServiceStatus) -> bool:
    return any(host.state == "standby" for host in status.hosts)


def one_round(model: Path, size: Size, logs: Path, number: int) -> dict[str, dict[str, float]]:
    """All in turns, in another order each time."""
    ways = list(WAYS.items())
    found = {"floor": floor(model)}
    for way, is_warm in ways if number % 2 else reversed(ways):
        found[way] = start(model, size, logs / f"{way}-{number}.log", is_warm)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__, rounds=3)
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the services write")
    given = parser.parse_args(argv)
    size, rounds = (QUICK, 1) if given.quick else (Size(), given.rounds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by the way of all context managers
    found: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        num_bytes = size.write(model)
        logs = given.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        for number in range(rounds + 1):
            values = one_round(model, size, logs, number)
            print(f"round {number}: {values}", file=sys.stderr, flush=True)
            if number or given.quick:  # the first one reads what is not in the page cache yet
                found.append(values)
            if given.quick:
                break
    figures = {who: {key: [each[who][key] for each in found] for key in found[0][who]} for who in found[0]}
    measured = {"size": asdict(size), "checkpoint_bytes": num_bytes, "goals": GOALS, "figures": figures}
    report.finish("start", measured, given)


if __name__ == "__main__":
    main()
