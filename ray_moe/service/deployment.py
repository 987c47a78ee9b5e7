"""The service as an application of Ray Serve: Serve keeps the routers, and carries HTTP to them.

How many routers there are, on which nodes, whether they are well and how they are replaced by those of a new version is
Serve's business. All routers of a version share one set of experts, which belongs to an actor of that version: Serve
starts it before the version's first router and ends it after the last. Built by `app.py`.

Serve's controller unpickles what is here: so what needs torch is imported where it runs.
"""

from __future__ import annotations

import hashlib
from typing import Any

import ray
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, DeploymentActorConfig

from ray_moe.actors.launcher import worker_env
from ray_moe.actors.router import Router
from ray_moe.actors.spec import ServiceSpec
from ray_moe.config import Config
from ray_moe.errors import InvalidConfig, Unavailable
from ray_moe.service.grpc import proxied
from ray_moe.service.router_scaling import REQUESTS, routers_for_requests

EXPERTS = "experts"
STOP_MARGIN_S = 10.0
"""What a router may take to stop beyond the grace of its requests."""


class ExpertSet:
    """The experts of one version of the application: up when it is constructed, gone when it ends."""

    def __init__(self, config: Config) -> None:
        """Raises what `Service.start` does, which Serve shows as the reason of a failed deployment."""
        from ray_moe.service.composition import Service

        version = serve.get_deployment_actor_context().code_version or ""
        short = hashlib.sha256(version.encode()).hexdigest()[:8]
        self._service = Service(config, name=f"{config.service_name}-{short}", keep_routers=False)
        self._service.start()

    def spec(self) -> ServiceSpec:
        """What a router of this version needs to know."""
        if self._service.spec is None:
            raise Unavailable("the experts are not up; retry later")
        return self._service.spec


class RouterReplica:
    """A router that Serve keeps: its own gRPC front door, and HTTP and gRPC through Serve's proxies."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        experts = serve.get_deployment_actor(EXPERTS)
        spec: ServiceSpec = await experts.spec.remote()
        self._router = Router(f"router-{serve.get_replica_context().replica_tag}", spec)
        await self._router.start()

    def __serve_build_asgi_app__(self) -> Any:
        return self._router.door.http_app

    async def check_health(self) -> None:
        """Raises `Unavailable` when the router's experts have ended without it: it is then replaced."""
        await self._router.check_controller()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Requests of all its doors, for `routers_for_requests`; Serve knows of those by HTTP alone."""
        return {REQUESTS: float(self._router.num_requests)}

    async def __del__(self) -> None:
        await self._router.stop()


for _name, _answer in proxied.methods(lambda replica: replica._router.door.find).items():
    setattr(RouterReplica, _name, _answer)


def application(config: Config) -> serve.Application:
    """The application, not yet run.

    Raises: `InvalidConfig` without keys, as Serve's proxies may listen anywhere.
    """
    router, server = config.router, config.server
    if not server.keys_file and not server.allow_anonymous:
        raise InvalidConfig(
            "without keys everybody who reaches the proxies of Ray Serve could use the model: set server.keys_file "
            "(`ray-moe keys`), or, if all of them may, server.allow_anonymous=true"
        )
    options: dict[str, Any] = {"num_replicas": router.num_actors}
    if router.max_actors is not None:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=router.num_actors,
                max_replicas=router.max_actors,
                target_ongoing_requests=router.target_requests,
                policy=AutoscalingPolicy(policy_function=routers_for_requests),
            )
        }
    deployment = serve.deployment(
        serve.ingress()(RouterReplica),
        name="Router",
        # Who is let in, and who waits, is the router's own business.
        max_ongoing_requests=router.max_concurrent_requests + router.max_queued_requests,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=server.grace_s + STOP_MARGIN_S,
        ray_actor_options={
            "num_cpus": router.num_cpus,
            "num_gpus": router.num_gpus,
            "runtime_env": {"env_vars": worker_env(router.num_threads)},
        },
        deployment_actors=[
            DeploymentActorConfig(
                name=EXPERTS,
                actor_class=ray.remote(ExpertSet),
                init_args=(config,),
                actor_options={
                    "num_cpus": 0,
                    # Beside Serve's controller: Ray would put it to any node, also to one that a cloud takes back.
                    "resources": {HEAD_NODE_RESOURCE_NAME: 0.001},
                    "runtime_env": {"env_vars": worker_env(1)},
                },
            )
        ],
        **options,
    )
    return deployment.bind()
