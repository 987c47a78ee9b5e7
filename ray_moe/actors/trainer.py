"""The actor that trains as a service asks it to: a process of its own, so that what is served does not suffer.

A shell: training is `training/session.py`, with a worker made by `actors/training.py`. The launcher starts it when a
router first asks for it; Ray restarts it, and it goes on from what the expert actors hold. `Trainings` is how a router
asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from ray_moe.actors.process import made_to_stay, set_up
from ray_moe.actors.spec import TRAINER, ServiceSpec
from ray_moe.errors import InsufficientResources, InvalidConfig, InvalidRequest, RayMoEError, Unavailable
from ray_moe.types import (
    GenerateChunk,
    GenerateRequest,
    MicroBatch,
    MicroBatchReport,
    SavedState,
    StepOptions,
    StepResult,
    TrainingState,
    VersionStatus,
)

if TYPE_CHECKING:
    from ray_moe.models.huggingface import Checkpoint
    from ray_moe.training.session import Session

logger = logging.getLogger(__name__)

RESTART_TIMEOUT_S = 60.0
"""How long a router waits for a trainer that has died before it sends its client away, to come again."""
AGAIN_S = 0.2

OF_SESSION: Final = frozenset(
    {"forward_backward", "optim_step", "train_step", "discard", "sample", "save_state", "load_state", "state"}
)
"""What can be asked of a session, beside ``export``."""


class TrainerActor:
    """One session of training."""

    def __init__(self, spec: ServiceSpec) -> None:
        with made_to_stay():
            set_up(spec.config.logs, TRAINER, spec.config.train.num_threads)
            import ray_moe.actors.training  # noqa: F401  (so that the first call need not wait for it)
        self._spec = spec
        self._session: Session | None = None
        self._checkpoint: Checkpoint | None = None
        self._calling = asyncio.Lock()

    async def ping(self) -> None:
        """Answers when the process is there."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the session answers, one call after the other; it is begun by the first. Raises: as `Session`."""
        if method == "state" and self._session is not None:  # also while something long is being done
            return await asyncio.to_thread(self._session.state)
        async with self._calling:
            return await asyncio.to_thread(self._call, method, arguments)

    def _call(self, method: str, arguments: Sequence[Any]) -> Any:
        if self._session is None:
            self._session = self._begin()
        if method == "export":
            return self._export(self._session, *arguments)
        if method not in OF_SESSION:
            raise InvalidRequest(f"a trainer cannot be asked for {method!r}")
        return getattr(self._session, method)(*arguments)

    def _begin(self) -> Session:
        from ray_moe.actors.training import make_trainer
        from ray_moe.models.huggingface import Checkpoint
        from ray_moe.training.group import Alone
        from ray_moe.training.session import Session

        self._checkpoint = Checkpoint.open(self._spec.config.model)
        session = Session(make_trainer(self._spec, Alone(), self._checkpoint))
        try:
            session.start()
        except BaseException:
            session.close()
            raise
        return session

    def _export(self, session: Session, held: Collection[str]) -> tuple[int, str]:
        """Write the weights for others to load; `held` says which of those that were written before must stay."""
        from ray_moe.actors.training import gate_choice
        from ray_moe.training.export import PUBLISHED, export_running
        from ray_moe.training.gating import check_writable

        train = self._spec.config.train
        if not train.checkpoints.folder:
            raise InvalidConfig("there is nowhere to write the weights to: set train.checkpoints.folder")
        model = self._checkpoint
        if model is None:
            raise InvalidRequest("no session has begun")
        check_writable(model, gate_choice(train))
        root = Path(train.checkpoints.folder) / PUBLISHED
        step, folder = session.weights(
            lambda step, backbone, weights: export_running(model, root, step, backbone, weights, held)
        )
        return step, str(folder)


class Trainings:
    """The trainer of a service, as a router asks it; what `service/backend.py` wants of training.

    A call is made again when the trainer dies meanwhile: whatever has an id is not done twice.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        publish: Callable[[str], Awaitable[VersionStatus]],
        versions: Callable[[], Awaitable[tuple[VersionStatus, ...]]],
    ) -> None:
        self._spec = spec
        self._publish = publish
        self._versions = versions
        self._handle: Any = None

    async def forward_backward(self, micro: MicroBatch) -> MicroBatchReport:
        report: MicroBatchReport = await self._call("forward_backward", micro)
        return report

    async def optim_step(self, options: StepOptions) -> StepResult:
        result: StepResult = await self._call("optim_step", options)
        return result

    async def train_step(self, micros: Sequence[MicroBatch], options: StepOptions) -> StepResult:
        result: StepResult = await self._call("train_step", micros, options)
        return result

    async def discard(self, micro_ids: Collection[str]) -> tuple[str, ...]:
        discarded: tuple[str, ...] = await self._call("discard", micro_ids)
        return discarded

    async def sample(self, request: GenerateRequest) -> GenerateChunk:
        chunk: GenerateChunk = await self._call("sample", request)
        return chunk

    async def save_state(self) -> SavedState:
        saved: SavedState = await self._call("save_state")
        return saved

    async def load_state(self, step: int | None) -> SavedState:
        loaded: SavedState = await self._call("load_state", step)
        return loaded

    async def state(self) -> TrainingState:
        state: TrainingState = await self._call("state")
        return state

    async def publish(self) -> tuple[VersionStatus, int]:
        held = [version.model for version in await self._versions()]
        step, folder = await self._call("export", held)
        return await self._publish(folder), step

    async def _call(self, method: str, *arguments: Any) -> Any:
        end_s = time.monotonic() + RESTART_TIMEOUT_S
        is_over = False
        while True:
            try:
                handle = await self._trainer(is_over)
                is_over = False
                return await handle.call.remote(method, *arguments)
            except RayTaskError as error:
                if isinstance(error.cause, RayMoEError):
                    raise error.cause from None
                raise
            except (RayError, ValueError) as error:
                self._handle, is_over = None, isinstance(error, ActorDiedError)
                if time.monotonic() > end_s:
                    raise Unavailable(f"the trainer does not answer ({type(error).__name__}); retry") from error
                logger.warning("the trainer is not there: %s", str(error).splitlines()[:1])
                await asyncio.sleep(AGAIN_S)

    async def _trainer(self, is_over: bool) -> Any:
        """The trainer, once its process is there. Args: is_over: the last one will not come back by itself."""
        if self._handle is None:
            handle = await self._spec.find("launcher").start_trainer.remote(is_over)
            config = self._spec.config
            try:
                await asyncio.wait_for(handle.ping.remote(), config.experts.start_timeout_s)
            except asyncio.TimeoutError:
                raise InsufficientResources(
                    f"the trainer has not started in {config.experts.start_timeout_s:g} s: it needs "
                    f"{config.train.num_cpus:g} CPUs and {config.train.num_gpus:g} GPUs, which are nowhere free; add "
                    "nodes, or lower train.num_cpus and train.num_gpus"
                ) from None
            self._handle = handle
        return self._handle
