"""What `profile_step.py` watches: a service that answers streams over HTTP, and a training."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks import profile_flame
from benchmarks.profile_seams import STEP, TRAIN_STEP
from benchmarks.profile_watch import Watch, Watched, find, sampling

PROMPT_TOKENS, ANSWER_TOKENS = 32, 960
STEPS_BEFORE = 3
"""Training steps that warm up."""
MANY_STEPS = 1_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, and of what."""

    streams: int = 16
    warm_up_s: float = 3.0
    window_s: float = 5.0
    """For each of the clocks, for the samples, and for decoding without anything."""
    steps: int = 4
    """Of training, in each window at least."""
    micro_batches: int = 2
    batch_size: int = 4
    sequence_length: int = 128


QUICK = Settings(warm_up_s=1.0, window_s=1.0, steps=3, batch_size=2, sequence_length=64)


def write_model(folder: Path, is_quick: bool) -> None:
    from ray_moe.models.byte_level import ByteModel, write_new

    small = ByteModel(hidden_size=256, num_layers=8, num_heads=8, num_experts=32, top_k=4, expert_width=256)
    write_new(folder, replace(small, num_layers=2, num_experts=8) if is_quick else small)


# --- decoding -----------------------------------------------------------------------------------------------------
class Streams:
    """So many streams over HTTP, one answer after the other, until it is told to stop."""

    def __init__(self, url: str, model: str, number: int) -> None:
        self.num_tokens = 0
        self.num_begun = 0
        """Streams that have had a token."""
        self._url, self._model, self._number = url, model, number
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))
        self._over = threading.Event()
        self._error: BaseException | None = None

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=self._number)
        try:
            async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
                await asyncio.gather(*(self._one(client, number) for number in range(self._number)))
        except BaseException as error:
            self._error = error

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        has_begun = False
        body = {
            "model": self._model,
            "prompt": [32 + (number * 7 + at * 3) % 90 for at in range(PROMPT_TOKENS)],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        while not self._over.is_set():
            async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
                async for data in response.aiter_raw():
                    if response.status_code != 200:
                        raise RuntimeError(f"{self._url} answered {response.status_code}: {data[:300]!r}")
                    self.num_tokens += data.count(b"data:")
                    self.num_begun += not has_begun
                    has_begun = True
                    if self._over.is_set():
                        return

    def rate(self, seconds: float) -> float:
        """Tokens per second in the `seconds` to come."""
        before, began_s = self.num_tokens, time.perf_counter()
        time.sleep(seconds)
        return (self.num_tokens - before) / (time.perf_counter() - began_s)

    def __enter__(self) -> Streams:
        self._thread.start()
        while self.num_begun < self._number and self._error is None:
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise SystemExit(f"a stream failed: {self._error!r}")


def decode(model: Path, settings: Settings, folder: Path) -> tuple[Watched, dict[str, float]]:
    """What was seen of decoding, and tokens per second without and with marks."""
    from ray_moe.client.sync import Client
    from ray_moe.config import Config
    from ray_moe.service.composition import Service

    watch, samples = Watch(folder), {}
    config = Config.model_validate(
        {
            **common(model),
            "router": {"num_cpus": 0.5, "max_concurrent_requests": 2 * settings.streams},
            "server": {"port": 0, "http_port": 0, "grace_s": 1},
        }
    )
    with Service(config) as service, Client(service.address) as client:
        status = client.status()
        hosts = sorted(host.pid for host in status.hosts)
        pids = [status.router.pid, *hosts]
        with Streams(service.http_address, "profile", settings.streams) as streams:
            time.sleep(settings.warm_up_s)
            rates = {"unmarked": streams.rate(settings.window_s)}
            for clock in ("wall", "cpu"):
                watch.begin(clock)
                rates[clock] = streams.rate(settings.window_s)
                watch.end()
                watch.recordings(clock, pids)
            names = {status.router.pid: "router", **{pid: f"host {i}" for i, pid in enumerate(hosts)}}
            with sampling(names, settings.window_s, folder) as samples:
                pass
    wall, cpu = watch.recordings("wall", pids), watch.recordings("cpu", pids)
    return Watched(wall, cpu, samples, *find(wall, STEP), watch.other_cores(wall.values())), rates


def common(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "model_name": "profile",
        "service_name": "profile",
        "experts": {"num_actors": 2, "num_cpus": 0.5},
        "balance": {"enabled": False},
        "ray": {"num_cpus": 4, "auth": "disabled"},
    }


# --- training -----------------------------------------------------------------------------------------------------
class Enough(Exception):
    """All of a training has been seen."""


class Phases:
    """Watches a training while it hears of its steps; then raises `Enough`."""

    def __init__(self, watch: Watch, settings: Settings, folder: Path) -> None:
        self._watch, self._settings, self._folder = watch, settings, folder
        self._next_step, self._next_s = STEPS_BEFORE, 0.0
        self._todo = self._go()
        self.samples: dict[profile_flame.Stack, int] = {}

    def hear(self, progress: Any) -> None:
        if progress.step >= self._next_step and time.monotonic() >= self._next_s:
            self._next_step = progress.step + self._settings.steps
            self._next_s = time.monotonic() + self._settings.window_s
            next(self._todo)

    def _go(self) -> Iterator[None]:
        for clock in ("wall", "cpu"):
            self._watch.begin(clock)
            yield
            self._watch.end()
        main, hosts = find(self._watch.recordings("wall", self._watch.pids("wall")), TRAIN_STEP)
        names = {main: "worker", **{pid: f"host {number}" for number, pid in enumerate(hosts)}}
        self._watch.recordings("cpu", list(names))
        with sampling(names, self._settings.window_s, self._folder) as self.samples:
            pass
        raise Enough


def train(model: Path, settings: Settings, folder: Path) -> Watched:
    import ray_moe
    from ray_moe.config import Config

    watch = Watch(folder)
    phases = Phases(watch, settings, folder)
    config = Config.model_validate(
        {
            **common(model),
            "server": {"port": 0, "http_port": None, "grace_s": 1},
            "train": {
                "data": "stdlib",
                "steps": MANY_STEPS,
                "micro_batches": settings.micro_batches,
                "batch_size": settings.batch_size,
                "sequence_length": settings.sequence_length,
                "num_cpus": 0.5,
            },
        }
    )
    with suppress(Enough):
        ray_moe.train(config, phases.hear)
    wall = watch.recordings("wall")
    main, hosts = find(wall, TRAIN_STEP)
    cpu = watch.recordings("cpu", [main, *hosts])
    return Watched(wall, cpu, phases.samples, main, hosts, watch.other_cores(wall.values()))
