"""The composition root: from a configuration to a running service, and back to nothing.

The only place that names concrete classes to each other. It opens the checkpoint and checks it and the machine before
anything starts, joins or starts Ray, starts the launcher and the controller, and waits for them. `ray-moe serve`, the
demo and the tests all start the service through `Service`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_moe import __version__, errors
from ray_moe.actors import tracing
from ray_moe.actors.controller import Controller
from ray_moe.actors.launcher import Launcher, worker_env
from ray_moe.actors.spec import NAMESPACE, ClusterStatus, ServiceSpec
from ray_moe.config import Config
from ray_moe.errors import InsufficientResources, RayMoEError, Unavailable
from ray_moe.models.huggingface import Checkpoint
from ray_moe.policy.placement import choose_num_hosts, place_by_index
from ray_moe.service import cluster, doors, membership, preflight
from ray_moe.transport.settings import MemberCertificate
from ray_moe.types import RouterAddress

POLL_S = 0.1
WATCH_EVERY_S = 5.0
WATCH_TIMEOUT_S = 2.0
SILENT_S = 30.0
"""A controller that is only restarted answers again long before."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceProgress:
    """How far the start has come."""

    stage: str
    done_bytes: int = 0
    """Expert weights loaded by all actors."""
    total_bytes: int = 0
    detail: str = ""


class Service:
    """One model, served. Start it once, stop it once; also a context manager."""

    def __init__(
        self,
        config: Config,
        on_progress: Callable[[ServiceProgress], None] = lambda progress: None,
        *,
        name: str = "",
        keep_routers: bool = True,
        reserved: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Starts nothing yet.

        Args:
            config: all settings.
            on_progress: hears how far the start has come.
            name: prefix of the actors' names; empty is `config.service_name`.
            keep_routers: whether the routers are its own; otherwise others start them (`service/deployment.py`), and
                it is ready when the experts are.
            reserved: resources that others will need beside it, by name (CPU, GPU); of several, the first that leave
                it enough.
        """
        self.config = config
        self.spec: ServiceSpec | None = None
        """What routers need to know; from the start on."""
        self._on_progress = on_progress
        self._name = name or config.service_name
        self._reserved = tuple(reserved) or ({},)
        self._routers = tuple(f"router-{number}" for number in range(config.router.num_actors if keep_routers else 0))
        self._joined = cluster.Joined.NOT_YET
        self._launcher: Any = None
        self._controller: Any = None
        self._router: RouterAddress | None = None
        self._stopped = threading.Event()

    @property
    def address(self) -> str:
        """``host:port`` of the gRPC front door, of the first router if there are several; empty before the start."""
        return self._router.grpc_address if self._router else ""

    @property
    def http_address(self) -> str:
        """``http://host:port`` of its HTTP front door; empty when there is none."""
        return self._router.http_address if self._router else ""

    def start(self) -> None:
        """Start everything and return when clients can be answered.

        Raises: `NotFound`, `InvalidCheckpoint`, `UnsupportedModel`, `InvalidConfig` (of `transport.tls`) before
        anything is started; `InvalidConfig`, `InsufficientResources`, `Unavailable` (too slow) with everything stopped
        again.
        """
        tracing.check(self.config.tracing)
        self._on_progress(ServiceProgress("checkpoint", detail=self.config.model))
        checkpoint = Checkpoint.open(self.config.model, encoder_decoder=True).cut(self.config.experts.tensor)
        config = membership.confined(self.config, ray_encrypted=membership.ray_is_encrypted(os.environ))
        certificate = membership.certificate_of(config.transport)
        try:
            self._on_progress(ServiceProgress("ray", detail=self.config.ray.address))
            self._joined = cluster.join(
                self.config.ray,
                log_to_driver=self.config.logs.to_driver,
                forks=config.ray.warm_start is not False and not config.experts.num_gpus,
            )
            if config.ray.warm_start is None:
                warm = config.ray.model_copy(update={"warm_start": self._joined is cluster.Joined.STARTED})
                config = config.model_copy(update={"ray": warm})
            spec = self.spec = self._find_room(checkpoint, config, certificate)
            self._on_progress(ServiceProgress("actors", detail=f"{len(spec.hosts)} expert actors"))
            self._launch(spec)
            self._await_ready(spec)
        except BaseException:
            self.stop()
            raise

    def _find_room(self, checkpoint: Checkpoint, config: Config, certificate: MemberCertificate | None) -> ServiceSpec:
        room = cluster.room()
        for reserved in self._reserved[:-1]:
            with contextlib.suppress(InsufficientResources):
                return self._specify(checkpoint, config, certificate, room.without(reserved))
        return self._specify(checkpoint, config, certificate, room.without(self._reserved[-1]))

    def _specify(
        self, checkpoint: Checkpoint, config: Config, certificate: MemberCertificate | None, room: preflight.Room
    ) -> ServiceSpec:
        experts, scaling = self.config.experts, self.config.scaling
        first = max(1, scaling.min_actors) if scaling.enabled and experts.experts_per_actor is None else None
        num_hosts = choose_num_hosts(
            checkpoint.num_experts,
            experts.num_actors or first,
            experts.experts_per_actor,
            preflight.actor_slots(self.config, room.free),
        )
        hosts = tuple(f"expert-{number}" for number in range(num_hosts))
        standbys = tuple(f"expert-{num_hosts + number}" for number in range(experts.standby_actors))
        layers = checkpoint.layers_as(experts.quantization)
        spec = ServiceSpec(
            config=config,
            name=self._name,
            version=__version__,
            model_type=checkpoint.model_type,
            layers=layers,
            placement=place_by_index({layer.path: layer.num_experts for layer in layers}, hosts),
            hosts=hosts,
            standbys=standbys,
            routers=self._routers,
            token=secrets.token_urlsafe(32),
            open_door=doors.open_all,
            certificate=certificate,
        )
        preflight.check(spec, checkpoint.backbone_bytes, room)
        return spec

    def _launch(self, spec: ServiceSpec) -> None:
        here = ray.get_runtime_context().get_node_id()
        control = {
            "num_cpus": 0,  # they only think now and then: the CPUs are for the router and the experts
            # Ray (2.60) puts an actor that asks for nothing to any node, which may not know this one yet.
            "memory": 1,
            "max_concurrency": 1000,
            "max_restarts": -1,
            "namespace": NAMESPACE,
            # The service ends with this process: no other node's end should be its end.
            "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True),
            "runtime_env": {"env_vars": worker_env(1)},
        }
        try:
            self._launcher = (
                ray.remote(Launcher)
                .options(name=spec.actor_name("launcher"), max_task_retries=-1, **control)
                .remote(spec)
            )
            self._controller = (
                ray.remote(Controller).options(name=spec.actor_name("controller"), **control).remote(spec)
            )
        except ValueError as error:  # the name is taken
            raise errors.InvalidConfig(
                f"a service named {self._name!r} runs on this cluster already; stop it, or set another service_name"
            ) from error

    def _await_ready(self, spec: ServiceSpec) -> None:
        total_bytes = sum(layer.expert_bytes * layer.num_experts for layer in spec.layers)
        give_up_at = time.monotonic() + self.config.experts.start_timeout_s
        while True:
            status = self._ask()
            if status is not None:
                if status.state == "failed":
                    error_class: type[RayMoEError] = getattr(errors, status.failure_class, RayMoEError)
                    raise error_class(status.failure)
                self._router = status.routers[0] if status.routers else None
                ready = sum(host.state in ("ready", "standby") for host in status.hosts)
                self._on_progress(
                    ServiceProgress(
                        "loading" if status.state == "starting" else status.state,
                        done_bytes=min(total_bytes, sum(host.loaded_bytes for host in status.hosts)),
                        total_bytes=total_bytes,
                        detail=f"{ready} of {len(status.hosts)} expert actors ready",
                    )
                )
                if status.state == "ready":
                    return
            if time.monotonic() > give_up_at:
                waiting = [] if status is None else [f"{h.host_id} {h.state}" for h in status.hosts]
                raise Unavailable(
                    f"the service did not start in {self.config.experts.start_timeout_s:g} s ({', '.join(waiting)}); "
                    "if the cluster lacks resources add nodes, else raise experts.start_timeout_s"
                )
            time.sleep(POLL_S)

    def _ask(self, timeout_s: float = 10.0) -> ClusterStatus | None:
        """The controller's status; None while it is being restarted. Raises what the controller itself raised."""
        try:
            status: ClusterStatus = ray.get(self._controller.status.remote(), timeout=timeout_s)
        except RayTaskError as error:  # it is there, and asking again would end the same
            if isinstance(error.cause, RayMoEError):
                raise error.cause from None
            cause = error.cause or error
            reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
            raise RayMoEError(f"the controller failed: {reason}") from error
        except (RayError, TimeoutError):
            return None
        return status

    def wait(self) -> None:
        """Block until SIGINT, SIGTERM or `stop` from another thread. Call it in the main thread.

        Meanwhile the log says when the controller is gone for long, because then nothing that is lost is replaced.
        """
        watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        watcher.start()
        previous = {
            number: signal.signal(number, lambda *_: self._stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            while not self._stopped.wait(0.5):
                pass
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            watcher.join()  # before Ray is left: nobody may ask afterwards

    def _watch(self) -> None:
        heard_s, is_gone = time.monotonic(), False
        while not self._stopped.wait(WATCH_EVERY_S):
            try:
                answers = self._ask(WATCH_TIMEOUT_S) is not None
            except RayMoEError:  # it is there
                answers = True
            if answers:
                heard_s = time.monotonic()
                if is_gone:
                    logger.warning("the controller answers again")
                is_gone = False
            elif not is_gone and time.monotonic() - heard_s > SILENT_S:
                is_gone = True
                logger.error(
                    "the controller has not answered for %.0f s: clients may be answered still, but what is lost is "
                    "not replaced. If it stays like this, Ray has ended on this node: start the service again",
                    SILENT_S,
                )

    def stop(self) -> None:
        """Finish what was accepted within the configured grace, end every actor, and leave the cluster. Idempotent."""
        self._stopped.set()
        controller, self._controller = self._controller, None
        launcher, self._launcher = self._launcher, None
        if ray.is_initialized():
            if controller is not None:
                try:
                    ray.get(controller.stop.remote(), timeout=self.config.server.grace_s + 10)
                except (RayError, TimeoutError):
                    self._on_progress(ServiceProgress("stopping", detail="the controller does not answer; killing"))
            for actor in (controller, launcher):
                if actor is not None:
                    ray.kill(actor)
        cluster.leave(self._joined)
        self._joined = cluster.Joined.NOT_YET

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
