"""A backend that looks busy: tokens flow to skewed experts on many hosts, for the page to show."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from ray_moe.errors import RayMoEError
from ray_moe.runtime.measures import Measures
from ray_moe.types import (
    ClusterEvent,
    HostAddress,
    HostStatus,
    LayerSpec,
    Placement,
    RouterAddress,
    RouterStatus,
    RoutingTable,
    ServiceStatus,
    VersionStatus,
)
from tests.unit.service.fake_backend import FakeBackend

TOKENS_PER_S = 840


class BusyBackend(FakeBackend):
    """`num_layers` x `num_experts` on `num_hosts`; what has flowed is counted at each look."""

    def __init__(self, num_layers: int = 4, num_experts: int = 8, num_hosts: int = 3) -> None:
        super().__init__()
        self.began_s = time.monotonic()
        self.now_s = 0.0
        self.num_looks = 0
        self.status_failure: RayMoEError | None = None
        self.lost: set[str] = set()
        self.events = [ClusterEvent(time.time() - 240, "published", "version 2: /models/kite-2, after 4.1 s")]
        self.changing = ""
        random = np.random.default_rng(7)
        self.paths = [f"model.layers.{number}.mlp.experts" for number in range(num_layers)]
        self.layers = {path: LayerSpec(path, num_experts, 64, 64, "bfloat16", 100) for path in self.paths}
        self.hosts = [f"expert-{number}" for number in range(num_hosts)]
        self.tokens = {path: np.zeros(num_experts, np.int64) for path in self.paths}
        self._share = {path: random.dirichlet(np.full(num_experts, 0.6)) for path in self.paths}
        self._random = random
        hosts_of = {}
        for path in self.paths:
            hot = np.argsort(self._share[path])[-max(1, num_experts // 10) :]
            hosts_of[path] = tuple(
                tuple(self.hosts[(expert + extra) % num_hosts] for extra in range(2 if expert in hot else 1))
                for expert in range(num_experts)
            )
        self.placement_now = Placement(hosts_of)
        self.epoch = 31
        self.generated = 0

    # --- what a test lets happen ---
    def lose(self, host: str) -> None:
        self.lost.add(host)
        self.epoch += 1
        self.events.append(ClusterEvent(time.time(), "lost", host))

    def repair(self, host: str) -> None:
        self.lost.discard(host)
        self.epoch += 1
        self.events.append(ClusterEvent(time.time(), "repaired", f"{host} holds its experts again"))

    def advance(self) -> None:
        """Up to now."""
        self.num_looks += 1
        before_s, self.now_s = self.now_s, time.monotonic() - self.began_s
        tokens = int(
            TOKENS_PER_S
            * (self.now_s - before_s)
            * (1 + 0.12 * math.sin(self.now_s / 9) + 0.03 * self._random.standard_normal())
        )
        self.generated += tokens
        for path in self.paths:
            self._share[path] = 0.97 * self._share[path] + 0.03 * self._random.dirichlet(self._share[path] * 40 + 0.02)
            self.tokens[path] += self._random.multinomial(tokens * 8, self._share[path] / self._share[path].sum())
        for gap_s in self._random.gamma(9, 0.004, size=40):
            self.vitals.token_gaps_s.observe(float(gap_s))
        for first_s in self._random.gamma(5, 0.03, size=6):
            self.vitals.first_tokens_s.observe(float(first_s))

    # --- the backend ---
    async def status(self) -> ServiceStatus:
        if self.status_failure is not None:
            raise self.status_failure
        return ServiceStatus(
            model="/models/kite-2",
            model_type="deepseek_v3",
            version="0.1.0",
            state="degraded" if self.lost else "ready",
            uptime_s=8054 + self.now_s,
            epoch=self.epoch,
            router=self._router(),
            hosts=tuple(self._host(number) for number in range(len(self.hosts))),
            tokens_per_expert={},
            changing=self.changing,
            events=tuple(self.events),
            p_lossless=0.94,
            routers=(RouterAddress("router-0", "127.0.0.1:8476", "http://127.0.0.1:8477", True),),
            versions=(VersionStatus(1, "/models/kite-1", "kept"), VersionStatus(2, "/models/kite-2", "current")),
        )

    def _router(self) -> RouterStatus:
        balance = 0.93 + 0.03 * math.sin(self.now_s / 5) - (0.25 if self.lost else 0)
        return RouterStatus(
            4711, 3 * 2**30, 2 * 2**30, 38, 3, self.generated, 4, 0, 11, 4096, 2**28, 0, balance, 0.083, "router-0"
        )

    def _host(self, number: int) -> HostStatus:
        name = self.hosts[number]
        if name in self.lost:
            return HostStatus(name, "lost", _node(number), restarts=1, weight_bytes=9 * 2**30)
        busy = min(1.0, max(0.0, 0.62 + 0.2 * math.sin(number * 2.1) + 0.06 * math.sin(self.now_s / 3 + number)))
        held = sum(map(len, self.placement_now.experts_on(name).values()))
        rows = int(self.now_s * 900) * (1 + number % 3)
        node = _node(number)
        size = 9 * 2**30
        return HostStatus(
            name, "ready", node, 5000 + number, 0, 11 * 2**30, size, size, held, 9, rows, busy, int(busy * 40)
        )

    def measures(self) -> Measures:
        self.advance()
        there = [host for host in self.hosts if host not in self.lost]
        addresses = {host: HostAddress(host, "life", "node", 1, "127.0.0.1:1", "") for host in there}
        speeds = {host: 1.0 if number % 4 else 2.0 for number, host in enumerate(self.hosts)}
        table = RoutingTable(self.epoch, self.placement_now, addresses, speeds)
        tokens = {path: counts.copy() for path, counts in self.tokens.items()}
        return replace(super().measures(), router=self._router(), tokens_per_expert=tokens, table=table)


def _node(number: int) -> str:
    """Two hosts are on each."""
    return f"{(number // 2 + 3) * 2654435761 % 2**32:08x}"
