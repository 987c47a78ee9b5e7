"""How many routers Ray Serve is told to keep, and what it is told about them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from ray_moe.config import Config
from ray_moe.errors import InvalidConfig
from ray_moe.service.app import build
from ray_moe.service.router_scaling import REQUESTS, routers_for_requests

ARGUMENTS = {"model": "m", "server.allow_anonymous": "true"}


def wanted(*requests: float, target: float = 10.0) -> int:
    per_router: Any = {REQUESTS: {f"replica-{number}": count for number, count in enumerate(requests)}}
    config = AutoscalingConfig(min_replicas=1, max_replicas=9, target_ongoing_requests=target)
    context: Any = SimpleNamespace(aggregated_metrics=per_router if requests else None, config=config)
    return routers_for_requests(context)[0]


def test_as_many_routers_as_leave_each_its_share() -> None:
    assert wanted(25, 5) == 3
    assert wanted(20, 0) == 2
    assert wanted(20.5) == 3
    assert wanted(0, 0) == wanted() == 0  # Serve has its least


def test_the_number_is_fixed_unless_a_most_is_given() -> None:
    fixed = build({**ARGUMENTS, "router.num_actors": "3"})._bound_deployment
    assert (fixed.num_replicas, fixed._deployment_config.autoscaling_config) == (3, None)
    scaled = build({**ARGUMENTS, "router": {"num_actors": 2, "max_actors": 5, "target_requests": 7}})._bound_deployment
    bounds = scaled._deployment_config.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas, bounds.target_ongoing_requests) == (2, 5, 7)


def test_what_serve_cannot_be_told_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"server\.keys_file .*server\.allow_anonymous=true"):
        build({"model": "m"})
    with pytest.raises(InvalidConfig, match=r"did you mean 'experts\.num_actors'"):
        build({**ARGUMENTS, "experts.actors": "3"})
    with pytest.raises(InvalidConfig, match="max_actors is 1; swap them"):
        build({**ARGUMENTS, "router": {"num_actors": 2, "max_actors": 1}})
    assert Config().router.max_actors is None
