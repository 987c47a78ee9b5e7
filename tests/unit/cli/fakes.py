"""A service and a client that answer from memory, for the commands' tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ray_moe.errors import Unavailable
from ray_moe.types import GenerateChunk, HostAddress, HostStatus, Placement, RouterStatus, RoutingTable, ServiceStatus

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def status(**changes: Any) -> ServiceStatus:
    """Two hosts of two experts each, in two layers."""
    host = HostStatus("expert-0", "ready", "n" * 56, 101, 0, 300_000_000, 1_600_000, 1_600_000, 4, 20, 44, 0.62)
    hosts = (host, replace(host, host_id="expert-1", pid=102, restarts=1, num_rows=33))
    router = RouterStatus(100, 450_000_000, 1_000_000, 1, 2, 64, 3, failed_requests=5, hedged_calls=9, balancedness=0.5)
    tokens = {LAYERS[0]: (0, 10, 20, 10), LAYERS[1]: (25, 5, 5, 5)}
    whole = ServiceStatus(
        "models/[tiny]", "qwen3_moe", "0.1.0", "ready", 3725.0, 7, router, hosts, tokens, p_lossless=0.75
    )
    return replace(whole, **changes)


def table() -> RoutingTable:
    """Where they are."""
    hosts_of = dict.fromkeys(LAYERS, (("expert-0",), ("expert-0",), ("expert-1",), ("expert-1",)))
    address = HostAddress("expert-0", "life", "n" * 56, 101, "127.0.0.1:1", "x")
    return RoutingTable(7, Placement(hosts_of), {"expert-0": address})


def continuation(prompt: str, num_tokens: int) -> list[int]:
    """What the fake model says: the bytes of the prompt, over and over."""
    letters = prompt.encode()
    return [letters[i % len(letters)] for i in range(num_tokens)]


class FakeClient:
    """Stands in for `ray_moe.client.sync.Client`."""

    fails_after: int | None = None
    """Streams break off after this many tokens."""
    starting = False
    calls: list[dict[str, Any]]

    def __init__(self, target: str, timeout_s: float | None = None, **access: Any) -> None:
        self.target = target
        self.access = access
        self.calls = []

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...

    def stream(self, prompt: str | None = None, **options: Any) -> Iterator[GenerateChunk]:
        if prompt is None:
            prompt = bytes(options["token_ids"]).decode()
        tokens = continuation(prompt, options["max_new_tokens"])
        for number, token in enumerate(tokens):
            if number == self.fails_after:
                raise Unavailable("the service broke off")
            yield GenerateChunk((token,), chr(token), "length" if number == len(tokens) - 1 else "")

    def generate(self, prompt: str, **options: Any) -> Any:
        from ray_moe.client.requests import Generation

        return Generation.of(list(self.stream(prompt, **options)))

    def status(self) -> ServiceStatus:
        return status()

    def placement(self) -> RoutingTable:
        if self.starting:
            raise Unavailable("it is starting")
        return table()


def client_that(**attributes: Any) -> type[FakeClient]:
    """A class of clients with other habits."""
    return type("Client", (FakeClient,), attributes)
