"""Joining a Ray cluster, or starting one here, and leaving it as it was. Called by `service/composition.py`."""

from __future__ import annotations

import enum
import logging
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from ray._raylet import Config  # type: ignore[attr-defined]

from ray_moe.actors import warm
from ray_moe.actors.launcher import worker_env
from ray_moe.actors.spec import NAMESPACE
from ray_moe.config import RayConfig
from ray_moe.errors import Unavailable
from ray_moe.runtime.memory import available_bytes
from ray_moe.service.preflight import Node, Room

logger = logging.getLogger(__name__)

CALM_S = 1.0
"""When for this long nothing has been given back, what is taken is in use."""

SETTLE_S = 10.0
"""And no longer than this is waited for it."""

POLL_S = 0.05

RAY_ENVIRONMENT = {
    # A caller of a restartable actor hears of its death after 50 ms instead of 1.5-1.9 s (measured, Ray 2.60).
    "RAY_timeout_ms_task_wait_for_death_info": "20",
    "RAY_core_worker_internal_heartbeat_ms": "100",
    # A hung actor that is put down is gone after half a second instead of five.
    "RAY_kill_worker_timeout_milliseconds": "500",
    # Ray gives workers a nice value of 15 after they have started. While one starts, for a second or two, those that
    # serve on the same cores would stand still (measured: 1.0-1.5 s with two that start on two cores, 0.4 s with this).
    "RAY_worker_niceness": "0",
}
"""What the processes of a Ray that serves experts should have in their environment, on every node."""


class Joined(enum.Enum):
    """How this process came to Ray, and so how it leaves."""

    NOT_YET = "not yet"
    STARTED = "started it"
    CONNECTED = "connected to a running one"
    FOUND = "was connected already"


def join(config: RayConfig, *, log_to_driver: bool = False, forks: bool = False) -> Joined:
    """Connect to the configured cluster, starting one for ``local``. A connection this process has is used as it is.

    Args:
        log_to_driver: whether Ray writes here what the actors write.
        forks: whether actors of a Ray that is started will be forked from a warm process; it starts at the same time.

    Raises: `Unavailable` when the cluster does not answer.
    """
    if ray.is_initialized():
        return Joined.FOUND
    local = config.address == "local"
    _set_auth_mode(config.auth)
    start_or_connect = partial(_start, config) if local else partial(ray.init, address=config.address)
    if local and forks:
        warm.begin(worker_env(1))
    try:
        start_or_connect(namespace=NAMESPACE, log_to_driver=log_to_driver, logging_level="error")
    except Exception as error:  # Ray has many, and a bare one for a node that does not come up
        warm.end()
        raise Unavailable(
            f"cannot {'start' if local else 'reach'} Ray at {config.address!r}: {error}; "
            + (
                "see /tmp/ray/session_latest/logs"
                if local
                else "check the address, and the cluster's token (RAY_AUTH_TOKEN)"
            )
        ) from error
    return Joined.STARTED if local else Joined.CONNECTED


def _start(config: RayConfig, **options: Any) -> None:
    """Start Ray on this machine.

    On a busy one Ray's node may give up: its agents have 15 s to tell their ports, by which they must have been loaded.
    The next attempt finds them in the page cache.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    attempt = partial(
        ray.init,
        address="local",
        num_cpus=config.num_cpus,
        object_store_memory=config.object_store_bytes,
        include_dashboard=False,
        **options,
    )
    try:
        attempt()
    except Exception as error:
        if type(error) is not Exception:
            raise
        logger.warning("Ray did not start, and is started again: %s", error)
        ray.shutdown()
        attempt()


def _set_auth_mode(mode: str) -> None:
    """Whether this process shows the cluster's token (RAY_AUTH_TOKEN, or ~/.ray/auth_token).

    Ray 2.60 turns it on by itself for a cluster it starts and for address="auto", but not for HOST:PORT (20 s, then a
    bare ConnectionError). It reads the variable when it is imported, which has happened: hence the second line, which
    is what Ray itself does after it has set the variable.
    """
    os.environ["RAY_AUTH_MODE"] = mode
    Config.initialize("")


def leave(joined: Joined) -> None:
    """Undo `join`."""
    if joined in (Joined.STARTED, Joined.CONNECTED) and ray.is_initialized():
        ray.shutdown()
    if joined is Joined.STARTED:
        warm.end()


def room() -> Room:
    """What the living nodes offer, and what of it is free; for this machine, the memory that the system says is."""
    here = ray.get_runtime_context().get_node_id()
    nodes = tuple(
        Node(
            memory_bytes=available_bytes() if node["NodeID"] == here else int(node["Resources"].get("memory", 0)),
            labels=node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    return Room(ray.cluster_resources(), _free_resources(), nodes)


def _free_resources() -> Mapping[str, float]:
    """What nobody has reserved, once the actors of a service that has just stopped are gone."""
    total, free = _without_store(ray.cluster_resources()), _without_store(ray.available_resources())
    began_at = changed_at = time.monotonic()
    while free != total and time.monotonic() < min(changed_at + CALM_S, began_at + SETTLE_S):
        time.sleep(POLL_S)
        now = _without_store(ray.available_resources())
        if now != free:
            free, changed_at = now, time.monotonic()
    return free


def _without_store(resources: Mapping[str, float]) -> Mapping[str, float]:
    """Without the object store, where every object takes of what is free."""
    return {name: amount for name, amount in resources.items() if name != "object_store_memory"}
