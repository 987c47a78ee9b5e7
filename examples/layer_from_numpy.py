"""One MoE layer of a running service, from a program that has numpy and neither torch nor Ray.

`pip install 'ray-moe[client]'`, then `python examples/layer_from_numpy.py --target 127.0.0.1:8476 --width 128`: hidden
states go out, by a routing of one's own or by the model's gate, and rows come back. Without a target, a service on a
small model is started beside it (which needs `ray-moe[serve]`), by `ray-moe serve` in a process of its own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ray_moe import Client
from ray_moe.client.requests import Forward

WRITE = "import sys, pathlib; from ray_moe.models.byte_level import write_new; write_new(pathlib.Path(sys.argv[1]))"
SERVE = "--actors 2 --port 0 --set server.http_port=null --set experts.num_cpus=0.1 --set router.num_cpus=0.1"


@contextmanager
def started() -> Iterator[str]:
    """A service for as long as the block; where it listens."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", WRITE, folder], check=True)
        command = [sys.executable, "-m", "ray_moe.cli.main", "serve", folder, *SERVE.split()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
            try:
                said = ""
                while not (found := re.search(r"serving .* on (\S+) \(gRPC\)", said)):
                    if not (said := service.stdout.readline()):
                        raise SystemExit("the service did not start")
                yield found[1]
            finally:
                service.terminate()


def ask(target: str, num_tokens: int, width: int) -> None:
    """Letters in shapes: T tokens, D width of the layer, K experts per token."""
    rng = np.random.default_rng(0)
    with Client(target) as client:
        layer, experts = next(iter(client.placement().placement.hosts_of.items()))
        hidden = rng.standard_normal((num_tokens, width), dtype=np.float32)  # [T, D]
        index = np.stack([rng.permutation(len(experts))[:2] for _ in hidden])  # [T, K]
        weight = np.full(index.shape, 0.5, np.float32)  # [T, K]
        whole = client.forward(layer, hidden, index, weight)  # [T, D]
        halves = (Forward(layer, hidden, index[:, [k]], weight[:, [k]]) for k in range(2))
        apart = sum(client.forward_stream(halves))  # two batches on one call
        print(f"{layer}: {whole.shape} through 2 of {len(experts)} experts for each token")
        print(f"both experts at once, and one after the other: {np.abs(whole - apart).max():.0e} apart")
        print(f"by the model's own gate: {client.forward(layer, hidden).shape}")
    print(f"torch is loaded: {'torch' in sys.modules}; Ray is loaded: {'ray' in sys.modules}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="HOST:PORT of a service; without it one is started")
    parser.add_argument("--width", type=int, default=128, help="D of the model: hidden_size in its config.json")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.target:
        ask(arguments.target, arguments.tokens, arguments.width)
    else:
        with started() as target:
            ask(target, arguments.tokens, arguments.width)


if __name__ == "__main__":
    main()
