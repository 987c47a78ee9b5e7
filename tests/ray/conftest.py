"""What holds for the tests of this folder: one local Ray for all of them, and services that leave nothing behind.

Everything here is real: Ray, gRPC, processes and signals. Checkpoints are tiny.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_moe.service import cluster
from ray_moe.service.app import Service
from tests.ray.support import serving
from tests.tiny_models import save

NUM_CPUS = 8
"""What this Ray may give out. Tiny models compute little, so it need not be what the machine has."""

Serve = Callable[..., Service]


@pytest.fixture(scope="session", autouse=True)
def local_ray() -> Iterator[None]:
    """The Ray that every `Service` of this process finds and uses."""
    for name, value in cluster.QUICK_FAILURE_DETECTION.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        object_store_memory=200 * 2**20,
        namespace=cluster.NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


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
