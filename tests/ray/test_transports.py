"""Every way for tokens to travel gives the same tokens, and serves on when an actor is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from ray_moe.client.sync import Client
from tests.ray.support import Streams, all_ready, await_status, greedy, prompts

NUM_TOKENS = 64


def is_connected(unix: str) -> bool:
    """Whether a router has a line to the host that listens there, which is one of the two."""
    sockets = Path("/proc/net/unix").read_text().splitlines()
    return len([line for line in sockets if line.endswith(f"@{unix}")]) > 1


@pytest.mark.parametrize(
    "transport",
    [
        pytest.param({"kind": "grpc", "inline_bytes": 0}, id="shared-memory"),
        pytest.param({"kind": "grpc", "shared_memory": False, "chunk_bytes": 4096}, id="inline"),
        pytest.param({"kind": "object_store"}, id="object-store"),
        pytest.param({"kind": "auto"}, id="auto"),
        pytest.param({"kind": "auto", "shared_memory": False, "chunk_bytes": 4096}, id="auto-inline"),
    ],
)
def test_the_same_tokens(mixtral, serve, transport):
    reference, folder = mixtral
    expected = greedy(reference, prompts(4), NUM_TOKENS)
    service = serve(folder, experts={"num_actors": 1}, transport=transport)
    hidden = np.random.default_rng(0).standard_normal((3000, 32), dtype=np.float32)
    with Client(service.address) as client:
        with Streams(service.address, prompts(4), NUM_TOKENS) as streams:
            pass
        assert streams.results == expected
        assert [is_connected(host.unix) for host in client.placement().addresses.values()] == [
            transport["kind"] == "auto"
        ]
        before = client.forward(0, hidden)

        (victim,) = await_status(client, all_ready).hosts
        with Streams(service.address, prompts(4), NUM_TOKENS) as streams:
            streams.wait_for(10)
            os.kill(victim.pid, signal.SIGKILL)
        assert streams.results == expected
        np.testing.assert_allclose(client.forward(0, hidden), before, rtol=1e-5, atol=1e-5)
