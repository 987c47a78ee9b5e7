"""What holds for the tests of this folder: one local Ray for all of them, and services that leave nothing behind.

Everything here is real: Ray, gRPC, processes and signals. Checkpoints are tiny.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each actor, a process, would compile the whole package again

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_moe.actors.spec import NAMESPACE
from ray_moe.service import cluster
from ray_moe.service.composition import Service
from tests.ray.support import GPU_SHARE, agent_ports, serving
from tests.tiny_models import save

FOLDER = Path(__file__).parent

NUM_CPUS = 8
"""What this Ray may give out. Tiny models compute little, so it need not be what the machine has."""

STORE_BYTES = 200 * 2**20

LONGEST_FIRST = (
    "elastic",
    "examples",
    "faults",
    "parity",
    "serve_command",
    "autoscaling",
    "serve",
    "standby",
    "transports",
    "nodes",
)
"""The files of tests in this order, and then the others: no process of tests is left alone with a long one."""

Serve = Callable[..., Service]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)) if item.path.parent == FOLDER else -1)


@pytest.fixture(scope="session", autouse=True)
def local_ray() -> Iterator[Cluster]:
    """The Ray that every `Service` of this process finds and uses. Tests may add nodes to it, and take them away."""
    for name, value in cluster.RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    head = {
        "num_cpus": NUM_CPUS,
        "num_gpus": 1 if GPU_SHARE else 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "include_log_monitor": False,
        **agent_ports(),
        # Raylets that are killed are missed after three seconds instead of sixteen; one that is only slow is not.
        "_system_config": {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 1000,
            "health_check_timeout_ms": 10000,
            "health_check_failure_threshold": 3,
        },
    }
    nodes = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=nodes.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def add_node(local_ray: Cluster) -> Iterator[Callable[..., Any]]:
    """Adds nodes with the custom resource that only such nodes have; they leave when the module's tests are over."""
    added: list[Any] = []

    def add(slots: int, **labels: str) -> Any:
        node = local_ray.add_node(
            num_cpus=slots,
            resources={"expert_slot": slots},
            labels=labels,
            object_store_memory=STORE_BYTES,
            **agent_ports(),
        )
        added.append(node)
        return node

    yield add
    for node in added:
        if node in local_ray.worker_nodes:
            local_ray.remove_node(node)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Mixtral with room for long generations, in float32: the model in this process, and its checkpoint."""
    folder = tmp_path_factory.mktemp("mixtral")
    return save("mixtral", folder, max_position_embeddings=2048), folder


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts services as `support.serving` does; they stop, and are checked for leaks, when the test is over."""
    yield from _services()


@pytest.fixture(scope="module")
def serve_module() -> Iterator[Serve]:
    """The same for services that the tests of a module share."""
    yield from _services()


def _services() -> Iterator[Serve]:
    started: list[Any] = []

    def start(model: Path, **settings: Any) -> Service:
        context = serving(model, **settings)
        service = context.__enter__()
        started.append(context)
        return service

    yield start
    for context in reversed(started):
        context.__exit__(None, None, None)
