"""Nobody holds what is not theirs: the router the model without its routed experts, an actor its share of these."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ray_moe.client.sync import Client
from tests.ray.sparse import sparse_mixtral
from tests.ray.support import PROMPT

MB = 10**6
ROUTER_SLACK_BYTES = 200 * MB
ACTOR_SLACK_BYTES = 300 * MB


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs: what it holds, page cache apart."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def test_the_memory_of_router_and_actors(tmp_path, serve):
    """For a checkpoint of 1.6 GB. A standby without experts shows what a process has before it holds anything."""
    sparse_mixtral(tmp_path, hidden=768, inner=1216, layers=16, experts=16, vocab=32000)
    service = serve(tmp_path, experts={"num_actors": 2, "standby_actors": 1})
    rng = np.random.default_rng(0)
    with Client(service.address) as client:
        client.generate(token_ids=PROMPT, max_new_tokens=8, ignore_eos=True)
        for layer in range(16):
            client.forward(layer, rng.standard_normal((256, 768), dtype=np.float32))
        status = client.status()
    (standby,) = [host for host in status.hosts if host.state == "standby"]
    actors = [host for host in status.hosts if host.state == "ready"]
    total_bytes = status.router.backbone_bytes + sum(host.weight_bytes for host in actors)
    base_bytes = anonymous_bytes(standby.pid)
    router_bytes = anonymous_bytes(status.router.pid) - base_bytes
    actor_bytes = [anonymous_bytes(host.pid) - base_bytes for host in actors]
    print(
        f"checkpoint {total_bytes / MB:.0f} MB, process before weights {base_bytes / MB:.0f} MB; router "
        f"+{router_bytes / MB:.0f} MB for {status.router.backbone_bytes / MB:.0f} MB of weights; actors "
        + ", ".join(
            f"+{grown / MB:.0f} MB for {host.weight_bytes / MB:.0f} MB"
            for grown, host in zip(actor_bytes, actors, strict=True)
        )
    )
    assert 1500 * MB < total_bytes < 1700 * MB
    assert len(actors) == 2
    assert router_bytes < status.router.backbone_bytes + ROUTER_SLACK_BYTES
    for grown, host in zip(actor_bytes, actors, strict=True):
        assert host.weight_bytes == host.loaded_bytes
        assert grown < host.weight_bytes + ACTOR_SLACK_BYTES
