"""Elasticity on real services: how fast a hot expert gets its replica, and how long streams stall when hosts die.

`python benchmarks/elastic.py [--rounds 5] [--quick]`. *Skew*: one MoE layer of 8 experts on two actors of one thread
each; the same traffic evenly over the experts, and with 80 % of the tokens for one of them, in turns, with replication
and with a fixed placement. *Stalls*: 16 clients generate while processes are killed or stopped; the tokens of every
stream are compared with those of `transformers`. Results go to `benchmarks/results/elastic.{json,md}`.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks import report
from ray_moe.client.sync import Client
from ray_moe.types import ServiceStatus
from tests.ray.support import Streams, all_ready, await_status, greedy, has_actors, pid_of, prompts, serving
from tests.tiny_models import save

EXPERTS, WIDTH, INNER, TOKENS = 8, 512, 2048, 1024
HOT_SHARE = 0.8
ASKERS = 3
"""Threads that send one batch after the other: there is always one to compute and one on its way."""
SETTLE_S, BLOCK_S = 2.0, 4.0
STREAMS, STREAM_TOKENS = 16, 150


# --- Skewed traffic ------------------------------------------------------------------------------------------
@dataclass
class Traffic:
    """Batches through the only layer of a service, as fast as it takes them, until the block is left."""

    client: Client
    layer: str
    index: Any
    done_s: list[float] = field(default_factory=list)

    def _ask(self, stop: threading.Event) -> None:
        hidden = np.random.default_rng(0).standard_normal((TOKENS, WIDTH), dtype=np.float32)
        weight = np.ones((TOKENS, 1), dtype=np.float32)
        while not stop.is_set():
            self.client.forward(self.layer, hidden, self.index, weight)
            self.done_s.append(time.monotonic())

    @contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(stop,)) for _ in range(ASKERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def tokens_per_s(self, begin_s: float, end_s: float) -> float:
        return TOKENS * sum(begin_s < at_s <= end_s for at_s in self.done_s) / (end_s - begin_s)


def routing(hot: int) -> dict[str, Any]:
    """[T, 1] experts of the tokens of a batch: evenly, and with `HOT_SHARE` of them for expert `hot`."""
    rng = np.random.default_rng(1)
    even = rng.permutation(np.arange(TOKENS) % EXPERTS)[:, None]
    skewed = np.where(np.arange(TOKENS) < HOT_SHARE * TOKENS, 0, 1 + np.arange(TOKENS) % (EXPERTS - 1))
    return {"even": even, "skewed": (rng.permutation(skewed)[:, None] + hot) % EXPERTS}


def one_block(client: Client, layer: str, index: Any, hot: int) -> tuple[float, float | None, float | None]:
    """Tokens per second once settled; seconds until `hot` was served by two hosts, and until both had worked."""
    traffic = Traffic(client, layer, index)
    routed_s = served_s = None
    begin_s = time.monotonic()
    with traffic.running():
        rows: dict[str, int] = {}
        while time.monotonic() < begin_s + SETTLE_S:
            if routed_s is None and len(client.placement().placement.hosts_of[layer][hot]) > 1:
                routed_s = time.monotonic() - begin_s
                rows = {host.host_id: host.num_rows for host in client.status().hosts}
            if routed_s is not None and served_s is None and _all_worked(client.status(), rows):
                served_s = time.monotonic() - begin_s
            time.sleep(0.05)
        time.sleep(BLOCK_S)
    return traffic.tokens_per_s(begin_s + SETTLE_S, begin_s + SETTLE_S + BLOCK_S), routed_s, served_s


def _all_worked(status: ServiceStatus, rows: dict[str, int]) -> bool:
    """Whether every host has computed a good part of a batch since."""
    return all(host.num_rows > rows[host.host_id] + TOKENS // 4 for host in status.hosts)


def measure_skew(folder: Path, rounds: int) -> dict[str, list[float]]:
    save(
        "mixtral",
        folder,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        num_hidden_layers=1,
    )
    experts = {"num_actors": 2, "num_threads": 1}
    values: dict[str, list[float]] = {}
    with (
        serving(folder, experts=experts, balance={"enabled": True, "every_s": 0.25, "half_life_s": 0.5}) as elastic,
        serving(folder, experts=experts) as fixed,
        Client(elastic.address) as with_replicas,
        Client(fixed.address) as without,
    ):
        layer = next(iter(with_replicas.placement().placement.hosts_of))
        for number in range(rounds + 1):
            print(f"skew: round {number} of {rounds}", file=sys.stderr)
            found: dict[str, float] = {}
            hot = number % EXPERTS  # another one each time: its replica must be made anew
            for service, client in (("fixed", without), ("elastic", with_replicas)):
                for law, index in routing(hot).items():
                    tokens_per_s, routed_s, served_s = one_block(client, layer, index, hot)
                    found[f"{law}, {service}"] = tokens_per_s
                    if law == "skewed" and service == "elastic":
                        found["routed_s"] = math.inf if routed_s is None else routed_s
                        found["served_s"] = math.inf if served_s is None else served_s
            for name, value in found.items() if number else ():  # the first round only warms up
                values.setdefault(name, []).append(value)
            time.sleep(1.0)  # the placement forgets nothing; the rates do
    return values


# --- Stalls --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Disturbance:
    name: str
    settings: dict[str, Any]
    strike: Callable[[Any, Client], None]
    """Called while the streams run."""
    num_tokens: int = STREAM_TOKENS


def kill_hosts(number: int, how: signal.Signals = signal.SIGKILL) -> Callable[[Any, Client], None]:
    def strike(service: Any, client: Client) -> None:
        for host in client.status().hosts[:number]:
            os.kill(host.pid, how)

    return strike


def kill_controller(service: Any, client: Client) -> None:
    os.kill(pid_of(service, "controller"), signal.SIGKILL)


def resize(service: Any, client: Client) -> None:
    for number in (6, 2):
        client.resize(number)
        await_status(client, has_actors(number), what=f"{number} actors")
        client.plan(dry_run=False)


def load_beside(service: Any, client: Client) -> None:
    """What four starting actors load, in processes that have nothing to do with the service."""
    command = [sys.executable, "-c", "import ray_moe.models.huggingface"]
    for process in [subprocess.Popen(command) for _ in range(4)]:
        process.wait()


TWO = {"balance": {"enabled": True, "every_s": 0.2, "drain_s": 0.5}}
THREE = {"experts": {"num_actors": 3}}
TWICE = {
    "experts": {"num_actors": 3, "spare_slots": 8},
    "balance": {"enabled": True, "every_s": 0.2, "min_replicas": 2},
    "router": {"lifeboat_bytes": 0},
}
DISTURBANCES = (
    Disturbance("nothing", THREE, lambda service, client: None),
    Disturbance("an actor is killed; lifeboat", THREE, kill_hosts(1)),
    Disturbance("an actor is killed; two replicas, no lifeboat", TWICE, kill_hosts(1)),
    Disturbance("two actors of three are killed; lifeboat", THREE, kill_hosts(2)),
    Disturbance("an actor hangs (SIGSTOP)", THREE, kill_hosts(1, signal.SIGSTOP)),
    Disturbance("the controller is killed", THREE, kill_controller),
    Disturbance("two actors, six, two, with a plan after each", TWO, resize, 1900),
    Disturbance("nothing, but four other processes load the same libraries", TWO, load_beside, 1900),
)


def measure_stalls(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Longest stall of any stream in each round. Raises when a stream failed or a token is not as it should be."""
    model = save("mixtral", folder, max_position_embeddings=2048)
    wanted = prompts(STREAMS)
    expected = greedy(model, wanted, max(disturbance.num_tokens for disturbance in DISTURBANCES))
    stalls: dict[str, list[float]] = {disturbance.name: [] for disturbance in DISTURBANCES}
    for settings in (THREE, TWICE, TWO):
        mine = [disturbance for disturbance in DISTURBANCES if disturbance.settings is settings]
        with serving(folder, **settings) as service, Client(service.address) as client:
            await_whole(client, settings)
            for number in range(rounds):
                for disturbance in mine:
                    print(f"stalls: round {number + 1} of {rounds}, {disturbance.name}", file=sys.stderr)
                    num_tokens = disturbance.num_tokens
                    with Streams(service.address, wanted, num_tokens) as streams:
                        streams.wait_for(10)
                        disturbance.strike(service, client)
                        assert streams.are_running, "it has not lasted long enough"
                    assert streams.results == [tokens[:num_tokens] for tokens in expected], disturbance.name
                    stalls[disturbance.name].append(streams.longest_stall_s)
                    print(f"  longest {streams.longest_stall_s:.3f} s", file=sys.stderr)
                    time.sleep(1.0)
                    await_whole(client, settings)
            assert client.status().router.failed_requests == 0
    return stalls


def await_whole(client: Client, settings: dict[str, Any]) -> None:
    """Until every actor serves and every expert has as many replicas as it should."""
    least = settings.get("balance", {}).get("min_replicas", 1)

    def is_whole(status: ServiceStatus) -> bool:
        rows = client.placement().placement.hosts_of.values()
        return all_ready(status) and all(len(hosts) >= least for experts in rows for hosts in experts)

    await_status(client, is_whole, what="whole")


def main(argv: list[str] | None = None) -> None:
    given = report.options(__doc__, rounds=5).parse_args(argv)
    rounds = 1 if given.quick else given.rounds

    import ray

    from ray_moe.actors.spec import NAMESPACE
    from ray_moe.service import cluster

    os.environ.update({name: value for name, value in cluster.RAY_ENVIRONMENT.items() if name not in os.environ})
    ray.init(num_cpus=16, namespace=NAMESPACE, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with tempfile.TemporaryDirectory() as folder:
            skew = measure_skew(Path(folder, "wide"), rounds)
            stalls = measure_stalls(Path(folder, "tiny"), rounds)
    finally:
        ray.shutdown()
    settings = {
        "experts": EXPERTS,
        "width": WIDTH,
        "inner": INNER,
        "tokens": TOKENS,
        "hot_share": HOT_SHARE,
        "askers": ASKERS,
        "settle_s": SETTLE_S,
        "streams": STREAMS,
        "stream_tokens": STREAM_TOKENS,
    }
    report.finish("elastic", {"settings": settings, "skew": skew, "stall_s": stalls}, given)


if __name__ == "__main__":
    main()
