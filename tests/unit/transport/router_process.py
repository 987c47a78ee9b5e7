"""A router in a process of its own: calls a host over shared memory, says so, and waits to be killed.

``python router_process.py TOKEN ADDRESS as JSON``
"""

from __future__ import annotations

import json
import sys

import torch

from ray_moe.transport.base import ExpertCall
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress


def main(token: str, address: str) -> None:
    host = HostAddress(**json.loads(address))
    connection = StreamTransport(token, node_id=host.node_id).connect(host)
    hidden = torch.randn(5000, 64)
    replies = [
        connection.submit(ExpertCall(layer, 1, hidden, None, None, [0], [len(hidden)]))
        for layer in ("echo", "thread:1", "sleep:60")
    ]
    kept = replies[0].result().rows  # as if it were killed while it reads
    sys.stdout.write(f"{connection.shares_memory} {len(kept)}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
