"""Joining Ray where there is none to join."""

from __future__ import annotations

import pytest
import ray

from ray_moe.config import RayConfig
from ray_moe.errors import Unavailable
from ray_moe.service import cluster


@pytest.mark.parametrize("error", [ConnectionError("no"), RuntimeError("no"), Exception("no")], ids=repr)
@pytest.mark.parametrize(
    ("address", "advice"), [("local", "cannot start.*session_latest/logs"), ("10.0.0.1:6379", "cannot reach.*address")]
)
def test_whatever_ray_raises_is_told_with_what_to_do(monkeypatch, error, address, advice):
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_set_auth_mode", lambda mode: None)
    with pytest.raises(Unavailable, match=advice):
        cluster.join(RayConfig(address=address))


def test_a_node_that_did_not_come_up_is_started_once_more(monkeypatch):
    started: list[object] = []

    def init(address: str, **_: object) -> None:
        started.append(address)
        if len(started) == 1:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_set_auth_mode", lambda mode: None)
    assert cluster.join(RayConfig()) is cluster.Joined.STARTED
    assert started == ["local", "local"]
