"""Joining a Ray cluster, or starting one on this machine, and leaving it as it was. Called by `service/app.py`."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping

import ray
from ray._raylet import Config  # type: ignore[attr-defined]

from ray_moe.config import RayConfig
from ray_moe.errors import Unavailable
from ray_moe.service.memory import available_bytes

NAMESPACE = "ray_moe"

QUICK_FAILURE_DETECTION = {
    # A caller of a restartable actor hears of its death after 50 ms instead of 1.5-1.9 s (measured, Ray 2.60).
    "RAY_timeout_ms_task_wait_for_death_info": "20",
    "RAY_core_worker_internal_heartbeat_ms": "100",
    # A hung actor that is put down is gone after half a second instead of five.
    "RAY_kill_worker_timeout_milliseconds": "500",
}


class Joined(enum.Enum):
    """How this process came to Ray, and so how it leaves."""

    NOT_YET = "not yet"
    STARTED = "started it"
    CONNECTED = "connected to a running one"
    FOUND = "was connected already"


def join(config: RayConfig) -> Joined:
    """Connect to the configured cluster, starting one for ``local``. A connection this process has is used as it is.

    Raises: `Unavailable` when the cluster does not answer.
    """
    if ray.is_initialized():
        return Joined.FOUND
    local = config.address == "local"
    _set_auth_mode(config.auth)
    try:
        if local:
            for name, value in QUICK_FAILURE_DETECTION.items():
                os.environ.setdefault(name, value)
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                object_store_memory=config.object_store_bytes,
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
        else:
            ray.init(address=config.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unavailable(
            f"cannot {'start' if local else 'reach'} Ray at {config.address!r}: {error}; "
            + (
                "see /tmp/ray/session_latest/logs"
                if local
                else "check the address, and the cluster's token (RAY_AUTH_TOKEN)"
            )
        ) from error
    return Joined.STARTED if local else Joined.CONNECTED


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


def total_resources() -> Mapping[str, float]:
    """What all living nodes offer, by resource name (CPU, GPU, memory in bytes, custom ones)."""
    resources: Mapping[str, float] = ray.cluster_resources()
    return resources


def node_memory_bytes() -> list[int]:
    """Memory that is free for actors on each living node; for this machine what the system says is available."""
    here = ray.get_runtime_context().get_node_id()
    return [
        available_bytes() if node["NodeID"] == here else int(node["Resources"].get("memory", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]
